"""Batches through the float network and the quantized one: Grams, ranges of activations, biases, curvature."""

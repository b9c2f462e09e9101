"""Calibration: batches run through the float and the quantized network. Grams, activation ranges, biases, curvature."""

"""The user's functions and results: rules, plan, `quantize`, `Quantized`, certificates, serving, fine-tuning."""

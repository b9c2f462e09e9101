"""What the user calls and gets: rules, plan, `quantize`, `Quantized`, certificates, serving, fine-tuning."""

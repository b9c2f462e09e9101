"""Certified bounds on the difference of the quantized network from the float one, over boxes of inputs. See bounds.py."""

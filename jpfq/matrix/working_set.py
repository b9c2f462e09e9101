"""The size of what is computed at a time."""

import jax


def elements_at_once(on_cpu: int) -> int:
    """The number of array elements to work on at a time: what fits a CPU's cache, or what fills an accelerator."""
    return on_cpu if jax.default_backend() == "cpu" else 2**26

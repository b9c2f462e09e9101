"""Triangular systems of equations, of one matrix or of a batch."""

from typing import Any

import jax
import jax.scipy.linalg


def solve_triangular(A: jax.Array, B: jax.Array, **how: Any) -> jax.Array:
    """A^-1 B for a triangular A, as `jax.scipy.linalg.solve_triangular`.

    Of several matrices, on a CPU, one after the other: two such calls that XLA runs side by side can wait for each other
    forever (jax 0.10 on two cores).
    """
    one = lambda A, B: jax.scipy.linalg.solve_triangular(A, B, **how)
    return (jax.custom_batching.sequential_vmap(one) if jax.default_backend() == "cpu" else one)(A, B)

"""The data form: the same recursion on the rows themselves, carrying the residual u = X w - Xq q.

For a layer with many more inputs than calibration rows it takes less memory and arithmetic than the Gram form: the state
u is (rows, out), and no (in, in) matrix exists. Blocks of one coordinate are the recursion as GPFQ20 and GPFQ22 print it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .arrays import matmul
from .gram import Rows
from .methods import Method
from .recursion import BLOCK, Path, Recursion


def follow(
    W: jax.Array, rows: Rows, method: Method, recursion: Recursion, *, block: int | None = BLOCK, inputs: Any = ()
) -> tuple[Path, jax.Array]:
    """The codes of W (in, out), and the final residual u (rows, out).

    Args:
        W: weights, in the order of the recursion.
        rows: the calibration rows, their coordinates in the same order.
        method: one with a data form (`method.local`).
        recursion: grid, rounding and indices of the coordinates.
        block: coordinates per block; None takes them all at once, which costs the memory of the Gram form.
        inputs: those of the rounding at each coordinate, a tree of arrays (in, out) or (in,).
    """
    n, out = W.shape
    block = n if block is None else min(block, n)
    blocks = -(-n // block)
    more = blocks * block - n  # dead coordinates: they change nothing
    cut = lambda x: jnp.pad(x, ((0, more), *((0, 0),) * (x.ndim - 1))).reshape(blocks, block, *x.shape[1:])
    W, index, inputs = cut(W), cut(recursion.order), jax.tree.map(cut, inputs)
    rows = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, more))), rows)

    def visit(state, x):
        carry, u = state
        i, W, index, inputs = x
        here = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, i * block, block, 1), rows)
        base, L, about, _ = method.block(W, here, u)
        carry, path = recursion.scan(base, L, index, carry, about, inputs)
        return (carry, u + matmul(here.X, W) - matmul(here.quantized, path.q)), path

    start = (recursion.start(), jnp.zeros((rows.X.shape[0], out), W.dtype))
    (_, u), path = lax.scan(visit, start, (jnp.arange(blocks), W, index, inputs))
    return jax.tree.map(lambda x: x.reshape(blocks * block, out)[:n], path), u

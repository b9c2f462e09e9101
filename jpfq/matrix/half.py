"""Products by half of a square matrix, block by block in a loop: half the arithmetic, and no copy of the half."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .arrays import matmul
from .split import Split, Square, lower, upper

SIZE, BLOCKS = 512, 8  # coordinates in a block at least, and blocks along an axis at most


def triangular(M: Square, B: jax.Array, k: int = 0, *, above: bool = False) -> jax.Array:
    """tril(M, k) B, or triu(M, k) B with `above`, for M (in, in), B (in, out) and k from -1 to 1."""
    cut, n = upper if above else lower, B.shape[0]
    size, pairs = _blocks(n)
    if isinstance(M, Split) or len(pairs) == 1:
        return matmul(cut(M, k), B)

    def visit(out, pair):
        (r, rows), (c, columns) = (_run(i, size, n) for i in (pair[::-1] if above else pair))
        offset = (c + jnp.arange(size))[None] - (r + jnp.arange(size))[:, None]
        inside = (offset >= k if above else offset <= k) & rows[:, None] & columns[None]
        block = jnp.where(inside, lax.dynamic_slice(M, (r, c), (size, size)), 0)
        part = matmul(block, lax.dynamic_slice_in_dim(B, c, size))
        return lax.dynamic_update_slice_in_dim(out, lax.dynamic_slice_in_dim(out, r, size) + part, r, 0), None

    return lax.scan(visit, jnp.zeros_like(B), pairs)[0]


def quadratics(W: jax.Array, *matrices: jax.Array) -> jax.Array:
    """sum_o w_o^T M w_o over the columns of W (in, out), for each M (in, in): from W W^T, which is symmetric."""
    n = W.shape[0]
    size, pairs = _blocks(n)
    if len(pairs) == 1:
        S = matmul(W, W.T)
        return jnp.stack([jnp.sum(S * M) for M in matrices])

    def visit(totals, pair):
        (r, rows), (c, columns) = (_run(i, size, n) for i in pair)
        left, right = (lax.dynamic_slice_in_dim(W, at, size) for at in (r, c))
        S = jnp.where(rows[:, None] & columns[None], matmul(left, right.T), 0)
        mirrored = jnp.where(pair[0] == pair[1], 0, S.T)
        block = lambda M, r, c: lax.dynamic_slice(M, (r, c), (size, size))
        more = [jnp.sum(S * block(M, r, c)) + jnp.sum(mirrored * block(M, c, r)) for M in matrices]
        return totals + jnp.stack(more), None

    return lax.scan(visit, jnp.zeros(len(matrices), W.dtype), pairs)[0]


def _blocks(n):
    """The size of a block, and the pairs of blocks (i, j) with j <= i."""
    size = -(-n // min(BLOCKS, max(1, n // SIZE)))
    count = -(-n // size)
    return size, np.array([(i, j) for i in range(count) for j in range(i + 1)])


def _run(i, size, n):
    """The first coordinate of a block, moved so that all lie within n, and which coordinates no block before has."""
    at = jnp.minimum(i * size, n - size)
    return at, at + jnp.arange(size) >= i * size

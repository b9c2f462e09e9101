"""A square matrix that no device holds whole: each has a run of its rows, and they are gathered a few at a time.

The functions below take it or an array (in, in); the rest of the package uses only these.
"""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax

from ..scalar.pytree import register_dataclass
from .host import namespace
from .triangular import solve_triangular

AT_ONCE = 128  # rows that a product takes at a time


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Split:
    """The matrix of M[order][:, order], rows times `factor`, with 0 outside a band of diagonals; under `jax.shard_map`."""

    mine: jax.Array  # (n / devices, n) this device's rows of M, runs of rows in the order of the devices
    order: jax.Array | None = None  # (n,)
    factor: jax.Array | None = None  # (n,)
    axis: str | tuple[str, ...] = dataclasses.field(default="", metadata={"static": True})
    least: int | None = dataclasses.field(default=None, metadata={"static": True})  # of column - row
    most: int | None = dataclasses.field(default=None, metadata={"static": True})
    more: int = dataclasses.field(default=0, metadata={"static": True})  # rows and columns of 0 at the end

    @property
    def shape(self) -> tuple[int, int]:
        """(n, n)"""
        n = self.mine.shape[1] + self.more
        return n, n

    @property
    def dtype(self):
        """The dtype of its entries."""
        return self.mine.dtype

    def __rmul__(self, column: jax.Array) -> Self:
        """Its rows times a column (n, 1)."""
        factor = column[:, 0] if self.factor is None else column[:, 0] * self.factor
        return dataclasses.replace(self, factor=factor)

    def rows(self, first: int | jax.Array, size: int) -> jax.Array:
        """The rows first .. first + size - 1 (size, n), on every device; 0 where there are none."""
        t, n = first + jnp.arange(size), self.mine.shape[1]
        at = jnp.minimum(t, n - 1)
        local = (at if self.order is None else self.order[at]) - self._first
        there = (t < n) & (local >= 0) & (local < self.mine.shape[0])
        part = self.mine[jnp.clip(local, 0, self.mine.shape[0] - 1)]
        block = lax.psum(jnp.where(there[:, None], part, 0), self.axis)
        block = block if self.order is None else block[:, self.order]
        if self.factor is not None:
            block = block * self.factor[at][:, None]
        offset = jnp.arange(n)[None] - t[:, None]
        if self.least is not None:
            block = jnp.where(offset >= self.least, block, 0)
        if self.most is not None:
            block = jnp.where(offset <= self.most, block, 0)
        return jnp.pad(block, ((0, 0), (0, self.more)))

    def diagonal(self) -> jax.Array:
        """The diagonal of M[order][:, order] (n,)."""
        here = jnp.arange(self.mine.shape[0])
        mine = jnp.take_along_axis(self.mine, (self._first + here)[:, None], 1)[:, 0]
        whole = lax.all_gather(mine, self.axis, tiled=True)
        return whole if self.order is None else whole[self.order]

    def times(self, B: jax.Array) -> jax.Array:
        """The product with B (n, k), whose columns may be others on every device."""
        n = self.shape[0]
        size = min(n, AT_ONCE)
        part = lambda first: jnp.matmul(self.rows(first, size), B, precision="highest")
        parts = lax.map(part, jnp.arange(0, n, size))
        return parts.reshape(-1, B.shape[1])[:n]

    def unwound(self, B: jax.Array) -> jax.Array:
        """x of x + M x = B (n, k), for M strictly lower triangular."""
        n = B.shape[0]
        size = min(n, AT_ONCE)
        M, B = padded(self, -n % size), jnp.pad(B, ((0, -n % size), (0, 0)))

        def visit(x, first):
            rows = M.rows(first, size)
            rest = lax.dynamic_slice_in_dim(B, first, size) - jnp.matmul(rows, x, precision="highest")
            near = lax.dynamic_slice_in_dim(rows, first, size, 1)
            near = solve_triangular(near, rest, lower=True, unit_diagonal=True)
            return lax.dynamic_update_slice_in_dim(x, near, first, 0), None

        return lax.scan(visit, jnp.zeros_like(B), jnp.arange(0, n, size))[0][:n]

    @property
    def _first(self):
        return lax.axis_index(self.axis).astype(int) * self.mine.shape[0]


Square = Any  # a matrix (n, n): an array, or `Split`


def diagonal(M: Square) -> jax.Array:
    """diag(M) (n,)."""
    return M.diagonal() if isinstance(M, Split) else namespace(M).diagonal(M, axis1=-2, axis2=-1)


def lower(M: Square, k: int = 0) -> Square:
    """M with 0 above its k-th diagonal."""
    return dataclasses.replace(M, most=k) if isinstance(M, Split) else jnp.tril(M, k)


def upper(M: Square, k: int = 0) -> Square:
    """M with 0 below its k-th diagonal."""
    return dataclasses.replace(M, least=k) if isinstance(M, Split) else jnp.triu(M, k)


def permuted(M: Square, p: jax.Array) -> Square:
    """M[p][:, p]."""
    if not isinstance(M, Split):
        return M[p][:, p]
    order = p if M.order is None else M.order[p]
    return dataclasses.replace(M, order=order, factor=None if M.factor is None else M.factor[p])


def padded(M: Any, more: int) -> Any:
    """M with `more` rows and columns of 0 at its end."""
    return dataclasses.replace(M, more=more) if isinstance(M, Split) else jnp.pad(M, ((0, more), (0, more)))


def infinite(M: Square) -> jax.Array:
    """The number of entries that are not finite; of a split matrix, before its rows are multiplied."""
    if not isinstance(M, Split):
        return jnp.sum(~jnp.isfinite(M))
    return lax.psum(jnp.sum(~jnp.isfinite(M.mine)), M.axis)

"""Maly and Saab's walk in the null space: weights move onto the grid along the null space of the data, with Xq w unchanged.

With m rows and n > m inputs, m + 1 columns of Xq are always dependent. One moves along that dependence until a weight
reaches an end of its grid cell, and takes it out; at the end at most m weights lie between two levels.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from ..scalar.pytree import register_dataclass
from .arrays import matmul
from .gram import Rows
from .prepare import Prepare

REFACTOR = 64  # steps after which the inverse of the basis is made anew


@register_dataclass
@dataclasses.dataclass(frozen=True)
class MalySaab(Prepare):
    """The walk of Maly and Saab (2022), for grids of any width: each weight stays in the grid cell it starts in.

    Needs fewer calibration rows than inputs, and the rows themselves. Where Xq is not X, the weights first take the
    smallest change that makes Xq w = X w. Dead weights do not walk. The published method is this with `MSQ()` on `Binary()`.

    Examples:
        >>> few = jpfq.Rows(X[:8])  # 8 calibration rows for 32 inputs
        >>> one_bit = {"grid": jpfq.Binary(), "scale": jpfq.scale.AbsMax(), "method": jpfq.MSQ(), "finish": None}
        >>> tensor, info = jpfq.solve(W, few, prepare=jpfq.prepare.MalySaab(), **one_bit)
    """

    needs_rows = True
    needs_levels = True

    def refuse(self, rows, n, name):
        if rows >= n:
            raise ValueError(
                f"MalySaab walks in the null space of the data, which has no more than n - m dimensions: {name} has n = {n} "
                f"inputs and m = {rows} calibration rows, so there may be none. Calibrate with fewer rows than inputs (a "
                "convolution counts a row per patch), or take jpfq.GPFQ()."
            )

    def __call__(self, W, data, levels):
        assert levels is not None
        rows, n = data.X.shape
        self.refuse(rows, n, "the matrix")
        Xq = data.quantized
        if data.Xq is not None:
            # of all solutions of Xq y = (X - Xq) w the shortest
            left, singular, right = jnp.linalg.svd(Xq, full_matrices=False)
            keep = singular > singular[0] * max(Xq.shape) * jnp.finfo(Xq.dtype).eps
            scaled = jnp.where(keep, 1 / jnp.where(keep, singular, 1), 0)[:, None]
            W = W + matmul(right.T, scaled * matmul(left.T, matmul(data.X - data.Xq, W)))
        below = jnp.clip(levels.between(W)[0], levels.lo, levels.hi - 1)
        low, high = levels.decode(below), levels.decode(below + 1)
        walked = jax.vmap(kernel_walk, (1, None, 1, 1), 1)(W, Xq, low, high)
        nearest = levels.decode(levels.encode(W))
        return jnp.where(data.diagonal[:, None] > 0, walked, nearest), Rows(Xq)


def kernel_walk(w: jax.Array, X: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """z in the box [low, high] with X z = X w, at most m coordinates inside (low, high). Weights outside stay.

    Coordinates enter one by one. Those that are inside and independent make up a basis of at most m; a further one is a
    combination of the basis, and the two move against each other until one of them reaches its bound and leaves. As in the
    simplex method only the inverse of the basis is kept, m^2 operations a step.
    """
    m, n = X.shape
    energy = jnp.sqrt(jnp.max(jnp.sum(X**2, 0)))
    unit = jnp.eye(m, dtype=X.dtype) * jnp.where(energy > 0, energy, 1)  # columns in places not yet taken
    tiny = 100 * jnp.finfo(X.dtype).eps

    def enter(state, t):
        z, basis, inverse = state  # basis: which coordinate is in each of m places, n for none
        x, taken = X[:, t], basis < n
        y = matmul(inverse, x)  # x = sum of y over the places
        place = jnp.argmax(jnp.where(taken, -1, jnp.abs(y)))
        new = ~taken[place] & (jnp.abs(y[place]) > tiny * m)
        # along v = e_t - y, how far until each coordinate reaches its bound
        members = jnp.where(taken, basis, t)
        v, at = jnp.append(jnp.where(taken, -y, 0), 1.0), jnp.append(members, t)
        room = jnp.where(v > 0, high[at] - z[at], low[at] - z[at])
        reach = jnp.where(jnp.abs(v) > tiny, room / jnp.where(jnp.abs(v) > tiny, v, 1), jnp.inf)
        first = jnp.argmin(reach)
        inside = (z[t] > low[t]) & (z[t] < high[t])
        walks = inside & ~new
        distance = jnp.where(walks, jnp.maximum(reach[first], 0), 0)
        z = z.at[at].add(distance * v)
        reached = at[first]
        z = z.at[reached].set(jnp.where(walks, jnp.where(v[first] > 0, high[reached], low[reached]), z[reached]))
        # t takes the place of what left, or an empty one
        place = jnp.where(new, place, jnp.minimum(first, m - 1))
        enters = inside & (new | (first < m))
        row = inverse[place] / jnp.where(enters, y[place], 1)
        pivoted = (inverse - jnp.outer(y, row)).at[place].set(row)
        inverse = jnp.where(enters, pivoted, inverse)
        basis = jnp.where(enters, basis.at[place].set(t), basis)
        return z, basis, inverse

    def renew(state):
        z, basis, _ = state
        columns = jnp.where(basis < n, X[:, jnp.minimum(basis, n - 1)], unit)
        return z, basis, jnp.linalg.inv(columns)

    def run(state, ts):
        state = lax.fori_loop(0, REFACTOR, lambda i, s: enter(s, ts[i]), state)
        return renew(state), None

    start = (w, jnp.full(m, n), jnp.linalg.inv(unit))
    whole = n - n % REFACTOR
    state, _ = lax.scan(run, start, jnp.arange(whole).reshape(-1, REFACTOR))
    return lax.fori_loop(whole, n, lambda t, s: enter(s, t), state)[0]

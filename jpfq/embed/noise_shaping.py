"""Noise shaping: each rounding error is fed forward, so that errors cancel in weighted sums of codes.

For one vector y, a filter h and an alphabet,

    q_t = Q(y_t + sum_j h_j u_{t-j}),    u_t = y_t + sum_j h_j u_{t-j} - q_t.

Unrolled, this is the recursion of this package, q = Q(A + L (about - q)) with A = about = y and L the Toeplitz matrix of
h / (1 - h) (`feedback`). L is dense, but the filter has a short memory: `Shaped` holds the last states u in the carry of the
rounding, and the same loop runs with L = 0, at a cost of O(m) instead of O(m^2).
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..matrix import Recursion
from ..scalar import Rounding, RoundingContext, ScaledGrid, register_dataclass
from .row_blocks import by_rows


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Shaped(Rounding):
    """Rounds a + sum_j h_j u_{t-j} by `then`, with error u_t. The carry has the states u and the largest |u|.

    Fields: `taps`, the weights h_j of the filter; `lags`, their distances j, ascending; `then`, the inner rounding.

    Examples:
        >>> shaped = jpfq.embed.SigmaDelta(order=1).shaped()
        >>> shaped.lags, shaped.taps.tolist()
        ((1,), [1.0])
    """

    taps: jax.Array
    then: Rounding
    lags: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def random(self) -> bool:  # type: ignore[override]
        """True if the inner rounding draws random numbers."""
        return self.then.random

    def init(self):
        return jnp.zeros(max(self.lags, default=0)), jnp.zeros(()), self.then.init()

    def __call__(self, carry, a, context: RoundingContext):
        past, peak, inner = carry
        argument = a + sum(h.astype(a.dtype) * past[lag - 1].astype(a.dtype) for h, lag in zip(self.taps, self.lags))
        inner, code = self.then(inner, argument, context)
        u = (argument - context.levels.decode(code)).astype(past.dtype)
        past = jnp.concatenate([u[None], past[:-1]]) if self.lags else past
        return (past, jnp.maximum(peak, jnp.abs(u)), inner), code

    def error(self, levels):
        return self.then.error(levels)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Stability:
    """The largest states of noise shaping. Beyond the bound, rounding errors no longer cancel.

    The bound holds if no |y| exceeds the quantizer's `reach`. A vector with NaN counts as unstable.

    Fields: `peak`, for each vector, and `bound`.

    Examples:
        >>> codes, stability = features.transform(X)
        >>> stability.peak.shape, bool(stability.stable.all())
        ((64,), True)
    """

    peak: jax.Array  # largest |u| of each vector
    bound: jax.Array  # on |u|, as long as the argument lies in the range of the alphabet

    @property
    def stable(self) -> jax.Array:
        """True for vectors whose states stayed within the bound, up to floating-point errors."""
        return self.peak <= self.bound * (1 + 1000 * jnp.finfo(self.peak.dtype).eps)


@functools.partial(jax.jit, static_argnames=("run", "dtype"))
def shape(
    Y: jax.Array,
    levels: ScaledGrid,
    rounding: Shaped,
    run: int,
    dtype: np.dtype,
    key: jax.Array | None,
    indices: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Codes (.., m) of vectors Y (.., m), as integers of this dtype, and the largest |u| of each (..).

    States restart from 0 every `run` entries. These runs are independent: they are the neurons of the recursion. Every
    vector has its own key, from its index in `indices` (..).
    """

    def one(y, index):
        A = y.reshape(-1, run).T
        draw = None if key is None else jax.random.fold_in(key, index)
        recursion = Recursion(levels, jnp.arange(run), A.shape[1], rounding, draw)
        (_, peak, _), path = recursion.scan(A, None, recursion.order, recursion.start())
        return path.codes.astype(dtype).T.reshape(-1), peak.max()

    def some(Y, indices):
        shaped = one
        for _ in indices.shape:
            shaped = jax.vmap(shaped)
        return shaped(Y, indices)

    return by_rows(some, Y.shape[-1], Y, indices)


def row_indices(rows: tuple[int, ...], first: jax.Array | int) -> jax.Array:
    """The indices of vectors with these leading axes, counted from `first`."""
    return jnp.asarray(first) + jnp.arange(math.prod(rows)).reshape(rows)


def feedback(taps: jax.Array, lags: tuple[int, ...], m: int, run: int) -> jax.Array:
    """The matrix L (m, m) of the form q = Q(A + L (about - q)): L[t, j] = g_{t-j} within a run, with 1 + g = 1 / (1 - h).

    For comparison and for other roundings; `shape` does not need this matrix.

    Args:
        taps, lags: of the filter h.
        m: length of the vectors.
        run: the number of entries after which states restart from 0.

    Examples:
        >>> jpfq.embed.feedback(jnp.array([1.0]), (1,), m=3, run=3).tolist()  # a plain sum of errors
        [[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0]]
    """

    def visit(past, _):
        g = sum((h * past[lag - 1] for h, lag in zip(taps, lags)), jnp.zeros((), taps.dtype))
        return jnp.concatenate([g[None], past[:-1]]), g

    first = jnp.zeros(max(lags, default=1), taps.dtype).at[0].set(1)
    g = jnp.append(first[:1], lax.scan(visit, first, None, run - 1)[1])  # of 1 / (1 - h): g_k = sum_j h_j g_{k-j}
    t, j = np.indices((m, m))
    inside = (t > j) & (t // run == j // run)
    return jnp.where(inside, g[np.where(inside, t - j, 0)], 0)

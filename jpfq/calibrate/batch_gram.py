"""The Gram of one batch, and of one more: what is compiled for each shape of input."""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..matrix import Gram
from ..matrix.arrays import at_least_float32, raised
from ..matrix.conv_gram import Correlations, at_a_time, correlates
from ..matrix.lanes import each, over_lanes
from ..matrix.layout import Layout


def at_once() -> int:
    """The number of patch entries in memory at a time: what stays in a processor's cache, or fills an accelerator."""
    return 2**21 if jax.default_backend() == "cpu" else 2**26


def may_merge(x) -> bool:
    """True if axes of rows may become one, which multiplies faster: where they are not split over devices."""
    return len(x.sharding.device_set) == 1


class How(NamedTuple):
    """The settings that decide the program."""

    layout: Layout
    merges: bool  # as of `may_merge`
    at_once: int  # as of `at_once`
    over: Any = None  # how a large Gram is split over devices
    laned: tuple[bool, bool] = (False, False)  # whether the inputs of the quantized networks have lanes, and `picked`
    power: int = 0  # of 2, that inputs are multiplied by
    correlate: bool = True  # whether correlations are taken where they can be


@functools.partial(jax.jit, static_argnames="how")
def gram_of(x: jax.Array, xq: Any, weights: Any, picked: Any, how: How) -> Gram:
    """The Gram of one batch, of which the rows numbered `picked` are taken, or all."""
    if how.power:
        larger = lambda x: raised(at_least_float32(x), how.power)
        x, xq = larger(x), None if xq is None else larger(xq)
    one = lambda x, xq, weights, picked: _of_one_lane(x, xq, weights, picked, how)
    gram = over_lanes(one, (x, xq, weights, picked), (False, how.laned[0], False, how.laned[1]))
    return dataclasses.replace(gram, power=how.power)


@functools.partial(jax.jit, static_argnames="how", donate_argnums=0)  # the sum goes where the sum so far was
def added(total: Gram | None, x: jax.Array, xq: Any, weights: Any, picked: Any, how: How) -> Gram:
    """The Gram of one batch more."""
    gram = gram_of(x, xq, weights, picked, how)
    return gram if total is None else total.merge(gram)


def nothing(x: jax.Array, xq: Any, picked: Any, how: How) -> Gram:
    """The Gram of no batch, like that of one. NumPy's zeros compile nothing, but would have to be sent to an accelerator."""
    lanes = [array.shape[0] for array, own in zip((xq, picked), how.laned, strict=True) if own][:1]
    B, n, _ = how.layout.dims
    dtype = np.float64 if x.dtype == np.float64 else np.float32
    make = np.zeros if jax.default_backend() == "cpu" else jnp.zeros
    zeros: Any = lambda *shape: make((*lanes, B, *shape), dtype)
    C, drift = (None, None) if xq is None else (zeros(n, n), zeros(n, n))
    return Gram(zeros(n, n), C, drift, zeros(n), zeros(n), zeros(), how.power)


def _of_one_lane(x, xq, weights, picked, how):
    """Patches of a convolution are made and let go a few samples, or picked windows, at a time."""
    layout, merges, at_once, over, _, _, correlate = how

    def whole(x, xq, weights, picked=None):
        take = layout.rows if picked is None else lambda x: layout.picked(x, picked)
        X, Xq = take(x), None if xq is None else take(xq)
        if merges:
            flat = lambda X: X.reshape(X.shape[0], math.prod(X.shape[1:-1]), X.shape[-1])
            X, Xq = flat(X), None if Xq is None else flat(Xq)
            weights = None if weights is None else weights.reshape(len(weights), -1)
        weights = None if weights is None else jnp.broadcast_to(weights, (len(X), *weights.shape[1:]))
        gram = each(Gram.scaled, X, Xq, weights)
        return gram if over is None else gram.split(over)

    if picked is not None:
        weights = None if weights is None else weights.reshape(len(weights), -1)[:, picked]
        n = math.prod(layout.dims[:2])
        part = lambda first, size: whole(
            x, xq, _slice(weights, first, size, 1), lax.dynamic_slice_in_dim(picked, first, size)
        )
        return _in_parts(part, picked.size, max(1, at_once // n))
    if merges and weights is None and correlate and correlates(layout, x.shape):
        samples = x.shape[(axis := layout.data_spec[0])]
        together = at_a_time(layout, x.size // samples, 1 if xq is None else 2, at_once)
        part = lambda first, size: Correlations.of(layout, _slice(x, first, size, axis), _slice(xq, first, size, axis))
        gram = _in_parts(part, samples, together).gram()
        return gram if over is None else gram.split(over)
    cut = layout.split(x, at_once) if merges else None
    if cut is None:
        return whole(x, xq, weights)
    axis, size = cut
    part = lambda first, size: whole(
        _slice(x, first, size, axis), _slice(xq, first, size, axis), _slice(weights, first, size, 1)
    )
    return _in_parts(part, x.shape[axis], size)


def _slice(x, first, size, axis) -> Any:
    return None if x is None else lax.dynamic_slice_in_dim(x, first, size, axis)


def _in_parts(part, total, size):
    """The sum of the Grams, or correlations, of runs of at most `size`, one after the other; where it can be, of one size.

    A part is compiled once then: it may be a large program.
    """
    if size >= total:
        return part(0, total)
    least = -(-total // size)
    even = next((count for count in range(least, 2 * least) if total % count == 0), None)
    count, size = (total // size, size) if even is None else (even, total // even)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda: part(0, size)))
    gram, _ = lax.scan(lambda gram, i: (gram.merge(part(i * size, size)), None), zero, jnp.arange(count))
    return gram.merge(part(count * size, total - count * size)) if count * size < total else gram

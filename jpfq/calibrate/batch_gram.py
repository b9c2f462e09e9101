"""The Gram of one batch, and its addition to a sum: the programs that are compiled for each shape of input."""

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
from ..matrix.working_set import elements_at_once


def at_once() -> int:
    """The number of patch entries to hold in memory at once."""
    return elements_at_once(on_cpu=2**21)


def may_merge(x) -> bool:
    """True if the axes of rows may be merged into one, which multiplies faster. Not if they are split over devices."""
    return len(x.sharding.device_set) == 1


class GramOptions(NamedTuple):
    """The static options of the program that computes a Gram."""

    layout: Layout
    merges: bool  # see `may_merge`
    at_once: int  # see `at_once`
    over: Any = None  # how a large Gram is split over devices
    laned: tuple[bool, bool] = (False, False)  # whether the quantized inputs, and whether `picked` have lanes
    power: int = 0  # inputs are multiplied by 2^power
    correlate: bool = True  # whether convolutions use correlations where they can


@functools.partial(jax.jit, static_argnames="options")
def batch_gram(x: jax.Array, xq: Any, weights: Any, picked: Any, options: GramOptions) -> Gram:
    """The Gram of one batch, from the rows with the indices `picked`, or from all."""
    if options.power:
        larger = lambda x: raised(at_least_float32(x), options.power)
        x, xq = larger(x), None if xq is None else larger(xq)
    one = lambda x, xq, weights, picked: _of_one_lane(x, xq, weights, picked, options)
    gram = over_lanes(one, (x, xq, weights, picked), (False, options.laned[0], False, options.laned[1]))
    return dataclasses.replace(gram, power=options.power)


@functools.partial(jax.jit, static_argnames="options", donate_argnums=0)  # the sum is updated in place
def add_batch(total: Gram | None, x: jax.Array, xq: Any, weights: Any, picked: Any, options: GramOptions) -> Gram:
    """The sum of a Gram and that of one more batch."""
    gram = batch_gram(x, xq, weights, picked, options)
    return gram if total is None else total.merge(gram)


def zero_gram(x: jax.Array, xq: Any, picked: Any, options: GramOptions) -> Gram:
    """Zeros in the shapes of a Gram. On a CPU they are NumPy's, which compile nothing."""
    lanes = [array.shape[0] for array, own in zip((xq, picked), options.laned, strict=True) if own][:1]
    B, n, _ = options.layout.dims
    dtype = np.float64 if x.dtype == np.float64 else np.float32
    make = np.zeros if jax.default_backend() == "cpu" else jnp.zeros
    zeros: Any = lambda *shape: make((*lanes, B, *shape), dtype)
    C, drift = (None, None) if xq is None else (zeros(n, n), zeros(n, n))
    return Gram(zeros(n, n), C, drift, zeros(n), zeros(n), zeros(), options.power)


def _of_one_lane(x, xq, weights, picked, options):
    """The Gram of one lane. Patches of a convolution are made for a few samples, or picked windows, at a time."""
    layout, merges, at_once, over, _, _, correlate = options

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
    """The sum of `part` over consecutive runs of at most `size`: equal sizes if possible, so that `part` compiles once."""
    if size >= total:
        return part(0, total)
    least = -(-total // size)
    even = next((count for count in range(least, 2 * least) if total % count == 0), None)
    count, size = (total // size, size) if even is None else (even, total // even)
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda: part(0, size)))
    gram, _ = lax.scan(lambda gram, i: (gram.merge(part(i * size, size)), None), zero, jnp.arange(count))
    return gram.merge(part(count * size, total - count * size)) if count * size < total else gram

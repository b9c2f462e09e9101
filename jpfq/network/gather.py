"""Gather: the calibration data of one stop, over all batches, as a Gram or as rows."""

import dataclasses
import functools
import math
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..matrix import Devices, Gram, Recipe, Rows
from ..matrix.correlate import Correlations, at_a_time, correlates
from ..matrix.each import each, over_lanes
from ..matrix.gram import Shown, at_least_float32, raised
from ..matrix.layout import DotLayout, Layout
from ..matrix.patches import All
from .stream import Stream


class Gathered(NamedTuple):
    """Data of B matrices, and the mean input of each in the reference and the quantized network (B, in)."""

    data: Gram | Rows
    mean_X: jax.Array
    mean_Xq: jax.Array
    rows: jax.Array  # (B,) how many, or the sum of their weights
    used: jax.Array | None = None  # (B,) of experts, how many of those are not 0


class Gather:
    """The data of one stop for the quantized networks of one track, in each form made once and when first asked for."""

    def __init__(
        self,
        streams: Sequence[Stream],
        number: int,
        key: jax.Array | None = None,
        devices: Devices | None = None,
        track: int = 0,
    ):
        """
        Args:
            key: for patches that are drawn; with lanes, one for each.
            devices: over which a large Gram is split.
        """
        self.streams = [(stream, stream.stops[number][0]) for stream in streams]
        stream, site = self.streams[0]
        self.track, self.path, self.patches = track, site.path, site.patches or All()
        self.key = None
        if self.patches.random and key is not None:
            self.key = fold_in(key, zlib.crc32(f"patches of {site.path}".encode()))
        self.forked = stream.has_lanes(site.data, track)
        self.laned = self.forked or (self.key is not None and self.key.ndim > 0)  # whether data have lanes
        self.made: dict = {}
        self.rows = None if devices is None else devices.rows_of(site.layout.dims[1])

    def __call__(self, recipe: Recipe, shape: tuple[int, int, int], centred: bool = False) -> Gathered:
        """The data in the form that a recipe prefers; with the mean of every input taken off where `centred`."""
        _, n, out = shape
        kind = Rows if recipe.prefers_rows(self.count, n, out) else Gram
        if (kind, centred) not in self.made:
            self.made[kind, centred] = self._rows(centred) if kind is Rows else self._gram(centred)
        return self.made[kind, centred]._replace(used=self.used)

    @functools.cached_property
    def used(self) -> jax.Array | None:
        """Of experts, matrices that each have rows of their own: how many rows of each are not 0, or their weights."""
        layout = self.streams[0][1].layout
        if not isinstance(layout, DotLayout) or not layout.batch:
            return None
        parts = (
            _used(layout, x if xq is None else xq, weights, self.forked)
            for layout, x, xq, weights, _ in self._batches()
        )
        return functools.reduce(jnp.add, parts)

    @functools.cached_property
    def count(self) -> int:
        """Rows in all."""
        total = 0
        for layout, x, _, _, picked in self._batches():
            total += math.prod(rows_shape(layout, x.shape)) if picked is None else picked.shape[-1]
        return total

    def _batches(self):
        """Per batch: layout, inputs of both networks, weights of the rows, numbers of the rows to take (None for all)."""
        number = 0
        for stream, site in self.streams:
            layout = self.patches.layout(site.layout)
            for x, xq, weights in stream.inputs(site, self.track):
                rows = rows_shape(layout, x.shape)
                picked = None
                if self.key is not None:
                    key = fold_in(self.key, number)
                    pick = lambda key, layout=layout, rows=rows: self.patches.pick(layout, rows, key)
                    picked = jax.vmap(pick)(key) if key.ndim else pick(key)
                yield layout, x, xq, fit(weights, rows, self.path), picked
                number += 1

    def _laned(self, picked):
        """Whether the input of the quantized networks has lanes, and whether the numbers of the rows to take have."""
        return self.forked, picked is not None and picked.ndim > 1

    def _gram(self, centred):
        if centred:
            gathered = self.made.get((Gram, False)) or self._gram(False)
            return gathered._replace(data=_centred(gathered.data, self.laned))

        def summed(power):
            parts = (
                _gram(layout, *batch, _merges(batch[0]), at_once(), self.rows, self._laned(batch[-1]), power)
                for layout, *batch in self._batches()
            )
            gram: Any = functools.reduce(_merge, parts)
            return Gathered(gram, *_means(gram))

        gathered = summed(0)
        power = self._checked(gathered)
        return summed(power) if power else gathered

    def _rows(self, centred):
        parts = [_flat_rows(layout, *batch, self._laned(batch[-1])) for layout, *batch in self._batches()]
        X, Xq, weights = (jnp.concatenate(x, -2) if x[0] is not None else None for x in zip(*parts, strict=True))
        gathered = _weighted(X, Xq, weights, centred, self.laned)
        return gathered._replace(data=gathered.data.to_power(self._checked(gathered)))

    def _checked(self, gathered) -> int:
        """The power of 2 by which inputs are to be multiplied; raises for data that cannot be used."""
        shown = Shown.of(gathered.data.diagonal, gathered.mean_X, gathered.mean_Xq, gathered.rows)
        for finite, network in ((shown.finite_X, "float"), (shown.finite_Xq, "quantized")):
            if not finite:
                raise ValueError(
                    f"The inputs of {self.path} are infinite or NaN in the {network} network: the model overflows on the "
                    "calibration data. Calibrate in float32, or scale the model's inputs down."
                )
        shown.refuse(self.path)
        return shown.power


def rows_shape(layout: Layout, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of rows that a data operand of this shape has in a layout."""
    return _rows_shape(layout, tuple(shape))


@functools.lru_cache(maxsize=4096)
def _rows_shape(layout, shape):
    return jax.eval_shape(layout.rows, jax.ShapeDtypeStruct(shape, jnp.float32)).shape[1:-1]


def fit(weights: jax.Array | None, rows: tuple[int, ...], path: str) -> jax.Array | None:
    """Weights of a batch as weights of a site's rows; leading axes of the rows are those of the weights."""
    if weights is None:
        return None
    shape = weights.shape
    if shape == rows[: len(shape)]:
        return jnp.broadcast_to(weights.reshape(shape + (1,) * (len(rows) - len(shape))), rows)
    if rows and shape[0] == rows[0]:  # one row per sample: it counts if any of its positions does
        return fit(weights.reshape(shape[0], -1).max(1), rows, path)
    if rows and rows[0] % weights.size == 0:  # samples merged with positions, or with what comes after them
        return fit(jnp.repeat(weights.ravel(), rows[0] // weights.size), rows, path)
    raise ValueError(
        f"Row weights of shape {shape} do not fit the rows {rows} that reach {path}: the leading axes of the weights must "
        "be those of the layer's input, such as (batch,) or (batch, position)."
    )


def fold_in(key: jax.Array, number: int) -> jax.Array:
    """`jax.random.fold_in` into a key, or into the key of every lane."""
    fold = lambda key: jax.random.fold_in(key, number)
    return jax.vmap(fold)(key) if key.ndim else fold(key)


def at_once() -> int:
    """How many numbers of patches exist at a time: what stays in a processor's cache, or fills an accelerator."""
    return 2**21 if jax.default_backend() == "cpu" else 2**26


def _merges(x) -> bool:
    """Whether axes of rows may become one, which multiplies faster: where they are not split over devices."""
    return len(x.sharding.device_set) == 1


@functools.partial(jax.jit, static_argnames=("layout", "merges", "at_once", "over", "laned", "power"))
def _gram(layout, x, xq, weights, picked, merges, at_once, over=None, laned=(False, False), power=0):
    """The Gram of one batch, its inputs times 2^power; `laned` are xq and picked."""
    if power:
        x, xq = (None if x is None else raised(at_least_float32(x), power) for x in (x, xq))
    one = lambda x, xq, weights, picked: _gram_of_one(layout, x, xq, weights, picked, merges, at_once, over)
    gram = over_lanes(one, (x, xq, weights, picked), (False, laned[0], False, laned[1]))
    return dataclasses.replace(gram, power=power)


def _gram_of_one(layout, x, xq, weights, picked, merges, at_once, over):
    """Patches of a convolution are made and let go a few samples, or picked windows, at a time."""

    def whole(x, xq, weights, picked=None):
        take = layout.rows if picked is None else lambda x: layout.picked(x, picked)
        X, Xq = take(x), None if xq is None else take(xq)
        if merges:
            flat = lambda X: X.reshape(X.shape[0], math.prod(X.shape[1:-1]), X.shape[-1])
            X, Xq = flat(X), None if Xq is None else flat(Xq)
            weights = None if weights is None else weights.ravel()
        gram = each(lambda X, Xq: Gram.scaled(X, Xq, weights), X, Xq)
        return gram if over is None else gram.split(over)

    if picked is not None:
        weights = None if weights is None else weights.ravel()[picked]
        n = math.prod(layout.dims[:2])
        part = lambda first, size: whole(
            x, xq, _slice(weights, first, size, 0), lax.dynamic_slice_in_dim(picked, first, size)
        )
        return _in_parts(part, picked.size, max(1, at_once // n))
    if merges and weights is None and correlates(layout, x.shape):
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
        _slice(x, first, size, axis), _slice(xq, first, size, axis), _slice(weights, first, size, 0)
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


@functools.partial(jax.jit, donate_argnums=0)  # the sum goes where the sum so far was
def _merge(total, gram):
    return total.merge(gram)


@functools.partial(jax.jit, static_argnames=("layout", "laned"))
def _used(layout, x, weights, laned):
    """How many rows of each matrix (B,) are not 0, or the sum of their weights."""

    def one(x, weights):
        shown = jnp.any(layout.rows(x) != 0, -1)
        counted = shown.astype(jnp.float32) if weights is None else shown * weights[None].astype(jnp.float32)
        return counted.sum(range(1, counted.ndim))

    return over_lanes(one, (x, weights), (laned, False))


@jax.jit
def _means(gram):
    mean = lambda sums: raised(sums / jnp.maximum(gram.count, 1)[..., None], -gram.power)
    return mean(gram.sum_X), mean(gram.sum_Xq), gram.count


@functools.partial(jax.jit, static_argnames="laned")
def _centred(gram, laned):
    return over_lanes(lambda gram: each(Gram.centred, gram), (gram,), (laned,))


@functools.partial(jax.jit, static_argnames=("layout", "laned"))
def _flat_rows(layout, x, xq, weights, picked, laned):
    """Rows (B, rows, in), and their weights (1, rows); `laned` are xq and picked."""

    def one(x, xq, weights, picked):
        def flat(x):
            X = at_least_float32(layout.rows(x) if picked is None else layout.picked(x, picked))
            return X.reshape(X.shape[0], math.prod(X.shape[1:-1]), X.shape[-1])

        flat_weights = None
        if weights is not None:
            flat_weights = (weights.ravel() if picked is None else weights.ravel()[picked])[None, :, None]
        return flat(x), None if xq is None else flat(xq), flat_weights

    return over_lanes(one, (x, xq, weights, picked), (False, laned[0], False, laned[1]))


@functools.partial(jax.jit, static_argnames=("centred", "laned"))
def _weighted(X, Xq, weights, centred, laned):
    """Rows times the roots of their weights (1, rows, 1), so that their sums of squares are weighted."""
    one = lambda X, Xq, weights: _weighted_of_one(X, Xq, weights, centred)
    return over_lanes(one, (X, Xq, weights), (laned, laned and Xq is not None, laned and weights is not None))


def _weighted_of_one(X, Xq, weights, centred):
    weight = jnp.ones((1, X.shape[1], 1), X.dtype) if weights is None else weights.astype(X.dtype)
    count = weight.sum()
    mean = lambda X: jnp.sum(X * weight, 1) / jnp.maximum(count, 1)

    def ready(X):
        X = X - mean(X)[:, None] if centred else X
        return X if weights is None else X * jnp.sqrt(weight)

    rows = Rows(ready(X), None if Xq is None else ready(Xq))
    mean_X = mean(X)
    return Gathered(rows, mean_X, mean_X if Xq is None else mean(Xq), jnp.broadcast_to(count, X.shape[:1]))

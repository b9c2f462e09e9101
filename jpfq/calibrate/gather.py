"""Gather: the calibration data of one stop over all batches, as a Gram or as rows."""

import functools
import math
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..matrix import Devices, Gram, Recipe, Rows
from ..matrix.arrays import at_least_float32
from ..matrix.conv_gram import pays
from ..matrix.host import numpy_or_jit
from ..matrix.lanes import each, over_lanes
from ..matrix.layout import DotLayout, Layout
from ..matrix.patches import DEFAULT
from ..matrix.shown import Shown
from ..model.random_keys import fold_in
from .batch_gram import GramOptions, add_batch, at_once, may_merge, zero_gram
from .batches import NotFinite
from .stream import Stream


class Gathered(NamedTuple):
    """Calibration data of B matrices, and the mean inputs in the reference and the quantized network (B, in)."""

    data: Gram | Rows
    mean_X: jax.Array
    mean_Xq: jax.Array
    rows: jax.Array  # (B,) the number of rows, or the sum of their weights
    used: jax.Array | None = None  # (B,) for experts: the number of rows that are not all 0


class Gather:
    """The data of one stop for one track. Each form is computed when it is first requested, and cached."""

    def __init__(
        self,
        streams: Sequence[Stream],
        index: int,
        key: jax.Array | None = None,
        devices: Devices | None = None,
        track: int = 0,
    ):
        """
        Args:
            index: of the stop.
            key: for random patches; with lanes, one for each.
            devices: over which a large Gram is split.
            track: the index of the track.
        """
        self.streams = [(stream, stream.stops[index][0]) for stream in streams]
        stream, site = self.streams[0]
        self.track, self.path, self.patches = track, site.path, site.patches or DEFAULT
        self.key = None
        if self.patches.random and key is not None:
            self.key = fold_in(key, zlib.crc32(f"patches of {site.path}".encode()))
        self.forked = stream.has_lanes(site.data, track)
        self.laned = self.forked or (self.key is not None and self.key.ndim > 0)  # whether the data have lanes
        self.cached: dict = {}
        self.shown: Shown | None = None  # set with the data
        self.rows = None if devices is None else devices.rows_of(site.layout.dims[1])

    def __call__(self, recipe: Recipe, shape: tuple[int, int, int], centred: bool = False) -> Gathered:
        """The data in the form that a recipe prefers; `centred` subtracts the mean of every input."""
        _, n, out = shape
        gathered = self.of(Rows if recipe.prefers_rows(self.count, n, out) else Gram, centred)
        if self.shown is not None:
            self.shown.refuse(self.path)
        return gathered

    def of(self, kind: type, centred: bool = False) -> Gathered:
        """The data as a `Gram` or as `Rows`."""
        if (kind, centred) not in self.cached:
            self.cached[kind, centred] = self._rows(centred) if kind is Rows else self._gram(centred)
        return self.cached[kind, centred]._replace(used=self.used)

    @functools.cached_property
    def used(self) -> jax.Array | None:
        """For each expert, the number of nonzero rows or the sum of their weights. Experts have rows of their own."""
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
        """The number of rows, without those of weight 0."""
        total = 0
        for layout, x, _, weights, picked in self._batches():
            if weights is not None and picked is None:
                total += int((weights > 0).any(0).sum())
            else:
                total += math.prod(rows_shape(layout, x.shape)) if picked is None else picked.shape[-1]
        if not total:
            raise ValueError(
                f"The calibration data of {self.path} have no rows that count: either there are none, or every one of them "
                "depends on padding (rows of weight 0). Give batches without padding, one for each length, or skip this "
                "kernel by a rule with skip=True."
            )
        return total

    def _batches(self):
        """Yields, per batch: layout, inputs of both networks, row weights (B or 1, *rows), indices of the rows to take.

        Weights of None are all 1; indices of None take all rows.
        """
        index, total = 0, self._total
        for stream, site in self.streams:
            layout = self.patches.layout(site.layout)
            for x, xq, weights in stream.inputs(site, self.track):
                rows = rows_shape(layout, x.shape)
                if self.key is not None:
                    key = fold_in(self.key, index)
                    pick = lambda key, layout=layout, rows=rows: self.patches.pick(layout, rows, key)
                    picked = jax.vmap(pick)(key) if key.ndim else pick(key)
                else:
                    picked = None if total is None else self.patches.pick(layout, rows, None, total, index)
                weights = None if weights is None else _row_weights(layout, weights, x.shape)
                yield layout, x, xq, weights, picked
                index += 1

    @functools.cached_property
    def _total(self) -> int | None:
        """The number of rows of all batches; None if rows have weights: then all rows of positive weight are taken."""
        if any(weights is not None for stream, _ in self.streams for weights in stream.weights):
            return None
        rows = lambda site: math.prod(rows_shape(self.patches.layout(site.layout), site.data.aval.shape))
        return sum(len(stream.batches) * rows(site) for stream, site in self.streams)

    def _laned(self, picked):
        """True for the input of the quantized networks, and for the indices of rows, if they have lanes."""
        return self.forked, picked is not None and picked.ndim > 1

    def _gram(self, centred):
        if centred:
            gathered = self.cached.get((Gram, False)) or self._gram(False)
            return gathered._replace(data=_centred(gathered.data, self.laned))
        gathered, statistics = self._summed(0)
        power = self._checked(statistics)
        return self._summed(power)[0] if power else gathered

    def _summed(self, power) -> Any:
        """The Gram of all batches, their inputs times 2^power, and the statistics for `Shown`."""
        total = None
        several = sum(len(stream.batches) for stream, _ in self.streams) > 1 and self.rows is None
        for layout, x, xq, weights, picked in self._batches():
            correlate = self._total is not None and pays(layout, self._total)
            options = GramOptions(
                layout.of_rows, may_merge(x), at_once(), self.rows, self._laned(picked), power, correlate
            )
            if total is None and several:  # the first batch then uses the same program as the others
                total = zero_gram(x, xq, picked, options)
            total = add_batch(total, x, xq, weights, picked, options)
        return _with_means(total)

    def _rows(self, centred):
        parts = self.flat()
        gathered, statistics = _weighted(parts, (self.laned,) * len(parts), centred)
        return gathered._replace(data=gathered.data.to_power(self._checked(statistics)))

    def flat(self) -> list[tuple[jax.Array, jax.Array | None, jax.Array | None]]:
        """The rows of both networks, and their weights, by batch."""
        return [_flat_rows(layout, *batch, self._laned(batch[-1])) for layout, *batch in self._batches()]

    def _checked(self, statistics) -> int:
        """The power of 2 to multiply inputs by; raises if the data are not finite."""
        self.shown = shown = Shown.read(statistics)
        for finite, network in ((shown.finite_X, "float"), (shown.finite_Xq, "quantized")):
            if not finite:
                raise NotFinite(self.path, network, self._culprit(network))
        return shown.power

    def _culprit(self, network):
        """(stream, batch) of the first batch whose counted rows are not finite."""
        indices = [(i, j) for i, (stream, _) in enumerate(self.streams) for j in range(len(stream.batches))]
        for index, (layout, x, xq, weights, _) in zip(indices, self._batches(), strict=True):
            own = network == "quantized" and xq is not None
            value: Any = xq if own else x
            rows = jax.vmap(layout.rows)(value) if own and self.forked else layout.rows(value)[None]
            bad = ~jnp.isfinite(rows).all((0, 1, -1))
            if bool((bad if weights is None else bad & (weights > 0).any(0)).any()):
                return index
        return indices[0]


class Joint:
    """The data of several stops that share a matrix: the sum of their Grams, or all their rows."""

    def __init__(self, parts: Sequence[Gather]):
        self.parts, self.laned = parts, any(part.laned for part in parts)
        self.cached: dict = {}

    @property
    def count(self) -> int:
        """The number of rows."""
        return sum(part.count for part in self.parts)

    def __call__(self, recipe: Recipe, shape: tuple[int, int, int], centred: bool = False) -> Gathered:
        """The same as `Gather.__call__`."""
        _, n, out = shape
        kind = Rows if recipe.prefers_rows(self.count, n, out) else Gram
        if (kind, centred) not in self.cached:
            self.cached[kind, centred] = self._rows(centred) if kind is Rows else self._gram(centred)
        return self.cached[kind, centred]

    @property
    def used(self) -> jax.Array | None:
        """The same as `Gather.used`."""
        used: list[Any] = [part.used for part in self.parts]
        return None if any(x is None for x in used) else functools.reduce(jnp.add, used)

    def _gram(self, centred):
        gram = _joined([part.of(Gram).data for part in self.parts], tuple(part.laned for part in self.parts))
        gathered, statistics = _with_means(gram)
        gathered = gathered._replace(used=self.used)
        Shown.read(statistics).refuse(self.parts[0].path)
        return gathered._replace(data=_centred(gathered.data, self.laned)) if centred else gathered

    def _rows(self, centred):
        flat = [(rows, part.laned) for part in self.parts for rows in part.flat()]
        gathered, statistics = _weighted([rows for rows, _ in flat], tuple(laned for _, laned in flat), centred)
        shown = Shown.read(statistics)
        if not (shown.finite_X and shown.finite_Xq):
            for part in self.parts:  # the one at fault raises
                part.of(Rows)
        shown.refuse(self.parts[0].path)
        return gathered._replace(data=gathered.data.to_power(shown.power), used=self.used)


@functools.partial(jax.jit, static_argnames="laned")
def _joined(grams, laned):
    """The sum of Grams, some of which may have lanes."""
    return functools.reduce(Gram.merge, _alike(grams, laned))


def _concatenated(parts, laned):
    """All rows in one array, some of which may have lanes. If one part has quantized rows, or weights, all get them."""
    X, Xq, weights = zip(*_alike(parts, laned), strict=True)
    if any(x is not None for x in Xq):
        Xq = [x if q is None else q for x, q in zip(X, Xq, strict=True)]
    if any(w is not None for w in weights):
        one = lambda x, w: jnp.ones((), x.dtype) if w is None else w.astype(x.dtype)
        weights = [jnp.broadcast_to(one(x, w), (*x.shape[:-1], 1)) for x, w in zip(X, weights, strict=True)]
    together = lambda parts: None if parts[0] is None else jnp.concatenate(parts, -2)
    return jnp.concatenate(X, -2), together(Xq), together(weights)


def _alike(trees, laned):
    """Gives lanes to all trees if any has them."""
    if not any(laned):
        return trees
    lanes = next(jax.tree.leaves(tree)[0].shape[0] for tree, own in zip(trees, laned, strict=True) if own)
    spread = lambda tree: jax.tree.map(lambda x: jnp.broadcast_to(x, (lanes, *x.shape)), tree)
    return [tree if own else spread(tree) for tree, own in zip(trees, laned, strict=True)]


def rows_shape(layout: Layout, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes of the row axes of a data operand of this shape."""
    return _rows_shape(layout, tuple(shape))


@functools.lru_cache(maxsize=4096)
def _rows_shape(layout, shape):
    return jax.eval_shape(layout.rows, jax.ShapeDtypeStruct(shape, jnp.float32)).shape[1:-1]


@functools.partial(jax.jit, static_argnames=("layout", "shape"))
def _row_weights(layout, weights, shape):
    return layout.row_weights(weights, shape)


def _with_means(gram) -> tuple[Gathered, jax.Array]:
    """A Gram with its means, and the statistics for `Shown`."""
    mean_X, mean_Xq, statistics = _means(gram)
    return Gathered(gram, mean_X, mean_Xq, gram.count), statistics


@numpy_or_jit()
def _means(gram):
    mean_X, mean_Xq = gram.mean_X, gram.mean_Xq
    return mean_X, mean_Xq, Shown.reduced(gram.diagonal, mean_X, mean_Xq, gram.count)


@functools.partial(jax.jit, static_argnames=("layout", "laned"))
def _used(layout, x, weights, laned):
    """The number of rows of each matrix (B,) that are not 0, or the sum of their weights."""

    def one(x, weights):
        shown = jnp.any(layout.rows(x) != 0, -1)
        counted = shown.astype(jnp.float32) if weights is None else jnp.where(shown, weights, 0)
        return counted.sum(range(1, counted.ndim))

    return over_lanes(one, (x, weights), (laned, False))


@functools.partial(jax.jit, static_argnames="laned")
def _centred(gram, laned):
    return over_lanes(lambda gram: each(Gram.centred, gram), (gram,), (laned,))


@functools.partial(jax.jit, static_argnames=("layout", "laned"))
def _flat_rows(layout, x, xq, weights, picked, laned):
    """Rows (B, rows, in), and their weights (B or 1, rows, 1). `laned`: whether xq, and whether picked have lanes."""

    def one(x, xq, weights, picked):
        def flat(x):
            X = at_least_float32(layout.rows(x) if picked is None else layout.picked(x, picked))
            return X.reshape(X.shape[0], math.prod(X.shape[1:-1]), X.shape[-1])

        flat_weights = None
        if weights is not None:
            flat_weights = weights.reshape(len(weights), -1, 1)
            flat_weights = flat_weights if picked is None else flat_weights[:, picked]
        return flat(x), None if xq is None else flat(xq), flat_weights

    return over_lanes(one, (x, xq, weights, picked), (False, laned[0], False, laned[1]))


@functools.partial(jax.jit, static_argnames=("laned", "centred"))
def _weighted(parts, laned, centred) -> tuple[Gathered, jax.Array]:
    """All rows times the square roots of their weights (B or 1, rows, 1), so that sums of squares are weighted.

    The statistics for `Shown` come with them.
    """
    X, Xq, weights = _concatenated(parts, laned)
    one = lambda X, Xq, weights: _weighted_of_one(X, Xq, weights, centred)
    some = any(laned)
    gathered = over_lanes(one, (X, Xq, weights), (some, some and Xq is not None, some and weights is not None))
    return gathered, Shown.reduced(gathered.data.diagonal, gathered.mean_X, gathered.mean_Xq, gathered.rows)


def _weighted_of_one(X, Xq, weights, centred):
    weight = jnp.ones((1, X.shape[1], 1), X.dtype) if weights is None else weights.astype(X.dtype)
    counted = lambda X: X if weights is None else jnp.where(weight > 0, X, 0)  # removes NaN in rows of weight 0 as well
    X, Xq = counted(X), None if Xq is None else counted(Xq)
    count = weight.sum((1, 2))
    mean = lambda X: jnp.sum(X * weight, 1) / jnp.where(count > 0, count, 1)[:, None]

    def prepared(X):
        X = X - mean(X)[:, None] if centred else X
        return X if weights is None else X * jnp.sqrt(weight)

    rows = Rows(prepared(X), None if Xq is None else prepared(Xq))
    mean_X = mean(X)
    return Gathered(rows, mean_X, mean_X if Xq is None else mean(Xq), jnp.broadcast_to(count, X.shape[:1]))

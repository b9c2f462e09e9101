"""The walk: batches x sites, both networks together. The only loop over a network.

For each stop (sites that read the same input): advance all batches to it, sum the Gram over them, solve each site, put the
quantized weight into the quantized network. One forward pass of each network in all, whatever the depth.
"""

import collections
import functools
import operator
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..matrix import Gram, Info, QTensor, Recipe, Rows, Solution, code_dtype, raise_on, solve_all
from ..matrix.each import each
from ..matrix.gram import at_least_float32
from ..matrix.layout import Layout
from .sites import CASTS, Site
from .stream import Stream


class Walked(NamedTuple):
    """What a walk found."""

    tensors: dict[str, QTensor]
    info: dict[str, Info]
    output_error: list[
        float
    ]  # per output leaf of the model: relative error on the calibration data; nan if not floating
    peak: int  # bytes of live activations, at most


def stops(sites: Sequence[Site]) -> list[list[int]]:
    """Numbers of the sites that read the same input, in the order of execution."""
    groups: dict = {}
    for number, site in enumerate(sites):
        groups.setdefault(site.reads, []).append(number)
    return sorted(groups.values(), key=lambda numbers: sites[numbers[0]].index)


def walk(
    streams: Sequence[Stream],
    recipes: dict[str, Recipe],
    key: jax.Array | None,
    report: Callable[[str, float], None] = lambda path, error: None,
) -> Walked:
    """Quantizes every site.

    Args:
        streams: the batches, one stream per shape; their stops correspond.
        recipes: by path of the parameter.
        key: for roundings that draw; folded by path and by number of the site within its parameter.
        report: told the path and the relative error of each site that is done.
    """
    first = streams[0]
    waiting = collections.Counter(site.path for stop in first.stops for site in stop)
    parts: dict[str, list[tuple[Site, Solution]]] = {}
    tensors, info = {}, {}
    for number, stop in enumerate(first.stops):
        for stream in streams:
            stream.advance(number)
        gather = _Gather(streams, number)
        for position, site in enumerate(stop):
            recipe, done = recipes[site.path], parts.setdefault(site.path, [])
            W = site.layout.matrices(site.chain(first.fixed[first.program.params[site.leaf]]))
            draw = None if key is None else jax.random.fold_in(key, zlib.crc32(site.path.encode()))
            draw = None if draw is None else jax.random.fold_in(draw, len(done))
            recipe.refuse(gather.count, W.shape[1], site.path)
            data = gather(recipe, W.shape)
            solution = solve_all(at_least_float32(W), data, recipe, draw)
            raise_on(solution.info, recipe, site.path, data)
            operand = _operand(solution.q, site.layout, _casts(first, site))
            for stream in streams:
                stream.install(stream.stops[number][position], operand)
            done.append((site, solution._replace(q=None, codes=solution.codes.astype(code_dtype(recipe.grid)))))
            if len(done) == waiting[site.path]:
                leaf = first.program.params[site.leaf].aval
                tensors[site.path] = _assemble(done, leaf.shape, leaf.dtype, recipe)
                info[site.path] = Info.join([solution.info for _, solution in parts.pop(site.path)])
            report(site.path, float(solution.info.relative_error))
    return Walked(tensors, info, _output_error(streams), sum(stream.peak for stream in streams))


class _Gather:
    """The data of one stop, as a Gram or as rows, each made once and when first asked for."""

    def __init__(self, streams: Sequence[Stream], number: int):
        self.parts = [(stream.stops[number][0].layout, stream, stream.stops[number][0]) for stream in streams]
        self.made: dict[type, Gram | Rows] = {}

    def __call__(self, recipe: Recipe, shape: tuple[int, int, int]) -> Gram | Rows:
        _, n, out = shape
        kind = Rows if recipe.prefers_rows(self.count, n, out) else Gram
        if kind not in self.made:
            self.made[kind] = self.rows() if kind is Rows else self.gram()
        return self.made[kind]

    @functools.cached_property
    def count(self) -> int:
        return sum(int(np.prod(rows_shape(layout, x.shape))) for layout, x, *_ in self.batches())

    def batches(self):
        for layout, stream, site in self.parts:
            for x, xq, weights in stream.inputs(site):
                yield layout, x, xq, _fit(weights, rows_shape(layout, x.shape), site.path)

    def gram(self) -> Any:
        return functools.reduce(_merge, (_gram(*batch) for batch in self.batches()))

    def rows(self):
        collected = [_flat_rows(x, xq, weights, layout) for layout, x, xq, weights in self.batches()]
        return jax.tree.map(lambda *parts: jnp.concatenate(parts, 1), *collected)


@functools.partial(jax.jit, static_argnames="layout")
def _gram(layout, x, xq, weights):
    return each(lambda X, Xq: Gram.from_data(X, Xq, weights), layout.rows(x), None if xq is None else layout.rows(xq))


@jax.jit
def _merge(total, gram):
    return total.merge(gram)


@functools.partial(jax.jit, static_argnames="layout")
def _flat_rows(x, xq, weights, layout):
    def flat(x):
        X = at_least_float32(layout.rows(x))
        X = X if weights is None else X * jnp.sqrt(weights.astype(X.dtype))[..., None]
        return X.reshape(X.shape[0], -1, X.shape[-1])

    return Rows(flat(x), None if xq is None else flat(xq))


@functools.lru_cache(maxsize=4096)
def rows_shape(layout: Layout, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The axes of rows that a data operand of this shape has in a layout."""
    return jax.eval_shape(layout.rows, jax.ShapeDtypeStruct(shape, jnp.float32)).shape[1:-1]


def _fit(weights, rows, path):
    """Weights of a batch as weights of a site's rows; leading axes of the rows are those of the weights."""
    if weights is None:
        return None
    shape = weights.shape
    if shape == rows[: len(shape)]:
        return jnp.broadcast_to(weights.reshape(shape + (1,) * (len(rows) - len(shape))), rows)
    if rows and shape[0] == rows[0]:  # one row per sample: it counts if any of its positions does
        return _fit(weights.reshape(shape[0], -1).max(1), rows, path)
    if rows and rows[0] % weights.size == 0:  # samples merged with positions, or with what comes after them
        return _fit(jnp.repeat(weights.ravel(), rows[0] // weights.size), rows, path)
    raise ValueError(
        f"Row weights of shape {shape} do not fit the rows {rows} that reach {path}: the leading axes of the weights must "
        "be those of the layer's input, such as (batch,) or (batch, position)."
    )


def _casts(stream, site):
    """The types a quantized weight passes through on its way from the parameter to the product."""
    steps = [eqn.outvars[position].aval.dtype for eqn, position in site.chain.steps if eqn.primitive.name in CASTS]
    return tuple(str(d) for d in (stream.program.params[site.leaf].aval.dtype, *steps))


@functools.partial(jax.jit, static_argnames=("layout", "casts"))
def _operand(q, layout, casts):
    q = layout.operand(q)
    for dtype in casts:
        q = q.astype(dtype)
    return q


def _assemble(done, shape, dtype, recipe) -> QTensor:
    """The tensor of a parameter from the solutions of its sites."""
    step, zero = (_full(done, shape, lambda s: getattr(s, name)) for name in ("step", "zero"))
    codes = _full(done, shape, lambda s: s.codes.astype(s.step.dtype))  # only floats can be scattered
    runs = tuple(slice(None, None, run) for run in _runs(done, shape))
    rotated = None if recipe.rotation is None else (recipe.rotation, done[0][0].layout)
    return QTensor(codes.astype(code_dtype(recipe.grid)), step[runs], zero[runs], recipe.grid, np.dtype(dtype), rotated)


def _full(done, shape, read):
    """One array of the parameter's shape from arrays (B, groups or in, out or 1) of its sites."""
    matrices = ((site, _to_matrices(read(solution), site.layout.dims)) for site, solution in done)
    return functools.reduce(operator.add, (site.chain.scatter(site.layout.operand(M), shape) for site, M in matrices))


def _to_matrices(x, dims):
    B, n, out = dims
    return jnp.broadcast_to(jnp.repeat(x, n // x.shape[1], 1), (B, n, out))


_known_runs: dict = {}


def _runs(done, shape) -> tuple[int, ...]:
    """Along each axis of a parameter, the length of the runs that share one step.

    Found by sending a number for each step down the same way as the steps; the answer depends on structure alone.
    """
    key = (shape, *((site.chain.key(), site.layout, solution.step.shape) for site, solution in done))
    if key not in _known_runs:
        offset, numbered = 0, []
        for site, solution in done:
            size = solution.step.size
            numbers = jnp.arange(offset, offset + size, dtype=jnp.float32).reshape(solution.step.shape)
            numbered.append((site, numbers))
            offset += size
        labels = np.asarray(_full(numbered, shape, lambda numbers: numbers))
        changes = (np.flatnonzero(np.diff(labels, axis=a).any(axis=_others(labels, a))) + 1 for a in range(labels.ndim))
        _known_runs[key] = tuple(int(np.gcd.reduce([*c, labels.shape[a]])) for a, c in enumerate(changes))
    return _known_runs[key]


def _others(x, axis):
    return tuple(a for a in range(x.ndim) if a != axis)


def _output_error(streams) -> list[float]:
    pairs = (zip(exact, quantized, strict=True) for stream in streams for exact, quantized in stream.finish())
    sums = sum(np.array([_square_error(a, b) for a, b in batch]).reshape(-1, 2) for batch in pairs)
    return [float(np.sqrt(error / energy)) if energy else float("nan") for error, energy in np.asarray(sums)]


@jax.jit
def _square_error(a, b):
    if not jnp.issubdtype(a.dtype, jnp.floating):
        return jnp.zeros(2)
    a, b = at_least_float32(a), at_least_float32(b)
    return jnp.stack([jnp.sum((a - b) ** 2), jnp.sum(a**2)])

"""The walk: batches x sites, both networks together. The only loop over a network.

For each stop (sites that read the same input): advance all batches to it, sum the Gram over them, solve each site, put the
quantized weight into the quantized network. One forward pass of each network in all, whatever the depth.
"""

import collections
import dataclasses
import functools
import operator
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..matrix import Devices, Info, QTensor, Recipe, Solution, code_dtype, raise_on, solve_coupled, solve_sharded
from ..matrix.gram import as_gram, at_least_float32, matmul
from .activation import Rounded, choose
from .curvature import Coupling
from .gather import Gather, fit
from .sites import CASTS, Site
from .stream import Stream


class Walked(NamedTuple):
    """What a walk found."""

    tensors: dict[str, QTensor]
    info: dict[str, Info]
    biases: dict[str, jax.Array]  # corrected, by path of the parameter
    inputs: dict[str, list[Rounded]]  # by path of the kernel, one for each of its uses in order
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
    block: Callable[[Site], Any] | None = None,
    refresh: Callable[[Stream, int], Stream] | None = None,
    coupled: dict[tuple[int, int], tuple[Coupling, jax.Array]] | None = None,
    devices: Devices | None = None,
) -> Walked:
    """Quantizes every site.

    Args:
        streams: the batches, one stream per shape; their stops correspond.
        recipes: by path of the parameter.
        key: for roundings that draw; folded by path and by number of the site within its parameter.
        report: told the path and the relative error of each site that is done.
        block: names the block of a site; where it changes, the reference starts anew from the quantized network. None
            for a reference that is the float network throughout.
        refresh: takes the stream of the stop before to one over other batches, for each stop but the first.
        coupled: by number of the stop and position in it, how neurons are coupled, and the curvature F of that site.
        devices: over which the neurons of each site are split.
    """
    first = streams[0]
    waiting = collections.Counter(site.path for stop in first.stops for site in stop)
    parts: dict[str, list[tuple[Site, Solution]]] = {}
    tensors, info, biases, inputs, here = {}, {}, {}, {}, None
    for number, stop in enumerate(first.stops):
        if refresh is not None and number:
            streams = [refresh(stream, number) for stream in streams]
        for stream in streams:
            stream.advance(number)
        if block is not None and (here is None or block(stop[0]) != here):
            here = block(stop[0])
            for stream in streams:
                stream.rebase()
        rounded = _round_inputs(streams, number)
        gather = Gather(streams, number, key, devices)
        for position, site in enumerate(stop):
            recipe, done = recipes[site.path], parts.setdefault(site.path, [])
            W = at_least_float32(site.layout.matrices(site.chain(streams[0].value(first.program.params[site.leaf]))))
            draw = None if key is None else jax.random.fold_in(key, zlib.crc32(site.path.encode()))
            draw = None if draw is None else jax.random.fold_in(draw, len(done))
            recipe.refuse(gather.count, W.shape[1], site.path)
            gathered = gather(recipe, W.shape, centred=site.bias is not None)
            if coupled and (number, position) in coupled:
                how, F = coupled.pop((number, position))
                solution = solve_coupled(W, as_gram(gathered.data), F, recipe, draw, how.damping, how.block)
            else:
                solution = solve_sharded(W, gathered.data, recipe, draw, devices)
            raise_on(solution.info, recipe, site.path, gathered.data)
            operand = _operand(solution.q, site.layout, _casts(first, site))
            for stream in streams:
                stream.replace(stream.stops[number][position].weight, operand)
            if site.bias is not None:
                error, lost = _mean_error(gathered, W, solution.q)
                solution = solution._replace(
                    info=dataclasses.replace(solution.info, energy=solution.info.energy + lost)
                )
                _correct(streams, number, position, error, biases)
            if rounded is not None:
                inputs.setdefault(site.path, {})[site.index] = rounded
            done.append((site, solution._replace(q=None, codes=solution.codes.astype(code_dtype(recipe.grid)))))
            if len(done) == waiting[site.path]:
                leaf = first.program.params[site.leaf].aval
                tensors[site.path] = _assemble(done, leaf.shape, leaf.dtype, recipe)
                info[site.path] = Info.join([solution.info for _, solution in parts.pop(site.path)])
            report(site.path, float(solution.info.relative_error))
    peak = sum(stream.peak for stream in streams)
    in_order = {path: [uses[index] for index in sorted(uses)] for path, uses in inputs.items()}
    return Walked(tensors, info, biases, in_order, _output_error(streams), peak)


def _round_inputs(streams, number) -> Rounded | None:
    """Chooses the grid of a stop's input and rounds it, if it is to be."""
    settings, layout, path = (getattr(streams[0].stops[number][0], name) for name in ("activations", "layout", "path"))
    if settings is None:
        return None
    settings.refuse(layout, path)

    def batches():
        for stream in streams:
            for x, weights in stream.sources(stream.stops[number][0].data):
                yield x, fit(weights, x.shape[:-1], path)

    rounded = choose(settings, layout, batches)
    for stream in streams:
        stream.round_inputs(stream.stops[number][0].data, functools.partial(_rounded, rounded))
    return rounded


@jax.jit
def _rounded(rounded, x):
    return rounded(x)


@jax.jit
def _mean_error(gathered, W, q):
    """The mean error of each neuron (B, out), and the energy of its mean over all rows."""
    mean = lambda x, W: matmul(x[:, None], W)[:, 0]
    exact = mean(gathered.mean_X, W)
    return mean(gathered.mean_Xq, q) - exact, jnp.sum(gathered.rows[:, None] * exact**2)


def _correct(streams, number, position, error, biases):
    """Takes a mean error off a bias: in the quantized network, and in the parameter that holds it."""
    for stream in streams:
        site = stream.stops[number][position]
        bias = site.bias
        change = bias.change(site, error, stream.value)
        old = stream.replaced.get(bias.operand, stream.value(bias.operand))
        stream.replace(bias.operand, (at_least_float32(old) + change).astype(old.dtype))
        if stream is streams[0]:
            variable = stream.program.params[bias.leaf]
            leaf = biases.get(bias.path, at_least_float32(stream.value(variable)))
            biases[bias.path] = leaf + bias.chain.scatter(change.astype(leaf.dtype), leaf.shape, scaled=True)


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
    step, zero = (_full(done, shape, lambda s: getattr(s, name), name == "step") for name in ("step", "zero"))
    codes = _full(done, shape, lambda s: s.codes.astype(s.step.dtype))  # only floats can be scattered
    runs = tuple(slice(None, None, run) for run in _runs(done, shape))
    rotated = None if recipe.rotation is None else (recipe.rotation, done[0][0].layout)
    return QTensor(codes.astype(code_dtype(recipe.grid)), step[runs], zero[runs], recipe.grid, np.dtype(dtype), rotated)


def _full(done, shape, read, scaled=False):
    """One array of the parameter's shape from arrays (B, groups or in, out or 1) of its sites."""
    matrices = ((site, _to_matrices(read(solution), site.layout.dims)) for site, solution in done)
    parts = (site.chain.scatter(site.layout.operand(M), shape, scaled) for site, M in matrices)
    return functools.reduce(operator.add, parts)


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

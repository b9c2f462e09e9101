"""The walk: batches x sites, both networks together. The only loop over a network.

For each stop (sites that read the same input): advance all batches to it, sum the Gram over them, solve each site, put the
quantized weight into the quantized network. One forward pass of each network in all, whatever the depth.

A sweep is the same walk with several quantized networks beside the float one: on tracks, one after the other at each stop,
and within a track in lanes, by one program.
"""

import collections
import dataclasses
import functools
import operator
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ..matrix import (
    Bucket,
    Devices,
    Gram,
    Info,
    QTensor,
    Recipe,
    Solution,
    all_well,
    assign_buckets,
    code_dtype,
    cut,
    fill,
    raise_on,
    slice_width,
    solve_coupled,
    solve_sharded,
    solve_sliced,
)
from ..matrix.arrays import at_least_float32, matmul
from ..matrix.gram import as_gram
from ..matrix.host import numpy_or_jit
from ..matrix.lanes import lane, over_lanes
from ..model.random_keys import fold_in
from ..model.sites import CASTS, Site
from ..scalar.exponent import reduced
from .activation import ActivationQuantizer, Activations, choose, round_by
from .assemble import tensor_of
from .curvature import Coupling
from .gather import Gather, Joint
from .output_error import Comparison, OutputError
from .progress import SILENCE, Report
from .site_result import SiteRequest, SiteResult
from .stops import Place, served
from .stream import Stream


class TrackSettings(NamedTuple):
    """The settings of the quantized networks of one track. With lanes, every array has a leading axis of them."""

    recipes: dict[str, Recipe]  # by path of the parameter
    activations: dict[str, Activations | None]  # likewise
    key: jax.Array | None  # for roundings and patches that draw; folded by path and by number of the site within it
    coupled: dict[tuple[int, int], tuple[Coupling, jax.Array]]  # by stop and position in it: how, and the curvature F
    lanes: tuple[str, ...] | None = None  # a name for each; None for one network without lanes


class CalibrationResult(NamedTuple):
    """The results of a walk on one track. With lanes, every array has a leading axis of them."""

    tensors: dict[str, QTensor]
    info: dict[str, Info]
    biases: dict[str, jax.Array]  # corrected, by path of the parameter
    inputs: dict[str, list[ActivationQuantizer]]  # by path of the kernel, one for each of its uses in order
    output_error: OutputError  # of each output array, on the calibration data


class SiteStore(Protocol):
    """A store of the sites of an earlier run; of one track without lanes. Sites are numbered by stop and position."""

    def read(self, stop: int, position: int, asked: SiteRequest) -> SiteResult | None:
        """A site that was solved before."""
        ...

    def write(self, stop: int, position: int, solved: SiteResult) -> None:
        """Keeps a site."""
        ...


class _Stop(NamedTuple):
    """A stop that all streams have been brought to, and what it shares with the others of the run."""

    streams: Sequence[Stream]
    number: int
    uses: dict[Place, list[Place]]  # as of `served`
    waiting: dict[str, int]  # by path, how many matrices make up the parameter
    report: Report
    devices: Devices | None
    kept: SiteStore | None

    @property
    def first(self) -> Stream:
        """The stream that values of the model are read from."""
        return self.streams[0]

    @property
    def sites(self) -> Sequence[Site]:
        """Its sites, of the first stream."""
        return self.first.stops[self.number]


class _Track:
    """The results of a track so far, and the buckets that its sites are solved in."""

    def __init__(self, number: int, making: TrackSettings):
        self.number, self.making, self.laned = number, making, making.lanes is not None
        self.parts: dict[str, list[tuple[Site, Solution]]] = {}
        self.tensors: dict[str, QTensor] = {}
        self.info: dict[str, Info] = {}
        self.biases: dict[str, jax.Array] = {}
        self.inputs: dict[str, dict[int, ActivationQuantizer]] = {}
        self.buckets: dict[Place, Bucket] = {}

    def lift(self, f: Callable) -> Callable:
        """A function of the arrays of one network, for those of this track."""
        return jax.vmap(f) if self.laned else f


def walk(
    streams: Sequence[Stream],
    makings: Sequence[TrackSettings],
    report: Report = SILENCE,
    block: Callable[[Site], Any] | None = None,
    refresh: Callable[[Stream, int], Stream] | None = None,
    devices: Devices | None = None,
    kept: SiteStore | None = None,
) -> tuple[list[CalibrationResult], int]:
    """Quantizes every site.

    Args:
        streams: the batches, one stream per shape; their stops correspond, and each has a track for each of `makings`.
        makings: the settings of each track.
        report: told of each site that is done on a track, and of its relative error, the mean over its lanes.
        block: names the block of a site; where it changes, the reference starts anew from the quantized network. None
            for a reference that is the float network throughout.
        refresh: takes the stream of the stop before to one over other batches, for each stop but the first.
        devices: over which the neurons of each site are split.
        kept: has sites that need not be solved again, and takes those that are; left out, all are solved.

    Returns:
        What was found on each track, and the bytes of live activations, at most.
    """
    first, here = streams[0], None
    uses = served(first.stops)
    waiting = collections.Counter(first.stops[number][position].path for number, position in uses)
    tracks = [_Track(number, making) for number, making in enumerate(makings)]
    for track in tracks if devices is None else ():
        track.buckets = _buckets(first, uses, track.making)
    for number, stop in enumerate(first.stops):
        known = [
            kept and kept.read(number, position, _asked(stop, position, makings[0])) for position in range(len(stop))
        ]
        report.doing("gathering")
        if refresh is not None and number and (None in known or number == len(first.stops) - 1):
            before, streams = streams, [refresh(stream, number) for stream in streams]
            for stream in before:
                stream.let_go()
        for stream in streams:
            stream.advance(number)
        if block is not None and (here is None or block(stop[0]) != here):
            here = block(stop[0])
            for stream in streams:
                stream.rebase()
        for track in tracks:
            _visit(_Stop(streams, number, uses, waiting, report, devices, kept), track, known)
    errors = _output_error(streams, tracks)
    in_order = lambda inputs: {path: [by_use[use] for use in sorted(by_use)] for path, by_use in inputs.items()}
    parts = zip(tracks, errors, strict=True)
    walked = [CalibrationResult(t.tensors, t.info, t.biases, in_order(t.inputs), error) for t, error in parts]
    return walked, sum(stream.peak for stream in streams)


def _buckets(first, uses, making):
    """The buckets of all sites that are solved alone."""
    problems = {}
    for place in uses:
        site = first.stops[place[0]][place[1]]
        size, recipe = site.layout.dims, making.recipes[site.path]
        if place not in making.coupled and not _in_slices(size, recipe, None, None, making.lanes):
            problems[place] = size, site.data in first.forks, recipe
    return assign_buckets(problems)


def _asked(stop, position, making) -> SiteRequest:
    """The demands on a site; the input of a stop is rounded as that of its first one."""
    site, first = stop[position], stop[0]
    return SiteRequest(
        site.layout.dims,
        making.recipes[site.path],
        site.bias is not None,
        None if first.activations is None else making.activations[first.path],
        first.layout,
    )


def _visit(stop, track, known):
    """Quantizes the sites of one stop on one track, those that are not known. A shared matrix waits for its last use."""
    rounded = _round_inputs(stop, track, next((one for one in known if one is not None), None))
    at = functools.cache(lambda number: Gather(stop.streams, number, track.making.key, stop.devices, track.number))
    gather = functools.cache(lambda *numbers: at(*numbers) if len(numbers) == 1 else Joint(list(map(at, numbers))))
    for position, site in enumerate(stop.sites):
        if rounded is not None:
            track.inputs.setdefault(site.path, {})[site.use] = rounded
        place = stop.number, position
        if place not in stop.uses:
            continue
        solved, places = known[position], stop.uses[place]
        if solved is None:
            stop.report.doing("gathering")
            data = gather(*dict.fromkeys(number for number, _ in places))
            solved = _solved(stop, position, track, data)._replace(rounded=rounded)
            if stop.kept is not None:
                stop.kept.write(*place, solved)
        _take(stop, position, track, solved)
        stop.report.done(float(jnp.mean(solved.solution.info.relative_error)))


def _solved(stop, position, track, gather) -> SiteResult:
    """Solves a site."""
    site, making, place = stop.sites[position], track.making, (stop.number, position)
    recipe = making.recipes[site.path]
    W = site.matrices(stop.first.value(stop.first.program.params[site.leaf]))
    draw = None if making.key is None else fold_in(making.key, zlib.crc32(site.path.encode()))
    draw = None if draw is None else fold_in(draw, len(track.parts.get(site.path, ())))
    recipe.refuse(gather.count, W.shape[1], site.path)
    gathered = gather(recipe, W.shape, centred=site.bias is not None)
    stop.report.doing("solving")
    coupled = making.coupled.get(place)
    solve: Callable = functools.partial(_solve_lanes, data_laned=gather.laned) if track.laned else _solve
    if _in_slices(W.shape, recipe, coupled, stop.devices, track.laned):
        solve = _solve_slices
    bucket = track.buckets.get(place) if isinstance(gathered.data, Gram) else None
    weights, data, count = W, gathered.data, None
    if bucket is not None:
        weights, data, count = *fill(W, data, bucket), jnp.asarray(W.shape[-1])
    solution = solve(weights, data, recipe, draw, coupled, stop.devices, count)
    _raise_on(solution.info, recipe, site.path, data, making.lanes, gather.laned)
    solution = cut(solution, W.shape, code_dtype(recipe.grid))
    info = solution.info
    if gathered.used is not None:
        lanes = (len(making.lanes or ()),) * track.laned
        info = dataclasses.replace(info, rows=jnp.broadcast_to(gathered.used, (*lanes, *W.shape[:1])))
    solution = solution._replace(info=info)
    if site.bias is None:
        return SiteResult(solution, None, None)
    means = gathered.mean_X, gathered.mean_Xq, gathered.rows
    error, lost = _mean_error(means, W, solution.q, solution.info.exponent, (gather.laned, track.laned))
    info = dataclasses.replace(solution.info, energy=solution.info.energy + lost)
    return SiteResult(solution._replace(info=info), error, None)


def _take(stop, position, track, solved):
    """Puts a quantized weight into the quantized network, and keeps what the result needs of it."""
    first, site, solution = stop.first, stop.sites[position], solved.solution
    operand = _operand(solution.q, site.layout, _casts(first, site), track.laned)
    for stream in stop.streams:
        for variable in dict.fromkeys(stream.stops[n][i].weight for n, i in stop.uses[stop.number, position]):
            stream.replace(variable, operand, track.number)
    if solved.error is not None:
        _correct(stop, position, solved.error, track)
    done = track.parts.setdefault(site.path, [])
    done.append((site, solution._replace(q=None)))
    if len(done) == stop.waiting[site.path]:
        leaf = first.program.params[site.leaf].aval
        recipe = track.making.recipes[site.path]
        track.tensors[site.path] = tensor_of(done, leaf.shape, leaf.dtype, recipe, track.laned)
        infos = [solution.info for _, solution in track.parts.pop(site.path)]
        track.info[site.path] = track.lift(Info.join)(infos)


def _in_slices(size, recipe, coupled, devices, laned) -> bool:
    return not (coupled or devices or laned) and slice_width(size, recipe) < size[-1]


def _solve_slices(W, data, recipe, key, *_) -> Solution:
    """The solution of one site, a run of neurons at a time."""
    return solve_sliced(W, data, recipe, key, code_dtype(recipe.grid))


def _solve(W, data, recipe, key, coupled, devices, count) -> Solution:
    """The solution of one site, of whose neurons `count` are real, all where that is None."""
    if coupled is None:
        return solve_sharded(W, data, recipe, key, devices, count)
    how, F = coupled
    return solve_coupled(W, as_gram(data), F, recipe, key, how.damping, how.block)


@functools.partial(jax.jit, static_argnames=("devices", "data_laned"))
def _solve_lanes(W, data, recipe, key, coupled, devices, count, data_laned) -> Solution:
    """The solutions of one site, by lane."""
    one = lambda W, data, recipe, key, coupled, count: _solve(W, data, recipe, key, coupled, devices, count)
    laned = False, data_laned, True, key is not None, coupled is not None, False
    return over_lanes(one, (W, data, recipe, key, coupled, count), laned)


def _raise_on(info, recipe, name, data, lanes, data_laned):
    """`raise_on`, which names the first lane that something is wrong with."""
    if lanes is None:
        return raise_on(info, recipe, name, data)
    for i in map(int, np.flatnonzero(~np.asarray(all_well(info, data)))):
        own = lane(data, i) if data_laned else data
        raise_on(lane(info, i), lane(recipe, i), f"{name} ({lanes[i]})", own)
    return None


def _round_inputs(stop, track, known) -> ActivationQuantizer | None:
    """Chooses the grid of a stop's input and rounds it, if it is to be; as is known where its first site is."""
    site = stop.sites[0]
    if site.activations is None:
        return None
    settings = track.making.activations[site.path]
    settings.refuse(site.layout, site.path)
    tap = site.data
    laned = track.laned, stop.first.has_lanes(tap.source, track.number)

    def batches():
        for stream in stop.streams:
            yield from stream.sources(stream.stops[stop.number][0].data, site.path, track.number)

    rounded = choose(settings, site.layout, batches, laned) if known is None else known.rounded
    for stream in stop.streams:
        stream.round_inputs(
            stream.stops[stop.number][0].data, track.number, functools.partial(_rounded, rounded, laned)
        )
    return rounded


@functools.partial(jax.jit, static_argnames="laned")
def _rounded(rounded, laned, x):
    return round_by(rounded, x, laned)


@functools.partial(jax.jit, static_argnames="laned")
def _mean_error(means, W, q, exponent, laned):
    """The mean error of each neuron (B, out), and the energy of its mean over all rows; `laned` are means and q.

    The energy in the unit of `Info`.
    """

    def one(W, means, q, exponent):
        mean_X, mean_Xq, rows = means
        mean = lambda x, W: matmul(x[:, None], W)[:, 0]
        exact = mean(mean_X, W)
        return mean(mean_Xq, q) - exact, jnp.sum(rows[:, None] * reduced(exact, exponent) ** 2)

    return over_lanes(one, (W, means, q, exponent), (False, *laned, laned[1]))


def _correct(stop, position, error, track):
    """Takes a mean error off a bias: in the quantized network, and in the parameter that holds it."""
    for stream in stop.streams:
        site = stream.stops[stop.number][position]
        bias = site.bias
        change = track.lift(lambda error, bias=bias, site=site, read=stream.value: bias.change(site, error, read))(
            error
        )
        old = stream.tracks[track.number].replaced.get(bias.operand)
        old = stream.value(bias.operand)[(None,) * track.laned] if old is None else old
        stream.replace(bias.operand, (at_least_float32(old) + change).astype(old.dtype), track.number)
        if stream is stop.first:
            leaf = at_least_float32(stream.value(stream.program.params[bias.leaf]))
            scatter = lambda x, bias=bias, shape=leaf.shape: bias.chain.scatter(x, shape, scaled=True)
            before = track.biases.get(bias.path, leaf[(None,) * track.laned])
            track.biases[bias.path] = before + track.lift(scatter)(change.astype(leaf.dtype))


def _casts(stream, site):
    """The types a quantized weight passes through on its way from the parameter to the product."""
    steps = [eqn.outvars[position].aval.dtype for eqn, position in site.chain.steps if eqn.primitive.name in CASTS]
    return tuple(str(d) for d in (stream.program.params[site.leaf].aval.dtype, *steps))


@numpy_or_jit("layout", "casts", "laned", unless=lambda q, layout, casts, laned: laned)
def _operand(q, layout, casts, laned):
    q = jax.vmap(layout.operand)(q) if laned else layout.operand(q)
    for dtype in casts:
        q = q.astype(jnp.dtype(dtype))
    return q


def _output_error(streams, tracks) -> list[OutputError]:
    """By track, how far the outputs are from those of the float network."""
    found: list[list[Comparison]] = [[] for _ in tracks]
    for stream in streams:
        for exact, quantized, weights in stream.finish():
            for track, outputs in zip(tracks, quantized, strict=True):
                lanes = (len(track.making.lanes or ()),) * track.laned
                found[track.number].append(Comparison.of(exact, outputs, lanes, weights))
    return [functools.reduce(operator.add, parts).error for parts in found]

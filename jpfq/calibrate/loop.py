"""The loop over layers: both networks advance together, and each layer is quantized when they reach it.

For each stop (the sites that read one input): advance all batches to it, sum the Gram over them, solve each site, put the
quantized weight into the quantized network. In total that is one forward pass of each network, whatever the depth.

A sweep is the same loop with several quantized networks beside the float one. They are on tracks, which take turns at each
stop; the networks of one track are its lanes, computed by one program under `vmap`.
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
    assign_buckets,
    code_dtype,
    cut,
    failures,
    fill,
    raise_on,
    slice_width,
    solve_coupled,
    solve_sharded,
    solve_sliced,
)
from ..matrix.arrays import at_least_float32
from ..matrix.gram import as_gram
from ..matrix.host import numpy_or_jit
from ..matrix.lanes import lane, over_lanes
from ..model.operands import Operand
from ..model.random_keys import fold_in
from ..model.sites import CASTS, Site
from .activation import ActivationQuantizer, Activations, choose, round_by
from .assemble import tensor_of
from .bias import mean_error
from .curvature import Coupling
from .gather import Gather, Joint
from .output_error import Comparison, OutputError
from .progress import SILENCE, Reporter
from .site_result import SiteRequest, SiteResult
from .stops import SiteIndex, matrix_uses
from .stream import Stream


class TrackSettings(NamedTuple):
    """The settings of a track: of one quantized network, or of several in lanes; then every array has a leading axis."""

    recipes: dict[str, Recipe]  # by path of the parameter
    activations: dict[str, Activations | None]  # likewise
    key: jax.Array | None  # for random roundings and patches; each site folds in its path and its index within that
    coupled: dict[SiteIndex, tuple[Coupling, jax.Array]]  # the settings and the curvature F of coupled sites
    lanes: tuple[str, ...] | None = None  # a name for each; None for a single network, without the leading axis


class CalibrationResult(NamedTuple):
    """The result of one track. With lanes, every array has a leading axis of them."""

    tensors: dict[str, QTensor]
    info: dict[str, Info]
    biases: dict[str, jax.Array]  # corrected, by path of the parameter
    inputs: dict[str, list[ActivationQuantizer]]  # by path of the kernel, one for each of its uses, in order
    output_error: OutputError  # of each output array, on the calibration data


class SiteStore(Protocol):
    """The sites that an earlier run has solved, for one track without lanes. The checkpoint of a run is one."""

    def read(self, stop: int, position: int, asked: SiteRequest) -> SiteResult | None:
        """The result of a site; None if it has not been solved yet."""
        ...

    def write(self, stop: int, position: int, solved: SiteResult) -> None:
        """Stores the result of a site."""
        ...


@dataclasses.dataclass(frozen=True)
class _Stop:
    """A stop that all streams have reached, and what all stops of the run have in common."""

    streams: Sequence[Stream]
    index: int
    uses: dict[SiteIndex, list[SiteIndex]]  # from `matrix_uses`
    matrix_counts: dict[str, int]  # by path, the number of matrices that make up the parameter
    reporter: Reporter
    devices: Devices | None
    store: SiteStore | None

    @property
    def first(self) -> Stream:
        """The stream from which values of the model are read."""
        return self.streams[0]

    @property
    def sites(self) -> Sequence[Site]:
        """Its sites, in the first stream."""
        return self.first.stops[self.index]


class _Track:
    """The results of a track so far, and the buckets in which its sites are solved."""

    def __init__(self, index: int, settings: TrackSettings):
        self.index, self.settings, self.laned = index, settings, settings.lanes is not None
        self.parts: dict[str, list[tuple[Site, Solution]]] = {}
        self.tensors: dict[str, QTensor] = {}
        self.info: dict[str, Info] = {}
        self.biases: dict[str, jax.Array] = {}
        self.inputs: dict[str, dict[int, ActivationQuantizer]] = {}
        self.buckets: dict[SiteIndex, Bucket] = {}

    def lift(self, f: Callable) -> Callable:
        """Maps `f`, a function of the arrays of one network, over the lanes if this track has any."""
        return jax.vmap(f) if self.laned else f


def calibrate(
    streams: Sequence[Stream],
    settings: Sequence[TrackSettings],
    reporter: Reporter = SILENCE,
    block: Callable[[Site], Any] | None = None,
    refresh: Callable[[Stream, int], Stream] | None = None,
    devices: Devices | None = None,
    store: SiteStore | None = None,
) -> tuple[list[CalibrationResult], int]:
    """Quantizes every site.

    Args:
        streams: the batches, one stream per shape; their stops correspond, and each has a track for each of `settings`.
        settings: those of each track.
        reporter: receives each site that is done on a track, and its relative error, averaged over lanes.
        block: the block of a site; where it changes, the reference restarts from the quantized network. None if the float
            network is the reference throughout.
        refresh: returns a stream of fresh batches from that of the previous stop; called at each stop but the first.
        devices: over which the neurons of each site are split.
        store: has sites that need not be solved again, and receives those that are solved; None solves all.

    Returns:
        The result of each track, and the largest number of bytes of live activations.
    """
    first, current = streams[0], None
    uses = matrix_uses(first.stops)
    matrix_counts = collections.Counter(first.stops[index][position].path for index, position in uses)
    tracks = [_Track(index, own) for index, own in enumerate(settings)]
    for track in tracks if devices is None else ():
        track.buckets = _buckets(first, uses, track.settings)
    for index, stop in enumerate(first.stops):
        stored = [
            None if store is None or isinstance(site, Operand) else store.read(index, i, _request(stop, i, settings[0]))
            for i, site in enumerate(stop)
        ]
        reporter.doing("gathering")
        if refresh is not None and index and (None in stored or index == len(first.stops) - 1):
            before, streams = streams, [refresh(stream, index) for stream in streams]
            for stream in before:
                stream.release()
        for stream in streams:
            stream.advance(index)
        if block is not None and isinstance(stop[0], Site) and (current is None or block(stop[0]) != current):
            current = block(stop[0])
            for stream in streams:
                stream.rebase()
        for track in tracks:
            _quantize_stop(_Stop(streams, index, uses, matrix_counts, reporter, devices, store), track, stored)
    errors = _output_error(streams, tracks)
    in_order = lambda inputs: {path: [by_use[use] for use in sorted(by_use)] for path, by_use in inputs.items()}
    parts = zip(tracks, errors, strict=True)
    results = [CalibrationResult(t.tensors, t.info, t.biases, in_order(t.inputs), error) for t, error in parts]
    return results, sum(stream.peak for stream in streams)


def _buckets(first, uses, settings):
    """The bucket of each site that is solved whole and by itself."""
    problems = {}
    for at in uses:
        site = first.stops[at[0]][at[1]]
        size, recipe = site.layout.dims, settings.recipes[site.path]
        if at not in settings.coupled and not _in_slices(size, recipe, None, None, settings.lanes):
            problems[at] = size, site.data in first.forks, recipe
    return assign_buckets(problems)


def _request(stop, position, settings) -> SiteRequest:
    """The request for one site. The input of a stop is rounded by the settings of its first site."""
    site, first = stop[position], stop[0]
    return SiteRequest(
        site.layout.dims,
        settings.recipes[site.path],
        site.bias is not None,
        None if first.activations is None else settings.activations[first.path],
        first.layout,
    )


def _quantize_stop(stop, track, stored):
    """Quantizes the sites of one stop on one track, except those in the store. A shared matrix waits for its last use."""
    quantizer = _round_inputs(stop, track, next((one for one in stored if one is not None), None))
    one = functools.cache(lambda index: Gather(stop.streams, index, track.settings.key, stop.devices, track.index))
    gather = functools.cache(lambda *stops: one(*stops) if len(stops) == 1 else Joint(list(map(one, stops))))
    for position, site in enumerate(stop.sites):
        if quantizer is not None:
            track.inputs.setdefault(site.path, {})[site.use] = quantizer
        at = stop.index, position
        if at not in stop.uses:
            continue
        solved, uses = stored[position], stop.uses[at]
        if solved is None:
            stop.reporter.doing("gathering")
            data = gather(*dict.fromkeys(index for index, _ in uses))
            solved = _solve_site(stop, position, track, data)._replace(rounded=quantizer)
            if stop.store is not None:
                stop.store.write(*at, solved)
        _install(stop, position, track, solved)
        stop.reporter.done(float(jnp.mean(solved.solution.info.relative_error)))


def _solve_site(stop, position, track, gather) -> SiteResult:
    """Solves one site."""
    site, settings, at = stop.sites[position], track.settings, (stop.index, position)
    recipe = settings.recipes[site.path]
    W = site.matrices(stop.first.value(stop.first.program.params[site.leaf]))
    draw = None if settings.key is None else fold_in(settings.key, zlib.crc32(site.path.encode()))
    draw = None if draw is None else fold_in(draw, len(track.parts.get(site.path, ())))
    recipe.refuse(gather.count, W.shape[1:], site.path)
    gathered = gather(recipe, W.shape, centred=site.bias is not None)
    stop.reporter.doing("solving")
    coupled = settings.coupled.get(at)
    solve: Callable = functools.partial(_solve_lanes, data_laned=gather.laned) if track.laned else _solve
    if _in_slices(W.shape, recipe, coupled, stop.devices, track.laned):
        solve = _solve_slices
    bucket = track.buckets.get(at) if isinstance(gathered.data, Gram) else None
    weights, data, count = W, gathered.data, None
    if bucket is not None:
        weights, data, count = *fill(W, data, bucket), jnp.asarray(W.shape[-1])
    solution = solve(weights, data, recipe, draw, coupled, stop.devices, count)
    _raise_on(solution.info, recipe, site.path, data, settings.lanes, gather.laned)
    solution = cut(solution, W.shape, code_dtype(recipe.grid))
    info = solution.info
    if gathered.used is not None:
        lanes = (len(settings.lanes or ()),) * track.laned
        info = dataclasses.replace(info, rows=jnp.broadcast_to(gathered.used, (*lanes, *W.shape[:1])))
    solution = solution._replace(info=info)
    if site.bias is None:
        return SiteResult(solution, None, None)
    means = gathered.mean_X, gathered.mean_Xq, gathered.rows
    error, lost = mean_error(means, W, solution.q, solution.info.exponent, (gather.laned, track.laned))
    info = dataclasses.replace(solution.info, energy=solution.info.energy + lost)
    return SiteResult(solution._replace(info=info), error, None)


def _install(stop, position, track, solved):
    """Puts a quantized weight into the quantized network, and records its solution on the track."""
    first, site, solution = stop.first, stop.sites[position], solved.solution
    operand = _operand(solution.q, site.layout, _casts(first, site), track.laned)
    for stream in stop.streams:
        for variable in dict.fromkeys(stream.stops[n][i].weight for n, i in stop.uses[stop.index, position]):
            stream.replace(variable, operand, track.index)
    if solved.error is not None:
        _correct(stop, position, solved.error, track)
    done = track.parts.setdefault(site.path, [])
    done.append((site, solution._replace(q=None)))
    if len(done) == stop.matrix_counts[site.path]:
        leaf = first.program.params[site.leaf].aval
        recipe = track.settings.recipes[site.path]
        track.tensors[site.path] = tensor_of(done, leaf.shape, leaf.dtype, recipe, track.laned)
        infos = [solution.info for _, solution in track.parts.pop(site.path)]
        track.info[site.path] = track.lift(Info.join)(infos)


def solve_one(W: jax.Array, data: Any, recipe: Recipe, key: jax.Array | None, devices: Devices | None) -> Solution:
    """The solution of one problem W (B, in, out) that is no site of a track, by a Gram."""
    if _in_slices(W.shape, recipe, None, devices, False):
        return _solve_slices(W, data, recipe, key)
    return solve_sharded(W, data, recipe, key, devices)


def _in_slices(size, recipe, coupled, devices, laned) -> bool:
    return not (coupled or devices or laned) and slice_width(size, recipe) < size[-1]


def _solve_slices(W, data, recipe, key, *_) -> Solution:
    """The solution of one site, a slice of its neurons at a time."""
    return solve_sliced(W, data, recipe, key, code_dtype(recipe.grid))


def _solve(W, data, recipe, key, coupled, devices, count) -> Solution:
    """The solution of one site. The first `count` neurons are real, the others padding; None means that all are real."""
    if coupled is None:
        return solve_sharded(W, data, recipe, key, devices, count)
    coupling, F = coupled
    return solve_coupled(W, as_gram(data), F, recipe, key, coupling.damping, coupling.block)


@functools.partial(jax.jit, static_argnames=("devices", "data_laned"))
def _solve_lanes(W, data, recipe, key, coupled, devices, count, data_laned) -> Solution:
    """The solutions of one site, one for each lane."""
    one = lambda W, data, recipe, key, coupled, count: _solve(W, data, recipe, key, coupled, devices, count)
    laned = False, data_laned, True, key is not None, coupled is not None, False
    return over_lanes(one, (W, data, recipe, key, coupled, count), laned)


def _raise_on(info, recipe, name, data, lanes, data_laned):
    """`raise_on`, with the name of the first lane that failed."""
    if lanes is None:
        return raise_on(info, recipe, name, data)
    for i in map(int, np.flatnonzero(np.asarray(failures(info, data)).any(0))):
        own = lane(data, i) if data_laned else data
        raise_on(lane(info, i), lane(recipe, i), f"{name} ({lanes[i]})", own)
    return None


def _round_inputs(stop, track, stored) -> ActivationQuantizer | None:
    """Rounds the input of a stop if its activations are quantized, by the levels in the store or else newly chosen ones."""
    site = stop.sites[0]
    if site.activations is None:
        return None
    settings = track.settings.activations[site.path]
    settings.check_layer(site.layout, site.path)
    tap = site.data
    laned = track.laned, stop.first.has_lanes(tap.source, track.index)
    lanes = len(track.settings.lanes or ()) or None

    def batches():
        for stream in stop.streams:
            yield from stream.sources(stream.stops[stop.index][0].data, site.path, track.index)

    quantizer = choose(settings, site.layout, batches, laned, lanes) if stored is None else stored.rounded
    for stream in stop.streams:
        stream.round_inputs(
            stream.stops[stop.index][0].data, track.index, functools.partial(_rounded, quantizer, laned, lanes)
        )
    return quantizer


@functools.partial(jax.jit, static_argnames=("laned", "lanes"))
def _rounded(quantizer, laned, lanes, x):
    return round_by(quantizer, x, laned, lanes)


def _correct(stop, position, error, track):
    """Subtracts a mean error from a bias: in the quantized network, and in the parameter that holds it."""
    for stream in stop.streams:
        site = stream.stops[stop.index][position]
        bias = site.bias
        change = track.lift(lambda error, bias=bias, site=site, read=stream.value: bias.change(site, error, read))(
            error
        )
        old = stream.tracks[track.index].replaced.get(bias.operand)
        old = stream.value(bias.operand)[(None,) * track.laned] if old is None else old
        stream.replace(bias.operand, (at_least_float32(old) + change).astype(old.dtype), track.index)
        if stream is stop.first:
            leaf = at_least_float32(stream.value(stream.program.params[bias.leaf]))
            scatter = lambda x, bias=bias, shape=leaf.shape: bias.chain.scatter(x, shape, scaled=True)
            before = track.biases.get(bias.path, leaf[(None,) * track.laned])
            track.biases[bias.path] = before + track.lift(scatter)(change.astype(leaf.dtype))


def _casts(stream, site):
    """The dtypes that a weight passes through between the parameter and the product."""
    steps = [eqn.outvars[position].aval.dtype for eqn, position in site.chain.steps if eqn.primitive.name in CASTS]
    return tuple(str(d) for d in (stream.program.params[site.leaf].aval.dtype, *steps))


@numpy_or_jit("layout", "casts", "laned", unless=lambda q, layout, casts, laned: laned)
def _operand(q, layout, casts, laned):
    q = jax.vmap(layout.operand)(q) if laned else layout.operand(q)
    for dtype in casts:
        q = q.astype(jnp.dtype(dtype))
    return q


def _output_error(streams, tracks) -> list[OutputError]:
    """The error of the outputs against those of the float network, by track."""
    found: list[list[Comparison]] = [[] for _ in tracks]
    for stream in streams:
        for exact, quantized, weights in stream.finish():
            for track, outputs in zip(tracks, quantized, strict=True):
                lanes = (len(track.settings.lanes or ()),) * track.laned
                found[track.index].append(Comparison.of(exact, outputs, lanes, weights))
    return [functools.reduce(operator.add, parts).error for parts in found]

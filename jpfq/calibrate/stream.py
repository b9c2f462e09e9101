"""Streams: batches of one shape as they advance through both networks, the float one and the one quantized so far.

Up to the first quantized site the two networks agree and are computed once. A value is freed after its last use.

There may be several quantized networks, on tracks. A track has one of them, or several that differ only in the numbers of
their settings: its lanes. The values of a track with lanes have a leading axis of them.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..model.compat import bind, is_literal
from ..model.operands import Operand
from ..model.program import Program
from ..model.segments import Segment
from ..model.sites import Site, Tap
from .liveness import forks, needs
from .offload import Offloaded
from .padding_check import OtherPadding, lookups
from .row_weights import Followed, RowWeights


class Networks(NamedTuple):
    """Values of one batch, by variable."""

    shared: dict  # where the networks agree
    reference: dict  # the network that the quantized one is fitted to
    quantized: list[dict]  # by track
    float: dict  # the float network; the same object as `reference` unless that restarts at each block

    @property
    def exact(self) -> list[dict]:
        """The networks with float weights."""
        return [self.reference] + ([] if self.float is self.reference else [self.float])

    @property
    def forked(self) -> list[dict]:
        """All networks, without what they share."""
        return self.exact + self.quantized


class Track(NamedTuple):
    """The quantized values of one track."""

    laned: bool
    replaced: dict  # fixed variable -> its value in the quantized network
    history: dict  # the same for all stops so far, with the rounding of each tap


@dataclasses.dataclass(frozen=True)
class StreamOptions:
    """The options of a stream.

    offload: whether waiting batches are moved to host memory.
    rebases: whether `rebase` will be called.
    keeps_history: whether `replay` will be called.
    replaced: variables of parameters that are quantized before the first stop; `replace` sets their values.
    """

    offload: bool = False
    rebases: bool = False
    keeps_history: bool = False
    replaced: frozenset = frozenset()


class Stream:
    """One program and the batches of its shape, between two stops."""

    def __init__(
        self,
        program: Program,
        params: Sequence,
        batches: Sequence[Sequence],
        weights: Sequence,
        stops: Sequence,
        laned: Sequence[bool] = (False,),
        options: StreamOptions = StreamOptions(),
    ):
        """
        Args:
            program: for this shape of batch.
            params: its parameters.
            batches: lists of leaves, one per batch.
            weights: row weights of each batch, by leaf, or None.
            stops: lists of sites that read the same input, in the order of execution.
            laned: for each track, whether it has lanes.
            options: see `StreamOptions`.
        """
        self.program, self.params, self.weights = program, params, weights
        self.stops, self.options = stops, options
        self.at = 0  # equations before this one have been evaluated
        self.fixed = dict(program.constants) | dict(zip(program.params, params, strict=True))
        self.given = set(program.params)  # the caller's own arrays, which are never freed
        self.first_need, self.last_need = needs(program)
        self.tracks = [Track(axis, {}, {}) for axis in laned]
        self.batches: list[Networks] = []
        for leaves in batches:
            reference: dict = {}
            start = dict(zip(program.inputs, leaves, strict=True))
            exact = {} if options.rebases else reference
            self.batches.append(Networks(start, reference, [{} for _ in laned], exact))
        sites = [site for stop in stops for site in stop]
        self.forks, self.forked_equations = forks(program, sites, options.replaced)
        self.followed = self._follow(batches)
        self.other = OtherPadding.of(program, batches, weights, self.followed)
        self.waiting = [0] * len(self.batches)  # bytes that each batch holds on the device while another is computed
        self.peak = 0  # the most bytes of live activations on the device
        for batch in range(len(self.batches)):
            self._suspend(batch)

    def advance(self, stop: int) -> None:
        """Evaluates both networks of every batch up to a stop.

        Raises:
            ValueError: row weights cannot be followed to it, or padding reaches rows that count.
        """
        for step in self._steps(min(site.first for site in self.stops[stop])):
            for batch in range(len(self.batches)):
                step(batch)
                self._suspend(batch)
        self._drop_fixed()
        for site in self.stops[stop]:
            if _is_followed(site) and self._padding_reaches(_source(site.data), site.path):
                raise ValueError(
                    f"Padding (rows of weight 0) changes rows that count at {site.path}: the model mixes them, as attention "
                    "without a mask does, or a mean over all positions. Pass the model a mask, or give batches without "
                    "padding, one for each length."
                )

    def finish(self) -> Iterator[tuple[list, list[list], list]]:
        """Yields, per batch: outputs of the float network, those of the quantized networks by track, and their weights.

        Outputs that do not differ have no lanes. Outputs that depend on padding, or whose row weights cannot be followed,
        have weight 0. Each batch is freed before the next.
        """
        end, mixed, step = len(self.program.equations), set(), lambda batch: None
        for step in self._steps(end):
            for batch in range(len(self.batches) if self.at < end else 0):
                step(batch)
        for batch, networks in enumerate(self.batches):
            step(batch)
            read = lambda v, values: v.val if is_literal(v) else self._read(v, {}, values, networks.shared)
            outputs = lambda values: [read(v, values) for v in self.program.outputs]
            if self.other is not None and self.other.batch == batch:
                mixed = {v for v in self.program.outputs if self._padding_reaches(v, "the outputs")}
            counted = [self._of_output(batch, v, v in mixed) for v in self.program.outputs]
            yield outputs(networks.float), [outputs(values) for values in networks.quantized], counted
            for values in (networks.shared, *networks.forked):
                values.clear()
            self._suspend(batch)
        self.release()

    def release(self) -> None:
        """Frees everything but the parameters: no batch will advance any further."""
        self.at = len(self.program.equations)
        for values in [pool for networks in self.batches for pool in (networks.shared, *networks.forked)]:
            values.clear()
        for track in self.tracks:
            track.replaced.clear()
            track.history.clear()
        self.other = None
        self._drop_fixed()

    def replay(self, batches: Sequence[Sequence], weights: Sequence, stop: int) -> "Stream":
        """A stream of other batches, advanced to a stop through the layers that this one has quantized."""
        laned = [track.laned for track in self.tracks]
        new = Stream(self.program, self.params, batches, weights, self.stops, laned, self.options)
        for old, track in zip(self.tracks, new.tracks, strict=True):
            track.history.update(old.history)
            track.replaced.update((v, x) for v, x in old.history.items() if not isinstance(v, Tap))
        for earlier in range(stop):
            new.advance(earlier)
            tap = new.stops[earlier][0].data
            if isinstance(tap, Tap):
                for i, track in enumerate(self.tracks):
                    new.round_inputs(tap, i, track.history[tap])
        return new

    def rebase(self) -> None:
        """Restarts the reference from the values of the only quantized network, with float weights from here on."""
        for networks in self.batches:
            networks.reference.update(networks.quantized[0])

    def _follow(self, batches) -> list[Followed | None]:
        """The row weights of each batch at all sites, outputs and lookups."""
        if all(weights is None for weights in self.weights):
            return [None] * len(self.weights)
        read = [_source(site.data) for stop in self.stops for site in stop if _is_followed(site)]
        follow = RowWeights(self.program, [*read, *self.program.outputs, *lookups(self.program).values()])
        return [
            None if weights is None else follow(self.params, leaves, weights)
            for leaves, weights in zip(batches, self.weights, strict=True)
        ]

    def _weights(self, batch, v, name) -> jax.Array | None:
        """The weights of the entries of a variable."""
        followed = self.followed[batch]
        return None if followed is None or is_literal(v) else followed.at(_source(v), name)

    def _of_output(self, batch, v, mixed) -> jax.Array | None:
        """The weights of the entries of an output; all 0 where padding mixes into it."""
        followed = self.followed[batch]
        if followed is None:
            return None
        return jnp.zeros((1,) * v.aval.ndim, jnp.float32) if mixed else followed.of_output(v)

    def _padding_reaches(self, v, name) -> bool:
        """True if rows of weight 0 change a variable in rows that count."""
        other = self.other
        if other is None or is_literal(v) or v in self.program.fixed or v in other.weights.lost:
            return False
        networks = self.batches[other.batch]
        value, again = self._read(v, {}, networks.float, networks.shared), self._read(v, {}, {}, other.values)
        return other.reaches(value, again, other.weights.at(v, name))

    def _steps(self, end: int) -> Iterator[Callable[[int], None]]:
        """Functions that advance one batch; calling each on all batches in turn takes them up to equation `end`.

        There is one function, unless the embeddings of padding are swapped on the way.
        """
        if self.other is not None:
            for index in self.other.lookups:
                if self.at <= index < end - 1:
                    yield self._step(index + 1)
                    self.other.swap(index)
        yield self._step(end)

    def _step(self, end: int) -> Callable[[int], None]:
        """A function that advances one batch up to equation `end`."""
        program, start = self.program, self.at
        common, forked = [], []
        for index, eqn in enumerate(program.equations[start:end], start):
            if not program.is_fixed(eqn):
                (forked if index in self.forked_equations else common).append(eqn)
        fixed = [program.equations[i] for i, need in self.first_need.items() if start <= need < end]
        read = lambda v: v.val if is_literal(v) else self.fixed[v]
        self.fixed.update(
            Segment(fixed, lambda v: True)(read)
        )  # they depend on parameters alone: once for both networks
        used_here = {v for e in forked for v in e.invars if not is_literal(v)}
        both = Segment(self._with_broadcasts(common), lambda v: self._live_after(v, end) or v in used_here)
        each = Segment(self._with_broadcasts(forked), lambda v: self._live_after(v, end))
        self.at = end

        def step(batch):
            networks = self.batches[batch]
            shared = networks.shared
            shared.update(both(lambda v: self._read(v, {}, {}, shared)))
            for values in networks.exact:
                values.update(each(lambda v: self._read(v, {}, values, shared)))
            for values, track in zip(networks.quantized, self.tracks, strict=True):
                weights, laned = track.replaced, lambda v: track.laned and (v in track.replaced or v in values)
                values.update(each(lambda v: self._read(v, weights, values, shared), laned))
            if self.other is not None and self.other.batch == batch:
                other = self.other.values
                for segment in (both, each):
                    other.update(segment(lambda v: self._read(v, {}, {}, other)))
                for v in [v for v in other if not self._live_after(v, end)]:
                    del other[v]
            self._note_peak(batch)
            for values in (shared, *networks.forked):
                for v in [v for v in values if not self._live_after(v, end)]:
                    del values[v]

        return step

    def _with_broadcasts(self, equations):
        """The equations, preceded by the broadcasts of fixed values that they read."""
        needed, found = {v for e in equations for v in e.invars if not is_literal(v)}, []
        for v, eqn in reversed(self.program.broadcasts.items()):
            if v in needed:
                needed.update(v for v in eqn.invars if not is_literal(v))
                found.append(eqn)
        return found[::-1] + equations

    def _live_after(self, v, end):
        return self.program.last_use.get(v, -1) >= end and v not in self.program.broadcasts

    def _drop_fixed(self):
        for v in [v for v in self.fixed if self.last_need.get(v, -1) < self.at and v not in self.given]:
            del self.fixed[v]
        for track in self.tracks:
            for v in [v for v in track.replaced if self.last_need.get(v, -1) < self.at]:
                del track.replaced[v]

    def inputs(self, site: Site, track: int = 0) -> Iterator[tuple[jax.Array, jax.Array | None, jax.Array | None]]:
        """Yields, per batch: the input of a site in the reference and in the quantized network (None if equal), weights."""
        v = site.data
        for batch, networks in enumerate(self.batches):
            weights = self._weights(batch, v, site.path)
            if v in self.forks:
                yield _value(networks.reference[v]), _value(networks.quantized[track][v]), weights
            else:
                yield self._read(v, {}, {}, networks.shared), None, weights

    def has_lanes(self, variable: Any, track: int) -> bool:
        """True if a value that depends on data has lanes in the quantized networks of a track."""
        return self.tracks[track].laned and variable in self.forks

    def round_inputs(self, tap: Tap, track: int, rounded: Callable[[jax.Array], jax.Array]) -> None:
        """Sets the input of a stop in all networks: rounded in the quantized ones of a track, unchanged in the others."""
        if self.options.keeps_history:
            self.tracks[track].history[tap] = rounded
        for batch, networks in enumerate(self.batches):
            own = networks.quantized[track]
            own[tap] = rounded(self._read(tap.source, {}, own, networks.shared))
            for values in networks.exact:
                values[tap] = self._read(tap.source, {}, values, networks.shared)
            if self.other is not None and self.other.batch == batch:
                self.other.values[tap] = self._read(tap.source, {}, {}, self.other.values)
            self._suspend(batch)

    def sources(self, tap: Tap, path: str, track: int = 0) -> Iterator[tuple[jax.Array, jax.Array | None]]:
        """Yields, per batch: the input of a stop in the quantized networks before rounding, and its weights."""
        for batch, networks in enumerate(self.batches):
            weights = self._weights(batch, tap, path)
            yield self._read(tap.source, {}, networks.quantized[track], networks.shared), weights

    def replace(self, variable: Any, value: jax.Array, track: int = 0) -> None:
        """Replaces a fixed variable in the quantized networks, such as a weight by its quantized value."""
        self.tracks[track].replaced[variable] = value
        if self.options.keeps_history:
            self.tracks[track].history[variable] = value

    def value(self, variable: Any) -> jax.Array:
        """The value of a fixed variable, wherever in the program it is computed."""
        if variable in self.fixed:
            return self.fixed[variable]
        eqn = next(e for e in self.program.equations if variable in e.outvars)
        values = [v.val if is_literal(v) else self.value(v) for v in eqn.invars]
        return bind(eqn, values)[eqn.outvars.index(variable)]

    def _read(self, v, weights, values, shared):
        for place in (weights, values, shared, self.fixed):
            if v in place:
                return _value(place[v])
        raise AssertionError(f"{v} is read before it is computed or after it was freed")

    def _note_peak(self, batch):
        """Updates the peak while this batch is computed and the others wait."""
        own = _on_device(self.batches[batch])
        weights = sum(x.nbytes for track in self.tracks for x in track.replaced.values())
        self.peak = max(self.peak, own + weights + sum(self.waiting) - self.waiting[batch])

    def _suspend(self, batch):
        """Puts a batch aside until its next turn, in host memory if batches are offloaded."""
        self._note_peak(batch)
        networks = self.batches[batch]
        if self.options.offload:
            moved: dict = {}  # networks may hold one array under several names
            for values in (networks.shared, *networks.forked):
                for v, x in values.items():
                    if isinstance(x, jax.Array) and not jnp.issubdtype(x.dtype, jax.dtypes.extended):
                        values[v] = moved.setdefault(id(x), Offloaded.of(x))
        self.waiting[batch] = _on_device(networks)


def _is_followed(site: Site | Operand) -> bool:
    """True if the rows of a site's input have weights. Operands whose rows have steps of their own need none."""
    return not isinstance(site, Operand) or site.activations.needs_data


def _source(v):
    """The variable that a tap rounds; any other variable itself."""
    return getattr(v, "source", v)


def _value(x):
    if isinstance(x, Offloaded):
        return x.restore()
    return jax.device_put(x) if isinstance(x, np.ndarray) else x


def _on_device(networks: Networks) -> int:
    pools = (networks.shared, *networks.forked)
    arrays = {id(x): x for values in pools for x in values.values() if isinstance(x, jax.Array)}
    return sum(x.nbytes for x in arrays.values())

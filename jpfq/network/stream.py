"""Streams: batches of one shape on their way through both networks, the float one and the one quantized so far.

Until the first quantized site the two agree and are computed once. A value is dropped after its last use.
"""

from collections.abc import Callable, Iterator, Sequence

import jax

from .compat import bind, inner_jaxprs, is_literal
from .program import Program
from .segments import Segment
from .sites import Site


class Stream:
    """One program and the batches of its shape, between two stops of the walk."""

    def __init__(
        self, program: Program, params: Sequence, batches: Sequence[Sequence], weights: Sequence, stops: Sequence
    ):
        """
        Args:
            program: for this shape of batch.
            params: its parameters.
            batches: lists of leaves, one per batch.
            weights: row weights of each batch, or None.
            stops: lists of sites that read the same input, in the order of execution.
        """
        self.program, self.weights, self.stops = program, weights, stops
        self.at = 0  # equations before this one are done
        self.fixed = dict(program.constants) | dict(zip(program.params, params, strict=True))
        self.kept = set(program.params)
        self.quantized: dict = {}  # weight operand -> its quantized value
        self.shared = [dict(zip(program.inputs, leaves, strict=True)) for leaves in batches]
        self.forked: list[tuple[dict, dict]] = [({}, {}) for _ in batches]
        self.forks, self.forked_equations = forks(program, [site for stop in stops for site in stop])
        self.peak = 0  # bytes of live activations at a stop, at most
        self._note_peak()

    def advance(self, number: int) -> None:
        """Brings both networks of every batch to a stop."""
        step = self._step(min(site.index for site in self.stops[number]))
        for batch in range(len(self.shared)):
            step(batch)
        self._note_peak()
        self._drop_fixed()

    def finish(self) -> Iterator[tuple[list, list]]:
        """Per batch: the outputs of the float and of the quantized network. Each batch is let go before the next."""
        step = self._step(len(self.program.equations))
        for batch in range(len(self.shared)):
            step(batch)
            shared, (exact, quantized) = self.shared[batch], self.forked[batch]
            read = lambda v, values: v.val if is_literal(v) else self._read(v, {}, values, shared)
            yield tuple([read(v, values) for v in self.program.outputs] for values in (exact, quantized))  # type: ignore
            for values in (shared, exact, quantized):
                values.clear()

    def _step(self, end: int) -> Callable[[int], None]:
        """A function that takes one batch from where it is up to equation `end`."""
        program, start = self.program, self.at
        common, forked = [], []
        for index, eqn in enumerate(program.equations[start:end], start):
            if program.is_fixed(eqn):
                self._evaluate(eqn)
            else:
                (forked if index in self.forked_equations else common).append(eqn)
        used_here = {v for e in forked for v in e.invars if not is_literal(v)}
        both = Segment(common, lambda v: self._later(v, end) or v in used_here)
        each = Segment(forked, lambda v: self._later(v, end))
        self.at = end

        def step(batch):
            shared, (exact, quantized) = self.shared[batch], self.forked[batch]
            shared.update(both(lambda v: self._read(v, {}, {}, shared)))
            for values, weights in ((exact, {}), (quantized, self.quantized)):
                values.update(each(lambda v: self._read(v, weights, values, shared)))
            for values in (shared, exact, quantized):
                for v in [v for v in values if not self._later(v, end)]:
                    del values[v]

        return step

    def _later(self, v, end):
        return self.program.last_use.get(v, -1) >= end

    def _drop_fixed(self):
        for values in (self.fixed, self.quantized):
            for v in [v for v in values if not self._later(v, self.at) and v not in self.kept]:
                del values[v]

    def inputs(self, site: Site) -> Iterator[tuple[jax.Array, jax.Array | None, jax.Array | None]]:
        """Per batch: the site's input in the float and the quantized network (None where they agree), and row weights."""
        for shared, (exact, quantized), weights in zip(self.shared, self.forked, self.weights, strict=True):
            v = site.data
            yield (
                (exact[v], quantized[v], weights) if v in self.forks else (self._read(v, {}, {}, shared), None, weights)
            )

    def install(self, site: Site, operand: jax.Array) -> None:
        """Puts a quantized weight into the quantized network."""
        self.quantized[site.weight] = operand

    def _read(self, v, weights, values, shared):
        for place in (weights, values, shared, self.fixed):
            if v in place:
                return place[v]
        raise AssertionError(f"{v} is read before it is computed or after it was dropped")

    def _evaluate(self, eqn):
        """An equation of parameters alone: once, for both networks. One at a time, so that layers share what compiles."""
        read = lambda v: v.val if is_literal(v) else self.fixed[v]
        if inner_jaxprs(eqn):
            self.fixed.update(Segment([eqn], lambda v: True)(read))
        else:
            self.fixed.update(zip(eqn.outvars, bind(eqn, list(map(read, eqn.invars))), strict=True))

    def _note_peak(self):
        pools = (*self.shared, *(d for pair in self.forked for d in pair), self.quantized)
        self.peak = max(self.peak, sum(x.nbytes for pool in pools for x in pool.values()))


def forks(program: Program, sites: Sequence[Site]) -> tuple[set, set[int]]:
    """The variables on which the two networks differ, downstream of a quantized site, and the equations that make them."""
    quantized, variables, equations = {site.index for site in sites}, set(), set()
    for index, eqn in enumerate(program.equations):
        if index in quantized or any(v in variables for v in eqn.invars if not is_literal(v)):
            variables.update(eqn.outvars)
            equations.add(index)
    return variables, equations

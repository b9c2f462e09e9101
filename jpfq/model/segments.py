"""Segments: runs of equations between sites, compiled as one function. Equal runs share one compilation.

The blocks of a transformer are equal, so a model compiles only as many segments as it has different ones, and calibrating it
a second time compiles none.
"""

import collections
from collections.abc import Callable, Sequence
from typing import Any

import jax

from ..matrix.lanes import over_lanes
from . import canonical
from .compat import bind, is_literal

CACHE = 4096  # compiled segments; the least recently used is evicted

_compiled: collections.OrderedDict[Any, Callable] = collections.OrderedDict()


class Segment:
    """A run of equations as a function from the values it reads to the values that later equations need."""

    def __init__(self, equations: Sequence, is_needed: Callable[[Any], bool]):
        read, defined = {}, set()  # a dict keeps the order
        for eqn in equations:
            read.update((v, None) for v in eqn.invars if not is_literal(v) and v not in defined)
            defined.update(eqn.outvars)
        self.inputs = list(read)
        self.outputs = [v for eqn in equations for v in eqn.outvars if is_needed(v)]
        self._equations, self._functions = tuple(equations), {}
        self._key = canonical.segment(list(equations), self.inputs, self.outputs)

    def __call__(self, read: Callable[[Any], Any], laned: Callable[[Any], bool] = lambda v: False) -> dict:
        """The outputs by variable.

        Args:
            read: returns the value of an input.
            laned: whether an input has lanes. If any has, all outputs have.
        """
        axes = tuple(map(laned, self.inputs))
        if axes not in self._functions:
            self._functions[axes] = self._function(axes)
        return dict(zip(self.outputs, self._functions[axes](*map(read, self.inputs)), strict=True))

    def _function(self, laned):
        key = self._key, laned
        if key not in _compiled:
            _compiled[key] = _compile(self._equations, tuple(self.inputs), tuple(self.outputs), laned)
            while len(_compiled) > CACHE:
                _compiled.popitem(last=False)
        _compiled.move_to_end(key)
        return _compiled[key]


def _compile(equations, inputs, outputs, laned):
    def segment(*values):
        env = dict(zip(inputs, values, strict=True))
        for eqn in equations:
            out = bind(eqn, [v.val if is_literal(v) else env[v] for v in eqn.invars])
            env.update(zip(eqn.outvars, out, strict=True))
        return [env[v] for v in outputs]

    return jax.jit(lambda *values: over_lanes(segment, values, laned))

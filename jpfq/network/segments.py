"""Segments: runs of equations compiled as one function, once for all runs of the same form.

A transformer's blocks are one form, so a model compiles as many segments as it has distinct stretches between sites, and
calibrating it a second time compiles none.
"""

import collections
from collections.abc import Callable, Sequence
from typing import Any

import jax

from . import canonical
from .compat import bind, is_literal

CACHE = 4096  # compiled forms that are kept; the least recently used goes first

_compiled: collections.OrderedDict[Any, Callable] = collections.OrderedDict()


class Segment:
    """A run of equations as a function from the values it reads to the values that are read after it."""

    def __init__(self, equations: Sequence, is_needed: Callable[[Any], bool]):
        read, defined = {}, set()  # a dict keeps the order
        for eqn in equations:
            read.update((v, None) for v in eqn.invars if not is_literal(v) and v not in defined)
            defined.update(eqn.outvars)
        self.inputs = list(read)
        self.outputs = [v for eqn in equations for v in eqn.outvars if is_needed(v)]
        key = canonical.segment(list(equations), self.inputs, self.outputs)
        if key not in _compiled:
            _compiled[key] = _compile(tuple(equations), tuple(self.inputs), tuple(self.outputs))
            while len(_compiled) > CACHE:
                _compiled.popitem(last=False)
        _compiled.move_to_end(key)
        self._function = _compiled[key]

    def __call__(self, read: Callable[[Any], Any]) -> dict:
        """The outputs by variable, given a way to read the inputs."""
        return dict(zip(self.outputs, self._function(*map(read, self.inputs)), strict=True))


def _compile(equations, inputs, outputs):
    @jax.jit
    def segment(*values):
        env = dict(zip(inputs, values, strict=True))
        for eqn in equations:
            out = bind(eqn, [v.val if is_literal(v) else env[v] for v in eqn.invars])
            env.update(zip(eqn.outvars, out, strict=True))
        return [env[v] for v in outputs]

    return segment

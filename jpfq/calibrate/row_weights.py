"""Row weights: followed from the inputs of a model through its program to the inputs of each layer.

The weights of a value have its rank, with size 1 along axes that they do not depend on; None means that it has no weights.
Three rules propagate them:

    an entry computed from several (two operands, a window, the inputs of a kernel) has the smallest of their weights;
    an entry that reduces an axis (a mean over positions, attention) has the largest weight along it;
    an entry that is moved, or selected by an index, keeps its weight.

With weights of 0 and 1, an entry of weight 1 is then computed without padding, unless the model mixes rows, by attention
without a mask for example. padding_check.py detects that by running the float network on other padding.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..model.compat import bind, is_literal
from ..model.program import Program
from .batches import over_rows
from .row_weight_ops import Lost
from .row_weight_rules import Weights, indices, propagate


class Followed(NamedTuple):
    """The weights of one batch at the requested variables, and the operations at which they were lost."""

    weights: dict[Any, Weights]
    lost: dict[Any, str]

    def at(self, v: Any, name: str) -> Weights:
        """The weights of a variable; raises if they were lost."""
        if v in self.lost:
            raise ValueError(
                f"The row weights cannot be followed to {name}, because the data pass through {self.lost[v]} before it. "
                "Give batches without padding, one for each length, or weights per sample, (batch,)."
            )
        return self.weights.get(v)

    def of_output(self, v: Any) -> Weights:
        """The weights of the entries of an output; all 0 if they were lost, so that it is not compared."""
        if is_literal(v):
            return None
        return jnp.zeros((1,) * v.aval.ndim, jnp.float32) if v in self.lost else self.weights.get(v)


class RowWeights:
    """Computes the weights of some variables of a program, for any batch of its shape."""

    def __init__(self, program: Program, targets: Sequence[Any]):
        self.program = program
        self.targets = [v for v in dict.fromkeys(targets) if not is_literal(v)]
        self._lost: dict = {}  # shapes of weights -> where weights were lost, recorded during tracing
        self._compiled = jax.jit(self._follow)

    def __call__(self, leaves: Sequence, inputs: Sequence, weights: Sequence[Weights]) -> Followed:
        """The weights of a batch, from those of its leaves along their leading axes."""
        found, cut = self._compiled(list(leaves), list(inputs), list(weights))
        lost = self._lost[_shapes(weights)]
        known = {v: w for v, w in zip(self.targets, found, strict=True) if v not in lost}
        if lost and (same := _one_value(weights)) is not None:
            return Followed(known | {v: jnp.full((1,) * v.aval.ndim, same, jnp.float32) for v in lost}, {})
        for name, flag in cut.items():
            if flag:
                raise ValueError(
                    f"{name} would cover other rows if the rows of weight 0 were removed: it starts elsewhere, or reaches "
                    "beyond the end of the data. Weights cannot correct for that. Give batches without padding, one for "
                    "each length, or weights per sample, (batch,)."
                )
        return Followed(known, lost)

    def _follow(self, leaves, inputs, weights):
        program = self.program
        given = {v: over_rows(w, v.aval.ndim) for v, w in zip(program.inputs, weights, strict=True) if w is not None}
        cut: dict = {}
        env = propagate(program.equations, given, _Values(program, leaves, inputs, given), cut)
        found = [env.get(getattr(v, "source", v)) for v in self.targets]
        self._lost[_shapes(weights)] = {
            v: w.by for v, w in zip(self.targets, found, strict=True) if isinstance(w, Lost)
        }
        entries = lambda w: None if w is None or isinstance(w, Lost) else jnp.where(jnp.isinf(w), 1, w)
        return list(map(entries, found)), cut


def of_outputs(program: Program, leaves: Sequence, batches: Sequence, weights: Sequence) -> list[list[Weights] | None]:
    """The weights of each floating output, per batch; None for a batch without weights.

    Raises:
        ValueError: weights cannot be followed to an output.
    """
    if all(given is None for given in weights):
        return [None] * len(weights)
    outputs = [v for v in program.outputs if jnp.issubdtype(v.aval.dtype, jnp.floating)]
    follow = RowWeights(program, outputs)
    followed = (g if g is None else follow(leaves, batch, g) for batch, g in zip(batches, weights, strict=True))
    at = lambda found, v: None if is_literal(v) else found.at(v, "the outputs")
    return [None if found is None else [at(found, v) for v in outputs] for found in followed]


def _shapes(weights):
    return tuple(None if w is None else w.shape for w in weights)


def _one_value(weights):
    """The common value of all weights, or None."""
    given = [w for w in weights if w is not None]
    low, high = min(float(w.min()) for w in given), max(float(w.max()) for w in given)
    return low if low == high else None


class _Values:
    """The values of the float network that the propagation of weights needs, such as indices. Only these are computed."""

    def __init__(self, program, leaves, inputs, weighted):
        reached, needed = set(weighted), set()
        for eqn in program.equations:
            variables = [v for v in eqn.invars if not is_literal(v)]
            if any(getattr(v, "source", v) in reached for v in variables):
                reached.update(eqn.outvars)
                needed.update(v for v in indices(eqn) if not is_literal(v))
        for eqn in reversed(program.equations):
            if any(v in needed for v in eqn.outvars):
                needed.update(getattr(v, "source", v) for v in eqn.invars if not is_literal(v))
        self.env = dict(program.constants) | dict(zip(program.params, leaves, strict=True))
        self.env.update(zip(program.inputs, inputs, strict=True))
        for eqn in program.equations:
            if any(v in needed for v in eqn.outvars):
                self.env.update(zip(eqn.outvars, bind(eqn, list(map(self, eqn.invars))), strict=True))

    def __call__(self, v):
        return v.val if is_literal(v) else self.env[getattr(v, "source", v)]

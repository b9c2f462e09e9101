"""A check that padding does not change rows that count: the float network runs again with other padding.

Weights say which rows are padding, not that the model separates them from the others: attention without a mask, or a mean
or a normalization over positions, mixes all rows. So one batch runs a second time with other data in its rows of weight 0
(copies of rows that count; for tokens, the embeddings of other tokens), and the rows that count must stay the same.
"""

from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp

from ..model.compat import is_literal
from ..model.program import Program
from .batches import is_data, over_rows
from .row_weights import Followed

LOOKUPS = ("gather", "dot_general")


class OtherPadding:
    """The values of the float network for one batch with other padding."""

    def __init__(self, batch: int, values: dict, lookups: dict[int, Any], weights: Followed):
        """
        Args:
            batch: the index of the batch.
            values: its inputs, by variable.
            lookups: the variables of embeddings, by index of their equation.
            weights: of the batch.
        """
        self.batch, self.values, self.lookups, self.weights = batch, values, lookups, weights

    @classmethod
    def of(cls, program: Program, batches: Sequence, weights: Sequence, followed: Sequence) -> Self | None:
        """The first batch that has padding, with other values there; None if no batch has any that can be changed."""
        for index, (leaves, given) in enumerate(zip(batches, weights, strict=True)):
            if given is None or not any(bool((w == 0).any()) for w in given if w is not None):
                continue
            values = dict(zip(program.inputs, leaves, strict=True))
            data = {
                v: (x, w) for (v, x), w in zip(values.items(), given, strict=True) if w is not None and is_data(x, w)
            }
            values |= {v: _swapped(jnp.asarray(x), over_rows(w, x.ndim)) for v, (x, w) in data.items()}
            found = lookups(program)
            return cls(index, values, found, followed[index]) if data or found else None
        return None

    def swap(self, index: int) -> None:
        """Replaces the embeddings of padding, after the equation of this index has looked them up."""
        v = self.lookups[index]
        if v in self.values and (w := self.weights.weights.get(v)) is not None:
            self.values[v] = _swapped(self.values[v], w)

    def reaches(self, value: jax.Array, other: jax.Array, weights: jax.Array | None) -> bool:
        """True if a value of the float network differs with other padding in entries that count."""
        if not jnp.issubdtype(value.dtype, jnp.floating):
            return False
        return not bool(_agree(value, other, jnp.ones((1,) * value.ndim) if weights is None else weights))


def lookups(program: Program) -> dict[int, Any]:
    """The embedding lookups: equations that turn integers or flags into floating numbers by a table of parameters."""
    floats = {v for v in program.inputs if jnp.issubdtype(v.aval.dtype, jnp.inexact)}
    found = {}
    for index, eqn in enumerate(program.equations):
        operands = [getattr(v, "source", v) for v in eqn.invars if not is_literal(v)]
        if any(v in floats for v in operands):
            floats.update(eqn.outvars)
        elif eqn.primitive.name in LOOKUPS and not program.is_fixed(eqn):
            out = eqn.outvars[0]
            if jnp.issubdtype(out.aval.dtype, jnp.inexact) and any(v in program.fixed for v in operands):
                found[index] = out
                floats.add(out)
    return found


@jax.jit
def _swapped(x, weights):
    """A value in which rows of weight 0 are replaced by copies of rows that count."""
    axes = max((a + 1 for a, n in enumerate(weights.shape) if n > 1), default=0)
    weights = jnp.broadcast_to(weights.max(tuple(range(axes, x.ndim))), x.shape[:axes]).ravel()
    rows = x.reshape(weights.size, *x.shape[axes:])
    counted = jnp.argsort(weights <= 0)  # those that count come first
    count = jnp.maximum((weights > 0).sum(), 1)
    place = jnp.arange(weights.size)
    other = counted[(place * 7 + 3) % count]
    return rows[jnp.where(weights > 0, place, other)].reshape(x.shape)


@jax.jit
def _agree(value, other, weights):
    counts = weights > 0
    differ = jnp.where(counts & ~((value == other) | (jnp.isnan(value) & jnp.isnan(other))), jnp.abs(value - other), 0)
    largest = jnp.where(counts, jnp.abs(value), 0).max(initial=0, where=jnp.isfinite(value))
    return differ.max(initial=0) <= max(1e-5, float(jnp.finfo(value.dtype).eps)) * largest

"""ScaledGrid: a grid with its steps and zero points, which rounds values to codes and turns codes into values.

A level is what a code stands for in units of the step: the code itself, or an entry of a table. Its value is

    step * (level - zero),     level = code, or table[code]
    step * level - offset      on a grid with offsets

and the nearest level is found by rounding, or by counting the midpoints of the table that lie at or below the position.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .pytree import register_dataclass

UNROLLED = 64  # midpoints up to which all are compared at once; of more, a binary search takes less time


@register_dataclass
@dataclasses.dataclass(frozen=True)
class ScaledGrid:
    """The values step * (level - zero) of codes lo .. hi; `step` and `zero` have one shape.

    A step of 0 belongs to weights that are all zero: every code then stands for 0. `table` (levels,) ascends, and codes are
    its indices; None stands for the integers. `unit` is the number that all levels are whole multiples of. With `offset`,
    `zero` holds offsets, in units of the weights.
    """

    step: jax.Array
    zero: jax.Array
    lo: jax.Array
    hi: jax.Array
    table: Any = None
    unit: Any = None  # None stands for 1
    offset: bool = dataclasses.field(default=False, metadata={"static": True})

    def with_steps(self, step: jax.Array, zero: jax.Array) -> "ScaledGrid":
        """The same levels with other steps and zero points."""
        return dataclasses.replace(self, step=step, zero=zero)

    def scaled(self, change: Callable[[jax.Array], jax.Array]) -> "ScaledGrid":
        """The same levels with all that is in units of the weights changed: the steps, and the offsets if there are any."""
        return self.with_steps(change(self.step), change(self.zero) if self.offset else self.zero)

    def position(self, v: jax.Array) -> jax.Array:
        """`v` in units of the step: its code is that of the level nearest to this."""
        step = jnp.where(self.step > 0, self.step, 1)
        return (v + self.zero) / step if self.offset else v / step + self.zero

    def encode(self, v: jax.Array) -> jax.Array:
        """Nearest code, as a float. Ties go up, also below zero, as in GPFQ22."""
        x = self.position(v)
        if self.table is not None:
            return jnp.clip(_count(x, (self.table[1:] + self.table[:-1]) / 2), self.lo, self.hi)
        below = jnp.floor(x)  # and not floor(x + 1/2), which rounds twice: wrong just below 1/2 and from 2^23 on
        return jnp.clip(jnp.where(x - below < 0.5, below, below + 1), self.lo, self.hi)

    def between(self, v: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The code of the level below `v`, before it is clipped to the grid, and the share of the way to the next level."""
        x = self.position(v)
        if self.table is None:
            below = jnp.floor(x)
            return below, x - below
        below = _count(x, self.table[1:-1])  # the last but one level at most
        first = self.level(below)
        return below, (x - first) / (self.level(below + 1) - first)

    def toward_zero(self, v: jax.Array) -> jax.Array:
        """The code of the level next to `v` on the side of 0, or of `v` itself where it is one; 0 is a level."""
        x = self.position(v) - self.zero
        if self.table is None:
            code = self.zero + jnp.trunc(x)
        else:
            code = jnp.where(x < 0, _count(x, self.table[:-1], equal=False), _count(x, self.table[1:]))
        return jnp.clip(code, self.lo, self.hi)

    def straight(self, v: jax.Array) -> jax.Array:
        """Values at the nearest levels; derivatives pass straight through the rounding, and are 0 beyond the grid."""
        least, most = self._ends
        x = jnp.clip(self.position(v), least, most)  # within the outer gaps: the sum is exactly the level
        return self.at(x + lax.stop_gradient(self.level(self.encode(v)) - x))

    def level(self, code: jax.Array) -> jax.Array:
        """The level of a code, in units of the step."""
        return code if self.table is None else self.table[code.astype(jnp.int32)]

    def at(self, level: jax.Array) -> jax.Array:
        """The value of a level."""
        return self.step * level - self.zero if self.offset else self.step * (level - self.zero)

    def decode(self, code: jax.Array) -> jax.Array:
        """The value a code stands for."""
        return self.at(self.level(code))

    def saturates(self, v: jax.Array) -> jax.Array:
        """True where `v` lies beyond the last level by more than half the distance to the one before."""
        least, most = self._ends
        x = self.position(v)
        return (x < least) | (x > most)

    @property
    def gap(self) -> jax.Array:
        """The largest distance of neighbouring levels, in units of the weights."""
        return self.step if self.table is None else self.step * jnp.max(self.table[1:] - self.table[:-1])

    @property
    def span(self) -> jax.Array:
        """The distance of the highest level from the lowest, in units of the weights."""
        lo, hi = (self.lo, self.hi) if self.table is None else (self.table[0], self.table[-1])
        return self.step * (hi - lo)

    @property
    def radius(self) -> jax.Array:
        """The value of the highest level."""
        return self.at(self.hi if self.table is None else self.table[-1])

    @property
    def zero_code(self) -> jax.Array:
        """The code of the value 0, of grids that have it."""
        return self.zero if self.table is None else self.encode(jnp.zeros_like(self.step))

    @property
    def integer_step(self) -> jax.Array:
        """The value of the integer 1: see `integers`."""
        return self.step if self.unit is None else self.step * self.unit

    def integers(self, code: jax.Array) -> jax.Array:
        """The int32 that products of integers take for a code: value = integer_step * integer."""
        if self.table is None:
            return (code - self.zero).astype(jnp.int32)
        return jnp.round(self.level(code) / self.unit).astype(jnp.int32)

    def within(self, least: jax.Array, most: jax.Array) -> "ScaledGrid":
        """The grid without codes whose integers lie beyond these, as floats; there is at least 0."""
        if self.table is None:
            least, most = self.zero + least, self.zero + most
        else:
            levels = jnp.round(self.table / self.unit)
            least, most = _count(least, levels, equal=False), _count(most, levels) - 1
        return dataclasses.replace(self, lo=jnp.maximum(self.lo, least), hi=jnp.minimum(self.hi, most))

    @property
    def _ends(self):
        """The positions from which on an argument lies beyond the grid."""
        if self.table is None:
            return self.lo - 0.5, self.hi + 0.5
        t = self.table
        return t[0] - (t[1] - t[0]) / 2, t[-1] + (t[-1] - t[-2]) / 2


def _count(x, edges, equal=True):
    """The number of ascending edges (count,) below x, or equal to it, as a float."""
    if edges.shape[0] > UNROLLED:
        side = "right" if equal else "left"
        return jnp.searchsorted(edges, x, side=side, method="scan_unrolled").astype(x.dtype)
    reached = (x >= edge if equal else x > edge for edge in edges)
    return sum((is_reached.astype(x.dtype) for is_reached in reached), jnp.zeros_like(x))

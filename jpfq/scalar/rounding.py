"""Roundings: the map Q of the recursion q = Q(A - L q), for one number at a time.

A rounding keeps a carry from one input coordinate of a neuron to the next, so that rules which remember what they did
(partial sums, budgets) fit the same loop. One that draws random numbers says so and is given a key per coordinate.
"""

import abc
import dataclasses
from typing import Any, ClassVar

import jax

from .grid import Levels
from .pytree import register_dataclass


class Rounding(abc.ABC):
    """One neuron's rounding; the recursion maps it over neurons."""

    random: ClassVar[bool] = False

    def init(self) -> Any:
        """The carry before the first coordinate."""
        return ()

    @abc.abstractmethod
    def __call__(self, carry: Any, a: jax.Array, levels: Levels, key: jax.Array | None) -> tuple[Any, jax.Array]:
        """Rounds the argument `a` of one coordinate to a code of `levels` (scalars); returns the new carry and the code."""


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Nearest(Rounding):
    """The level p that minimises (a - p)^2; of two at equal distance the upper one."""

    def __call__(self, carry, a, levels, key):
        del key
        return carry, levels.encode(a)

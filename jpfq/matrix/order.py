"""The order in which the recursion visits the input coordinates."""

import abc
import dataclasses

import jax
import jax.numpy as jnp

from ..scalar.pytree import register_dataclass


class Order(abc.ABC):
    """A permutation of the input coordinates, from their square norms."""

    @abc.abstractmethod
    def __call__(self, diagonal: jax.Array) -> jax.Array | None:
        """The coordinates in the order of their visit; None leaves them as they are."""


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Natural(Order):
    """As they come, as in the papers of GPFQ."""

    def __call__(self, diagonal):
        return None


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Descending(Order):
    """Largest input first (called act-order elsewhere); ties by index."""

    def __call__(self, diagonal):
        return jnp.argsort(-diagonal, stable=True)

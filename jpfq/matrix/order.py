"""The order in which the recursion visits the input coordinates."""

import abc
import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from ..scalar.pytree import register_dataclass
from .damping import Damping, MeanDiagonal
from .gram import Gram, Rows, as_gram


class Order(abc.ABC):
    """A permutation of the input coordinates, from the data."""

    natural = False  # whether inputs are visited as they come
    fills = False  # whether inputs of 0 at the end stay there and change nothing for the others

    @abc.abstractmethod
    def __call__(self, data: Gram | Rows) -> jax.Array | None:
        """The coordinates in the order of their visit; None leaves them as they are."""


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Natural(Order):
    """As they come, as in the papers of GPFQ.

    Examples:
        >>> jpfq.order.Natural()(gram) is None  # nothing is moved
        True
    """

    natural = True
    fills = True

    def __call__(self, data):
        return None


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Descending(Order):
    """Largest input first (called act-order elsewhere); ties by index.

    Examples:
        >>> order = jpfq.order.Descending()(gram)
        >>> int(order[0]) == int(gram.diagonal.argmax())
        True
    """

    fills = True

    def __call__(self, data):
        return jnp.argsort(-data.diagonal, stable=True)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class MinPivot(Order):
    """From the last place to the first, the coordinate nearest to the span of those that come after it.

    That is the smallest diagonal entry of the Schur complement of H + lam I, from which it is then eliminated (Chen et al.,
    ICLR 2026). It keeps the sum of the pivots V_tt^2 small, and with it the bound on OPTQ's error. Takes n steps of n^2
    operations, one after the other: `Descending` is nearly as good and free. Ties by index.

    `damping` is lam.

    Examples:
        >>> rule = jpfq.Rule(".*", bits=4, order=jpfq.order.MinPivot(jpfq.damping.MeanDiagonal(0.01)))
    """

    damping: Damping = MeanDiagonal(0.01)

    def __call__(self, data):
        H = as_gram(data).H
        n = H.shape[0]

        def place(state, _):
            S, placed = state
            t = jnp.argmin(jnp.where(placed, jnp.inf, jnp.diagonal(S)))
            row = S[t]
            pivot = row[t]
            S = S - jnp.where(pivot > 0, jnp.outer(row, row) / jnp.where(pivot > 0, pivot, 1), 0)
            return (S, placed.at[t].set(True)), t

        start = (H + self.damping(H) * jnp.eye(n, dtype=H.dtype), jnp.zeros(n, bool))
        return lax.scan(place, start, length=n)[1][::-1]

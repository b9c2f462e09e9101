"""Methods: what the recursion q = Q(A - L q) is fed, from the weights and the Gram.

A method is a function (W, Gram) -> System(A, L); everything else (rounding, grid, order, blocking) is shared.
With D = diag(H):

    MSQ     A = W                               L = 0
    GPFQ    A = W + L W + D^-1 tril(C) W        L = D^-1 stril(H)          (= D^-1 tril(G) W, as G = H + C)

GPFQ is the greedy path-following quantizer of Lybrand and Saab (2020) and Zhang, Zhou and Saab (2022); the Gram form
follows from taking the inner product of their state u with the next column of Xq.
"""

import abc
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..scalar.pytree import register_dataclass
from .gram import Gram, Rows, matmul


class System(NamedTuple):
    """One nonlinear forward substitution q = Q(A - L q)."""

    A: jax.Array  # (in, out)
    L: jax.Array | None  # (in, in) strictly lower triangular; None means 0


class Method(abc.ABC):
    """A choice of A and L."""

    @abc.abstractmethod
    def __call__(self, W: jax.Array, gram: Gram) -> System:
        """The system for weights W (in, out)."""

    @property
    def local(self) -> bool:
        """Whether the system of a block of coordinates follows from that block's rows and the residual u alone."""
        return False

    def block(self, W: jax.Array, rows: Rows, u: jax.Array) -> System:
        """The system of a block of coordinates, when those before it left the residual u = X w - Xq q (rows, out)."""
        raise TypeError(f"{self} has no data form: its feedback needs all coordinates at once. Use form='gram'.")


@register_dataclass
@dataclasses.dataclass(frozen=True)
class MSQ(Method):
    """Memoryless scalar quantization: round each weight by itself (also called RTN)."""

    def __call__(self, W, gram):
        del gram
        return System(W, None)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class GPFQ(Method):
    """Greedy path following: each code makes up, along its own input coordinate, for all errors before it."""

    def __call__(self, W, gram):
        inverse = _inverse(gram.diagonal)
        L = inverse[:, None] * jnp.tril(gram.H, -1)
        A = W + matmul(L, W)
        if gram.C is not None:
            A += inverse[:, None] * matmul(jnp.tril(gram.C), W)
        return System(jnp.where(gram.diagonal[:, None] > 0, A, 0), L)

    @property
    def local(self):
        return True

    def block(self, W, rows, u):
        A, L = self(W, rows.gram())
        return System(A + _inverse(rows.diagonal)[:, None] * matmul(rows.quantized.T, u), L)


def _inverse(diagonal):
    """1 / diagonal, and 0 at dead coordinates: their argument is 0, so they get the level nearest 0."""
    return jnp.where(diagonal > 0, 1 / jnp.where(diagonal > 0, diagonal, 1), 0)

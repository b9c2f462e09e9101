"""Methods: what the recursion q = Q(A - L q) is fed, from the weights and the Gram.

A method is a function (W, Gram) -> System; everything else (rounding, grid, order, blocking) is shared.
With D = diag(H):

    MSQ     A = W                                      L = 0
    GPFQ    A = W + L W + D^-1 tril(C) W               L = D^-1 stril(H)          (= D^-1 tril(G) W, as G = H + C)
    UNI     A = W + L W + D^-1 stril(C) W / scaling    L = D^-1 stril(H) / scaling

A dead coordinate, of which calibration has seen nothing (H_tt = 0), moves no output that is known: in every method its
argument is its own weight.

GPFQ is the greedy path-following quantizer of Lybrand and Saab (2020) and Zhang, Zhou and Saab (2022); the Gram form
follows from taking the inner product of their state u with the next column of Xq. The methods that factor H are in optq.py.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from ..scalar.grid import Number
from ..scalar.predicates import may_be
from ..scalar.pytree import register_dataclass
from .arrays import matmul
from .gram import Gram, Rows
from .half import triangular
from .split import lower


class System(NamedTuple):
    """One nonlinear forward substitution q = Q(A - L q), with A = base + L about.

    Fed as base + L (about - q): nothing large cancels, and no product L W is made. `cost` bounds what rounding does to the
    output: with W0 what an infinitely fine grid would return and e = a - q the errors of rounding,
    ||Xq (W0 - q)||^2 <= sum_t cost_t e_t^2. None where no such bound is known.
    """

    base: jax.Array  # (in, out)
    L: jax.Array | None  # (in, in) strictly lower triangular; None means 0
    about: jax.Array | None  # (in, out); None means 0
    cost: jax.Array | None  # (in,)

    @property
    def A(self) -> jax.Array:
        """The target of the form q = Q(A - L q) (in, out)."""
        return self.base if self.L is None or self.about is None else self.base + matmul(self.L, self.about)


class Method(abc.ABC):
    """A choice of A and L."""

    memoryless: ClassVar[bool] = False  # each weight is rounded as it is

    @property
    def fills(self) -> bool:
        """True if weights of 0 under inputs of 0, at the end, change nothing for the others."""
        return False

    @abc.abstractmethod
    def __call__(self, W: jax.Array, gram: Gram) -> System:
        """The system for weights W (in, out)."""

    @property
    def below(self) -> Callable[[Gram, jax.Array, jax.Array], jax.Array] | None:
        """e^T H e + 2 e^T tril(C) W per neuron (out,), from the Gram, e = W - q and a - W (in, out), a the arguments of q.

        None for methods whose arguments do not tell it: it takes products then.
        """
        return None

    @property
    def local(self) -> bool:
        """True if the system of a block of coordinates follows from that block's rows and the residual u alone."""
        return False

    def block(self, W: jax.Array, rows: Rows, u: jax.Array) -> System:
        """The system of a block of coordinates, when those before it left the residual u = X w - Xq q (rows, out)."""
        raise TypeError(f"{self} has no data form: its feedback needs all coordinates at once. Use form='gram'.")


@register_dataclass
@dataclasses.dataclass(frozen=True)
class MSQ(Method):
    """Memoryless scalar quantization: round each weight by itself (also called RTN).

    Examples:
        >>> tensor, info = jpfq.solve(W, gram, bits=4, method=jpfq.MSQ(), finish=None)
    """

    memoryless = True

    def __call__(self, W, gram):
        return System(W, None, None, _any_errors(gram.diagonal))

    @property
    def fills(self):
        return True

    @property
    def local(self):
        return True

    def block(self, W, rows, u):
        return System(W, None, None, None)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class GPFQ(Method):
    """Greedy path following: each code compensates, along its own input coordinate, for all errors before it.

    Examples:
        >>> tensor, info = jpfq.solve(W, gram, bits=4, method=jpfq.GPFQ())
        >>> system = jpfq.GPFQ()(W, gram)  # of q = Q(A - L q)
        >>> system.A.shape, system.L.shape
        ((32, 8), (32, 32))
    """

    def __call__(self, W, gram):
        inverse = inverse_of(gram.diagonal)
        base = W if gram.C is None else W + inverse * triangular(gram.C, W)
        return System(base, inverse * lower(gram.H, -1), W, gram.diagonal)

    @property
    def below(self):
        return lambda gram, e, moved: jnp.sum(gram.diagonal[:, None] * e * (2 * moved + e), 0)

    @property
    def fills(self):
        return True

    @property
    def local(self):
        return True

    def block(self, W, rows, u):
        system = self(W, rows.gram())
        return system._replace(base=system.base + inverse_of(rows.diagonal) * matmul(rows.quantized.T, u))


@register_dataclass
@dataclasses.dataclass(frozen=True)
class UNI(Method):
    """GPFQ with the feedback divided by `scaling` >= 1, which keeps arguments of a short alphabet within its range.

    q_t = Q( w_t + <Xq_t, u> / (scaling ||Xq_t||^2) ), from the unified framework of H. Zhang and Saab (2024). With
    `Stochastic` and scaling 1, on aligned weights (`Align`), this is SPFQ.

    Examples:
        >>> rule = jpfq.Rule(".*", grid=jpfq.Binary(), method=jpfq.UNI(scaling=4.0), rounding=jpfq.rounding.Stochastic())
    """

    scaling: Number = 1.0

    def __post_init__(self):
        if not may_be(self.scaling, lambda x: x >= 1):
            raise ValueError(f"UNI takes a scaling C of at least 1; got {self.scaling!r}.")

    def __call__(self, W, gram):
        inverse = inverse_of(gram.diagonal) / self.scaling
        base = W if gram.C is None else W + inverse * triangular(gram.C, W, -1)
        return System(base, inverse * lower(gram.H, -1), W, _any_errors(gram.diagonal))

    @property
    def fills(self):
        return True

    @property
    def local(self):
        return True

    def block(self, W, rows, u):
        system, inverse = self(W, rows.gram()), inverse_of(rows.diagonal) / self.scaling
        return system._replace(base=system.base + inverse * matmul(rows.quantized.T, u))


def inverse_of(diagonal: jax.Array) -> jax.Array:
    """1 / diagonal as a column (in, 1), and 0 at dead coordinates, which leaves them their own weight as argument."""
    return jnp.where(diagonal > 0, 1 / jnp.where(diagonal > 0, diagonal, 1), 0)[:, None]


def _any_errors(diagonal):
    """The cost of errors that nothing makes up for: (sum_t |e_t| ||x_t||)^2 <= sum_t e_t^2 ||x_t|| . sum_t ||x_t||."""
    norms = jnp.sqrt(diagonal)
    return norms * norms.sum()

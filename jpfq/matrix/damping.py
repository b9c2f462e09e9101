"""Damping, and the one factorisation that OPTQ, Qronos and least squares share.

    H + lam I = V V^T,  V upper triangular;     T = (V diag(V)^-1)^T,  unit lower triangular

V is a flipped Cholesky factor: V[t, t] is the distance of column t of [Xq; sqrt(lam) I] from the span of the columns after
it, the part of an error at t that later coordinates cannot make up for. A dead coordinate gets a diagonal of 1.
"""

import abc
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..scalar.grid import Number
from ..scalar.predicates import may_be
from ..scalar.pytree import register_dataclass
from .arrays import matmul
from .gram import mean_energy
from .triangular import solve_triangular


class Damping(abc.ABC):
    """The amount that is added to the diagonal of H before it is factored."""

    share: Number
    fills = False  # whether inputs of 0 beside the others do not change it

    def __post_init__(self):
        if not may_be(self.share, lambda x: x >= 0):
            raise ValueError(f"{type(self).__name__} takes a share of 0 or more; got {self.share!r}.")

    @abc.abstractmethod
    def __call__(self, H: jax.Array) -> jax.Array:
        """lam, a number."""


@register_dataclass
@dataclasses.dataclass(frozen=True)
class MeanDiagonal(Damping):
    """lam = share times the mean of diag(H) over the coordinates that are alive (OPTQ: .01).

    Examples:
        >>> float(jpfq.damping.MeanDiagonal(share=0.25)(jnp.diag(jnp.array([1.0, 3.0, 0.0]))))
        0.5
    """

    share: Number = 0.01
    fills = True

    def __call__(self, H):
        return self.share * mean_energy(jnp.diagonal(H))


@register_dataclass
@dataclasses.dataclass(frozen=True)
class TopEigenvalue(Damping):
    """lam = share times the largest eigenvalue of H, by 30 power iterations (Qronos: 1e-6, with activations 1e-3).

    `share` is of that eigenvalue.

    Examples:
        >>> rule = jpfq.Rule(".*", bits=4, method=jpfq.Qronos(damping=jpfq.damping.TopEigenvalue(1e-3)))
    """

    share: Number = 1e-6
    fills = True

    def __call__(self, H):
        return self.share * top_eigenvalue(H)


def top_eigenvalue(H: jax.Array) -> jax.Array:
    """The largest eigenvalue of a positive semidefinite matrix, from below, by 30 power iterations."""

    def turn(_, v):
        v = matmul(H, v)
        return v / jnp.maximum(jnp.linalg.norm(v), jnp.finfo(v.dtype).tiny)

    start = jnp.sqrt(jnp.maximum(jnp.diagonal(H), 0))
    v = lax.fori_loop(0, 30, turn, start / jnp.maximum(jnp.linalg.norm(start), jnp.finfo(H.dtype).tiny))
    return jnp.vdot(v, matmul(H, v), precision="highest")


def check_alpha(alpha: Number, name: str) -> None:
    """Refuses a part of the way to the least squares weights that is none."""
    if not may_be(alpha, lambda x: 0 <= x <= 1):
        raise ValueError(f"{name} takes alpha in [0, 1]; got {alpha!r}.")


class Factor(NamedTuple):
    """V of H + lam I = V V^T (in, in); NaN where the factorisation failed."""

    V: jax.Array

    @property
    def diagonal(self) -> jax.Array:
        """V[t, t] (in,)."""
        return jnp.diagonal(self.V)

    @property
    def L(self) -> jax.Array:
        """T - I, strictly lower triangular."""
        return jnp.tril((self.V / self.diagonal[None]).T, -1)

    def feedback(self, B: jax.Array) -> jax.Array:
        """T (H + lam I)^-1 B = diag(V)^-1 V^-1 B."""
        return solve_triangular(self.V, B) / self.diagonal[:, None]

    def solve(self, B: jax.Array) -> jax.Array:
        """(H + lam I)^-1 B."""
        return solve_triangular(self.V, solve_triangular(self.V, B), trans=1)


def factor(H: jax.Array, damping: Damping) -> Factor:
    """The factor of H + lam I."""
    diagonal = jnp.diagonal(H)
    damped = H + jnp.diag(jnp.where(diagonal > 0, damping(H), 1))
    return Factor(jnp.linalg.cholesky(damped[::-1, ::-1], symmetrize_input=False)[::-1, ::-1])

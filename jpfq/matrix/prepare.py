"""Preparations, applied to the weights before the recursion.

    Align          W with Xq W near X W, close to the old W, by passes over the coordinates     (SPFQ, phase I)
    LeastSquares   W + alpha (H + lam)^-1 C W: the limit of many passes                          (QEP's correction)
    MagR           smaller largest weights at nearly the same X W                                (MagR)
    MalySaab       as many weights as can be moved onto the grid with Xq W unchanged             (Maly, Saab 2022)

The first two and the last leave a target on the quantized network's side: X is Xq from there on.
"""

import abc
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from ..scalar import ScaledGrid
from ..scalar.grid import Number
from ..scalar.predicates import is_count, may_be
from ..scalar.pytree import register_dataclass
from .arrays import matmul
from .damping import Damping, MeanDiagonal, check_alpha, factor, top_eigenvalue
from .gram import Gram
from .methods import inverse_of
from .triangular import solve_triangular


class Prepare(abc.ABC):
    """New weights, and the data as the recursion is to see them."""

    needs_rows: ClassVar[bool] = False  # works on the calibration rows, not on their Gram
    needs_levels: ClassVar[bool] = False  # comes after the scale is chosen

    def check(self, recipe: Any) -> None:
        """Raises where this preparation contradicts another part of a recipe."""
        others = len(recipe.prepare) > 1 or recipe.rotation is not None or recipe.shrinkage is not None
        if self.needs_rows and others:
            raise ValueError(
                f"{recipe.prepare} works on the calibration rows: alone, without a rotation and without shrinkage."
            )

    def refuse(self, rows: int, n: int, name: str) -> None:
        """Raises where this preparation cannot be used on a matrix of n inputs and that many calibration rows."""
        del rows, n, name

    @abc.abstractmethod
    def __call__(self, W: jax.Array, data: Any, levels: ScaledGrid | None) -> tuple[jax.Array, Any]:
        """W (in, out) and its data, both in the order of the recursion, made ready.

        `levels` is None, or for a preparation that needs them, each weight's: step and zero of shape (in, out).
        """


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Align(Prepare):
    """SPFQ's alignment of order `passes`: in each pass every coordinate in turn takes its best weight.

    The first pass is w_t = <Xq_t, u> / ||Xq_t||^2 with u what X w has built up so far; each further pass one Gauss-Seidel
    sweep for Xq W = X W (SPFQ, phase I). Before GPFQ one pass changes nothing; many tend to least squares. Dead weights
    stay.

    Examples:
        >>> spfq = {"method": jpfq.UNI(), "rounding": jpfq.rounding.Stochastic()}
        >>> rule = jpfq.Rule(".*", bits=4, prepare=jpfq.prepare.Align(passes=4), **spfq)
    """

    passes: int = dataclasses.field(default=1, metadata={"static": True})

    def __post_init__(self):
        if not is_count(self.passes):
            raise ValueError(f"Align takes an order of at least 1 pass; got {self.passes!r}.")

    def __call__(self, W, data, levels):
        if data.C is None:
            return W, data
        inverse = inverse_of(data.diagonal)
        lower = inverse * jnp.tril(data.H, -1)  # I + lower = D^-1 tril(H)
        sweep = lambda B: solve_triangular(lower, inverse * B, lower=True, unit_diagonal=True)
        change = sweep(matmul(jnp.tril(data.C), W))
        rest, C = jnp.triu(data.H, 1), matmul(data.C, W)
        change = lax.fori_loop(1, self.passes, lambda _, y: sweep(C - matmul(rest, y)), change)
        return W + change, aligned(data)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class LeastSquares(Prepare):
    """W + alpha (H + lam)^-1 C W: at alpha = 1 the (damped) minimiser of ||X W - Xq W*||.

    `damping` is lam.

    Examples:
        >>> rule = jpfq.Rule(".*", bits=4, prepare=jpfq.prepare.LeastSquares(), method=jpfq.GPFQ())
    """

    alpha: Number = 1.0
    damping: Damping = MeanDiagonal(0.01)

    def __post_init__(self):
        check_alpha(self.alpha, "LeastSquares")

    def __call__(self, W, data, levels):
        if data.C is None:
            return W, data
        return W + self.alpha * factor(data.H, self.damping).solve(matmul(data.C, W)), aligned(data)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class MagR(Prepare):
    """Weights V of smaller largest entry: min ||X (W - V)||^2 / 2 + penalty ||V||_max per neuron, by proximal gradient.

    `alpha` is the threshold of one step, in units of the weights, times s / ||S||_1 (S = X^T X, s its largest eigenvalue,
    ||S||_1 its largest column sum), the convention of Brevitas. Dead weights stay. Source: MagR (arXiv 2406.00800).

    `iterations` is the number of those steps.

    Examples:
        >>> rule = jpfq.Rule(".*", bits=2, prepare=jpfq.prepare.MagR(0.01), scale=jpfq.scale.AbsMax())
    """

    alpha: Number = 0.01
    iterations: int = dataclasses.field(default=200, metadata={"static": True})

    def __post_init__(self):
        if not may_be(self.alpha, lambda x: x > 0):
            raise ValueError(f"MagR takes a positive alpha; got {self.alpha!r}.")
        if not is_count(self.iterations):
            raise ValueError(f"MagR takes at least one iteration; got {self.iterations!r}.")

    def __call__(self, W, data, levels):
        S = data.H if data.C is None else data.H + data.C + data.C.T + data.drift
        top = top_eigenvalue(S)
        live = top > 0
        S = S / jnp.where(live, top, 1)
        threshold = self.alpha / jnp.where(live, jnp.abs(S).sum(0).max(), 1)

        def step(_, V):
            return jax.vmap(_prox_max, (1, None), 1)(V - matmul(S, V - W), threshold)

        live = live & (data.diagonal[:, None] > 0)
        return jnp.where(live, lax.fori_loop(0, self.iterations, step, W), W), data


def _prox_max(v, a):
    """argmin_p ||p - v||^2 / 2 + a ||p||_max = v - (the projection of v on the l1 ball of radius a)."""
    sizes = jnp.sort(jnp.abs(v))[::-1]
    excess = jnp.cumsum(sizes) - a
    counts = jnp.arange(1, v.shape[0] + 1, dtype=v.dtype)
    last = jnp.max(jnp.where(counts * sizes > excess, counts, 1))
    threshold = jnp.maximum(excess[last.astype(int) - 1] / last, 0)
    return jnp.clip(v, -threshold, threshold)


def aligned(gram: Gram) -> Gram:
    """The Gram of weights whose target lies on the quantized network's side."""
    return dataclasses.replace(gram, C=None, drift=None, sum_X=gram.sum_Xq)

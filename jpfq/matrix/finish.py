"""Finishers, applied to the codes after the recursion: all lower ||X W - Xq q||, whichever method the codes are from.

    Refit           steps times c* = <X w, Xq q> / ||Xq q||^2 per neuron
    Descend         cyclic coordinate descent: every code in turn takes its best level, the others held
    CosineDescend   the same with the step free: every code takes the level of largest cosine between Xq q and X w

A pass of descent is the recursion once more. With D = diag(H), p the codes' values before the pass and q after it, the
best value of weight t is a_t with

    a = base + L (W - q),     L = D^-1 stril(H),     base = W + D^-1 (C W + striu(H) (W - p))

so a pass has GPFQ's L and the blocks of every other recursion. What the cosine needs besides are inputs of its rounding.
"""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..scalar import Rounding, ScaledGrid
from ..scalar.predicates import is_count
from ..scalar.pytree import register_dataclass
from ..scalar.step_types import is_coarse
from .arrays import matmul
from .gram import Gram
from .methods import inverse_of
from .recursion import Recursion, substitute
from .split import lower, upper


class Finish(abc.ABC):
    """A last improvement of codes and steps."""

    passes = 0  # over all coordinates
    fills = False  # whether weights of 0 under inputs of 0 change nothing for the others

    @property
    def descends(self) -> bool:
        """True if codes change."""
        return True

    @property
    def frees_step(self) -> bool:
        """True if each neuron's steps change."""
        return True

    def check(self, recipe: Any) -> None:
        """Raises where this finish contradicts another part of a recipe."""
        rounding = recipe.rounding
        if self.descends and (rounding.for_finish is None or (rounding.sparse and self.frees_step)):
            raise ValueError(
                f"{self} would bring back weights that {rounding} sends to 0: take finish=Refit() or None."
            )
        if self.frees_step and recipe.scale.fixed:
            raise ValueError(f"{self} changes the step that Fixed gives: take finish=Descend() or None.")
        if self.frees_step and is_coarse(recipe.step_dtype):
            raise ValueError(
                f"{self} moves steps a little, which {recipe.step_dtype} has no numbers for: take finish=Descend() or None."
            )

    @abc.abstractmethod
    def __call__(
        self, W: jax.Array, gram: Gram, codes: jax.Array, recursion: Recursion, block: int | None
    ) -> tuple[jax.Array, ScaledGrid]:
        """Better codes (in, out) and levels, for weights and Gram in the order of the recursion."""


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Refit(Finish):
    """The steps that suit the codes best: times c* = <X w, Xq q> / ||Xq q||^2, one factor per neuron.

    Where one step serves the whole matrix, one factor for all its neurons. A neuron of c* <= 0 keeps its step.

    Examples:
        >>> rule = jpfq.Rule(".*", bits=4, method=jpfq.GPFQ(), finish=jpfq.finish.Refit())
    """

    fills = True

    @property
    def descends(self):
        return False

    def __call__(self, W, gram, codes, recursion, block):
        return codes, _refit(_goal(W, gram), gram, codes, recursion)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Descend(Finish):
    """Cyclic coordinate descent on the grid as it is (CDQuant, COMQ): with nearest rounding the error never grows.

    Examples:
        >>> rule = jpfq.Rule(".*", bits=4, scale=jpfq.scale.MinMSE(), finish=jpfq.finish.Descend(passes=3))  # the steps stay
    """

    passes: int = dataclasses.field(default=3, metadata={"static": True})
    fills = True

    def __post_init__(self):
        _check_passes(self)

    @property
    def frees_step(self):
        return False

    def __call__(self, W, gram, codes, recursion, block):
        best, L = _descent(W, gram)

        def one(codes, _):
            base = best(recursion.values(codes))
            here, inputs = recursion.again(codes)
            return substitute(base, L, here, block=block, about=W, inputs=inputs).codes, None

        return lax.scan(one, codes, length=self.passes)[0], recursion.levels


@register_dataclass
@dataclasses.dataclass(frozen=True)
class CosineDescend(Finish):
    """Cyclic coordinate descent with a free step per neuron: the error never grows.

    The inner loop of Beacon (arXiv 2508.20293), here from the codes of any method. Each code takes the level that maximises
    cos(X w, Xq q), and each neuron's steps are refit after every pass. Where one step serves the whole matrix it is held
    during a pass, which then is one of `Descend`.

    `passes` over all coordinates.

    Examples:
        >>> rule = jpfq.Rule(".*", bits=3, method=jpfq.GPFQ(), finish=jpfq.finish.CosineDescend(passes=8))
    """

    passes: int = dataclasses.field(default=4, metadata={"static": True})
    fills = True

    def __post_init__(self):
        _check_passes(self)

    def __call__(self, W, gram, codes, recursion, block):
        best, L = _descent(W, gram)
        goal = _goal(W, gram)
        shared = recursion.shared

        def one(state, _):
            codes, levels = state
            here = recursion._replace(levels=levels)
            q = here.values(codes)
            if shared:
                run, inputs = here.again(codes)
                codes = substitute(best(q), L, run, block=block, about=W, inputs=inputs).codes
                return (codes, _refit(goal, gram, codes, here)), None
            product = jnp.sum(q * goal, 0)  # <X w, Xq q>, and since steps are refit also ||Xq q||^2
            own = (gram.diagonal, goal, codes)
            run, inputs = here._replace(key=None).again(codes, _Cosine(), (product, product), own)
            codes = substitute(best(q) - q, L, run, block=block, about=W, inputs=inputs).codes
            return (codes, _refit(goal, gram, codes, here)), None

        start = (codes, _refit(goal, gram, codes, recursion))
        return lax.scan(one, start, length=self.passes)[0]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class _Cosine(Rounding):
    """The level of largest cosine, all other codes held.

    With s = <X w, Xq q>, r = ||Xq q||^2 and c = s / r, changing weight t by d adds to s^2 / r

        gain(d) = (2 s e d + k d^2) / (r + 2 d r_t + d^2 h),     e = g - c r_t,  k = g^2 - c^2 r h

    where g = <Xq_t, X w>, r_t = <Xq_t, Xq q>, h = ||Xq_t||^2. It has one stationary point of s > 0, a maximum or a minimum:
    the best level is one of its two neighbours or an end of the grid.
    """

    def __call__(self, carry, a, context):
        (s, r), levels, (h, g, code) = carry, context.levels, context.inputs
        c = s / jnp.where(r > 0, r, 1)
        now = levels.decode(code)
        r_t = g - h * a
        e, k = h * a + (1 - c) * r_t, g**2 - c**2 * r * h
        bend = s * h - g * r_t  # positive where the stationary point is a maximum
        middle, _ = levels.between(now + r * e / jnp.where(bend > 0, bend, 1))
        gain, d, best = jnp.zeros_like(a), jnp.zeros_like(a), code
        for neighbour, end in ((middle, levels.lo), (middle + 1, levels.hi)):
            choice = jnp.where(bend > 0, jnp.clip(neighbour, levels.lo, levels.hi), end)
            change = levels.decode(choice) - now
            energy = r + 2 * change * r_t + change**2 * h
            gained = (2 * s * e * change + k * change**2) / jnp.where(energy > 0, energy, 1)
            better = (energy > 0) & (s + change * g > 0) & (gained > gain)
            gain, d, best = (jnp.where(better, x, y) for x, y in ((gained, gain), (change, d), (choice, best)))
        return (s + d * g, r + 2 * d * r_t + d**2 * h), best

    def error(self, levels):
        return levels.span


def _descent(W, gram) -> tuple[Any, jax.Array]:
    """The base of a pass, as a function of the values before it, and the feedback."""
    inverse = inverse_of(gram.diagonal)
    fixed, rest = W if gram.C is None else W + inverse * matmul(gram.C, W), upper(gram.H, 1)
    return lambda p: fixed + inverse * matmul(rest, W - p), inverse * lower(gram.H, -1)


def _goal(W, gram) -> jax.Array:
    """G W = Xq^T X W (in, out)."""
    return matmul(gram.H, W) + (0 if gram.C is None else matmul(gram.C, W))


def _refit(goal, gram, codes, recursion) -> ScaledGrid:
    """The levels with steps times c*."""
    levels = recursion.levels
    q = recursion.values(codes)
    made = matmul(gram.H, q)
    over, energy = jnp.sum(q * (goal - made), 0, keepdims=True), jnp.sum(q * made, 0, keepdims=True)
    if recursion.shared:
        over, energy = (recursion.neurons.sum(x).reshape(1, 1) for x in (over, energy))
    c = 1 + over / jnp.where(energy > 0, energy, 1)
    return recursion.stored(levels.scaled(lambda x: x * jnp.where(c > 0, c, 1)))


def _check_passes(finish):
    if not is_count(finish.passes):
        raise ValueError(f"{type(finish).__name__} takes at least one pass; got {finish.passes!r}.")

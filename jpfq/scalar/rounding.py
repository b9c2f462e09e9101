"""Roundings: the map Q of the recursion q = Q(A - L q), for one scalar at a time.

A rounding keeps a carry from one input coordinate of a neuron to the next, so that rules with a state (partial
sums, past errors) fit the same loop. A random one sets `random`, and then gets a key per coordinate.

    Nearest         the level p of least (a - p)^2
    Stochastic      the level below or above, at random, so that its mean is a             (SPFQ; on two levels: 1-bit UNI)
    SoftThreshold   the level of least (a - p)^2 / 2 + lam |p|                             (sparse GPFQ22)
    HardThreshold   0 if |a| <= lam, else nearest
    Prune           0 or c at random where |a| < c, with mean a, and then another rounding (UNI)
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from .grid import Number
from .predicates import may_be
from .pytree import register_dataclass
from .scale import Scale
from .scaled_grid import ScaledGrid

Unit = Literal["weight", "step", "radius"]


class RoundingContext(NamedTuple):
    """The information that a rounding has about the coordinate it is at."""

    levels: ScaledGrid  # scalars
    key: Any  # of this neuron and coordinate; None where no key was given
    inputs: Any  # its own, see `Rounding.init_all`


class Rounding(abc.ABC):
    """One neuron's rounding; the recursion maps it over neurons."""

    random: ClassVar[bool] = False  # draws from the key
    sparse: ClassVar[bool] = False  # sends weights to 0 on purpose, hence needs a grid that has 0
    fills: ClassVar[bool] = False  # whether weights of 0 beside the others change no code of theirs

    def check(self, recipe: Any) -> None:
        """Raises where this rounding contradicts another part of a recipe."""
        if self.sparse and recipe.grid.has_zero is False:
            raise ValueError(f"{self} sends weights to 0, which is no level of {recipe.grid}: take a grid with 0.")

    def refuse(self, recipe: Any, n: int, name: str) -> None:
        """Raises where this rounding cannot be used on a matrix of n inputs."""
        del recipe, n, name

    def fitted(self, scale: Scale) -> Scale:
        """The recommended scale for this rounding, where `scale` is recommended for others."""
        return scale

    def init(self) -> Any:
        """The carry before the first coordinate."""
        return ()

    def init_all(self, W: jax.Array, order: jax.Array) -> tuple[Any, Callable[[ScaledGrid], Any]]:
        """The initial carry and the inputs of the coordinates, for weights W (in, out) in the order of the recursion.

        Returns the carry of every neuron (out, ..), None for `init()`; and a function from the levels of all weights to the
        tree of arrays (in, out) or (in,) of which each coordinate sees its own entries.
        """
        del W, order
        return None, lambda levels: ()

    def constrain(
        self, codes: jax.Array, levels: ScaledGrid, order: jax.Array, rounding: "Rounding", carry: Any, inputs: Any
    ) -> tuple["Rounding", Any, Any]:
        """`rounding` for a pass over `codes`, its carry and its inputs, constrained to what this one promises."""
        del codes, levels, order
        return rounding, carry, inputs

    @abc.abstractmethod
    def __call__(self, carry: Any, a: jax.Array, context: RoundingContext) -> tuple[Any, jax.Array]:
        """Rounds the argument `a` of one coordinate (a scalar) to a code; returns the new carry and the code."""

    def shift(self, carry: Any) -> jax.Array | None:
        """The amount fed back beyond the value of the code just made, by the carry after it; None for nothing."""
        del carry

    @abc.abstractmethod
    def error(self, levels: ScaledGrid) -> jax.Array:
        """The largest |a - q| of an argument within the range of the grid, in the shape of `levels.step`."""

    @property
    def for_finish(self) -> "Rounding | None":
        """The rounding that coordinate descent uses afterwards; None if it would undo this rounding."""
        return self


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Nearest(Rounding):
    """The level p that minimises (a - p)^2; of two at equal distance the upper one.

    Examples:
        >>> rule = jpfq.Rule(".*", bits=4, rounding=jpfq.rounding.Nearest())  # as it is without being named
    """

    fills = True

    def __call__(self, carry, a, context):
        return carry, context.levels.encode(a)

    def error(self, levels):
        return levels.gap / 2


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Stochastic(Rounding):
    """One of the two levels around a, at random, with mean a: step (floor(x) + Bernoulli(x - floor(x))), x = a / step.

    On a table the upper level has the probability (a - below) / (above - below), so the mean is a too.

    Beyond the grid it saturates. On `Binary()` this is the unbiased 1-bit operator: +-K with P(+K) = (1 + a / K) / 2.
    Source: SPFQ (Zhang, Saab 2023) section 2; the unified framework (H. Zhang, Saab 2024) for one bit.

    Examples:
        >>> tensor, info = jpfq.solve(W, gram, bits=4, rounding=jpfq.rounding.Stochastic(), key=key)
    """

    random = True
    fills = True

    def __call__(self, carry, a, context):
        below, share = context.levels.between(a)
        up = jax.random.uniform(context.key, dtype=share.dtype) < share
        return carry, jnp.clip(jnp.where(up, below + 1, below), context.levels.lo, context.levels.hi)

    def error(self, levels):
        return levels.gap

    @property
    def for_finish(self):
        return Nearest()


class _Threshold(Rounding):
    """A rounding with a threshold: a number in units of the weights, of the step, or of the radius (the top level)."""

    sparse = True
    unit: Unit

    def _of(self, threshold, levels):
        unit = {"weight": 1, "step": levels.step, "radius": levels.radius}[self.unit]
        return jnp.asarray(threshold, levels.step.dtype) * unit


@register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftThreshold(_Threshold):
    """Shrink by `lam`, then round to the nearest level.

    On a uniform grid that is the level p which minimises (a - p)^2 / 2 + lam |p| (GPFQ22 with an l1 penalty).

    `unit` is what `lam` is measured in: "weight", "step", or "radius", the largest level.

    Examples:
        >>> tensor, info = jpfq.solve(W, gram, bits=4, rounding=jpfq.rounding.SoftThreshold(0.1, unit="radius"))
        >>> float(info.sparsity) == float((tensor.codes == 0).mean())
        True
    """

    lam: Number
    unit: Unit = dataclasses.field(default="weight", metadata={"static": True})

    def __post_init__(self):
        _check_threshold(self.lam, self.unit, "SoftThreshold: lam")

    def __call__(self, carry, a, context):
        shrunk = jnp.maximum(jnp.abs(a) - self._of(self.lam, context.levels), 0)
        return carry, context.levels.encode(jnp.sign(a) * shrunk)

    def error(self, levels):
        return levels.gap / 2 + self._of(self.lam, levels)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class HardThreshold(_Threshold):
    """0 where |a| <= lam, else the nearest level.

    GPFQ22's l0 variant on a grid that can be stored: there the levels are +-(lam + k step), which is not uniform.

    `unit` is what `lam` is measured in: "weight", "step", or "radius", the largest level.

    Examples:
        >>> rule = jpfq.Rule(".*", bits=4, rounding=jpfq.rounding.HardThreshold(1.0, unit="step"))
    """

    lam: Number
    unit: Unit = dataclasses.field(default="weight", metadata={"static": True})

    def __post_init__(self):
        _check_threshold(self.lam, self.unit, "HardThreshold: lam")

    def __call__(self, carry, a, context):
        levels = context.levels
        return carry, jnp.where(jnp.abs(a) <= self._of(self.lam, levels), levels.zero_code, levels.encode(a))

    def error(self, levels):
        return jnp.maximum(levels.gap / 2, self._of(self.lam, levels))


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Prune(_Threshold):
    """Where |a| < c: c sign(a) with probability |a| / c, else 0, which has mean a. Then the rounding `then`.

    With `Stochastic` after it the whole is unbiased, and |a - q| <= c + step; with c a multiple of the step the second
    rounding does not change values that the first one changed (H. Zhang, Saab 2024). `prune` is the first part alone.

    `unit` is what `c` is measured in: "weight", "step", or "radius", the largest level.

    Examples:
        >>> rule = jpfq.Rule(".*", bits=4, method=jpfq.UNI(), rounding=jpfq.rounding.Prune(2.0, unit="step"))  # takes a key
    """

    random = True

    c: Number
    unit: Unit = dataclasses.field(default="weight", metadata={"static": True})
    then: Rounding = Stochastic()

    def __post_init__(self):
        _check_threshold(self.c, self.unit, "Prune: c")

    def init(self):
        return self.then.init()

    def __call__(self, carry, a, context):
        first, second = jax.random.split(context.key)
        return self.then(carry, prune(a, self._of(self.c, context.levels), first), context._replace(key=second))

    def error(self, levels):
        return self._of(self.c, levels) + self.then.error(levels)

    @property
    def for_finish(self):
        return None


def prune(a: jax.Array, c: jax.Array, key: jax.Array) -> jax.Array:
    """a where |a| >= c; else c sign(a) with probability |a| / c and 0 otherwise: unbiased pruning, without quantization."""
    kept = jax.random.uniform(key, jnp.shape(a), a.dtype) * c < jnp.abs(a)
    return jnp.where(jnp.abs(a) >= c, a, jnp.where(kept, c * jnp.sign(a), 0))


def _check_threshold(x, unit, what):
    if not may_be(x, lambda x: x >= 0):
        raise ValueError(f"{what} must be a number, 0 or more; got {x!r}.")
    if unit not in ("weight", "step", "radius"):
        raise ValueError(f"unit is 'weight', 'step' or 'radius'; got {unit!r}.")

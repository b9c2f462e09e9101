"""Scales: from weights to the step (and zero point) of a grid.

A scale is two choices. How an interval is read off a set of weights: `AbsMax`, `Quantile`, `Median`, `MinMSE`, `MinError`
(by running the recursion), or the step itself given by `Fixed`. And which weights share it: `PerTensor`, `PerChannel`,
`PerGroup(size)`, `PerBlock(size, neurons)`. On a symmetric grid the interval is [-radius, radius] and step = radius / reach;
on `Asymmetric` it is [low, high], widened to contain 0, with step = (high - low) / (levels - 1) and
zero = round(-low / step); on `Offset` likewise, with offset = -low.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from .exponent import exponent_of, reduced
from .grid import Grid, Number, is_number
from .per import Per, PerChannel, PerTensor, static
from .predicates import is_count
from .pytree import register_dataclass
from .scaled_grid import ScaledGrid


def _check_positive(x, what):
    if isinstance(x, (str, Per)) or (is_number(x) and not x > 0):
        raise ValueError(f"{what} must be a positive number; got {x!r}.")


class Scale(abc.ABC):
    """A rule that lays a grid over a weight matrix."""

    per: Per
    searches: ClassVar[bool] = False  # the recursion itself chooses the steps, among multiples of others
    fixed: ClassVar[bool] = False  # the caller chose the steps, which are to stay

    @abc.abstractmethod
    def __call__(self, W: jax.Array, grid: Grid, importance: jax.Array | None = None) -> ScaledGrid:
        """Levels for W (in, out); `step` is (groups, out), with 1 in place of an axis that shares one step.

        Where blocks of neurons share steps, it is (groups, blocks).

        `importance` (in, out) is what a square error of each weight costs in the output, as far as known: diag(H).
        """

    @property
    def shared(self) -> bool:
        """True if one step serves all neurons."""
        return self.per.neurons is None

    @property
    def local(self) -> bool:
        """True if the steps of a neuron follow from its own weights."""
        return self.per.neurons == 1

    @property
    def in_blocks(self) -> bool:
        """True if several neurons share a step, but not all."""
        return not (self.shared or self.per.neurons == 1)

    def run(self, n: int) -> int:
        """The number of consecutive inputs, of n, that share a step."""
        return self.per.run(n)

    def fills(self, grid: Grid) -> bool:
        """True if weights of 0 beside the others change no step of theirs on this grid."""
        del grid
        return False

    @property
    def runs(self) -> int:
        """The number of times that the recursion runs until the steps are found."""
        return 1

    def multiples(self, dtype) -> tuple[jax.Array, list[jax.Array]] | None:
        """Multiples of the steps, among which the recursion is to find the one of least output error; None: no search.

        Returns the least one, and for each round the offsets: from the least in the first, then from the best so far.
        """
        return None


class Based(Scale):
    """A rule that starts from another, and lets the same weights share a step."""

    base: Scale

    def run(self, n):
        return self.base.run(n)

    def fills(self, grid):
        return self.base.fills(grid)

    @property
    def per(self) -> Per:  # type: ignore[override]
        return self.base.per

    @property
    def shared(self):
        return self.base.shared

    @property
    def local(self):
        return self.base.local


@register_dataclass
@dataclasses.dataclass(frozen=True)
class AbsMax(Scale):
    """radius = c max |w|: nothing is clipped at c = 1.

    `per` says which weights share a step: `PerTensor()`, `PerChannel()` or `PerGroup(size)`.

    Examples:
        >>> rule = jpfq.Rule(".*", bits=4, scale=jpfq.scale.AbsMax(0.9, per=jpfq.scale.PerGroup(16)))
    """

    c: Number = 1.0
    per: Per = static(PerChannel())

    def __post_init__(self):
        _check_positive(self.c, "AbsMax: the factor c")

    def fills(self, grid):
        return True

    def __call__(self, W, grid, importance=None):
        return lay(*_min_max(self.per.split(W), self.c, grid), grid)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantile(Scale):
    """radius = c times the p-quantile of |w|; per tensor, its mean over the neurons (GPFQ22, SPFQ).

    `per` says which weights share a step.

    Examples:
        >>> rule = jpfq.Rule(".*", grid=jpfq.Symmetric(8), scale=jpfq.scale.Quantile(p=0.99, c=1.1))
    """

    p: Number = 1.0
    c: Number = 1.0
    per: Per = static(PerTensor())

    def __post_init__(self):
        _check_positive(self.c, "Quantile: the factor c")
        if is_number(self.p) and not 0 < self.p <= 1:
            raise ValueError(f"Quantile takes a share p in (0, 1]; got {self.p!r}.")

    def __call__(self, W, grid, importance=None):
        shared = self.shared
        groups = (PerChannel() if shared else self.per).split(W)
        p = jnp.asarray(self.p, W.dtype)
        if grid.alphabet().zero is None:
            low, high = jnp.quantile(groups, 1 - p, axis=1), jnp.quantile(groups, p, axis=1)
        else:
            high = jnp.quantile(jnp.abs(groups), p, axis=1)
            low = -high
        if shared:
            low, high = low.mean(1, keepdims=True), high.mean(1, keepdims=True)
        return lay(self.c * low, self.c * high, grid)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Median(Scale):
    """radius = c median |w| (GPFQ20, with c = 1 .. 10 searched). For symmetric grids.

    `per` says which weights share a step.

    Examples:
        >>> jpfq.scale.Median(3.0)(W, jpfq.Ternary()).step.shape  # one for the whole matrix
        (1, 1)
    """

    c: Number = 3.0
    per: Per = static(PerTensor())

    def __post_init__(self):
        _check_positive(self.c, "Median: the factor c")

    def __call__(self, W, grid, importance=None):
        if grid.alphabet().zero is None:
            raise ValueError(
                f"Median gives one radius, but {_kind(grid)} needs two ends: use AbsMax, Quantile or MinMSE."
            )
        radius = self.c * jnp.median(jnp.abs(self.per.split(W)), axis=1)
        return lay(-radius, radius, grid)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class MinMSE(Scale):
    """The interval of least sum |w - nearest(w)|^norm among shrunk copies of [min, max].

    The copies are p [min, max] for `candidates` values of p, evenly spaced from 1 down to `least`. OPTQ's `mse` option is
    the same with norm 2.4 and eighty candidates down to .2. `weighted` multiplies each term by the energy of its input
    coordinate, diag(H).

    `per` says which weights share a step.

    Examples:
        >>> levels = jpfq.scale.MinMSE()(W, jpfq.Integer(3))
        >>> bool((levels.step <= jpfq.scale.AbsMax()(W, jpfq.Integer(3)).step).all())  # never wider than [min, max]
        True
    """

    norm: float = static(2)
    candidates: int = static(40)
    least: Number = 0.2
    per: Per = static(PerChannel())
    weighted: bool = static(False)

    def __post_init__(self):
        _check_positive(self.norm, "MinMSE: the norm")
        if not is_count(self.candidates, 2):
            raise ValueError(f"MinMSE takes two candidates or more; got {self.candidates!r}.")
        if is_number(self.least) and not 0 < self.least < 1:
            raise ValueError(f"MinMSE takes a least share in (0, 1); got {self.least!r}.")

    def fills(self, grid):
        return grid.has_zero is True

    def __call__(self, W, grid, importance=None):
        groups = self.per.split(W)
        if self.weighted and importance is None:
            raise ValueError("MinMSE(weighted=True) needs the importance of each weight, diag(H).")
        weight = self.per.split(importance) if self.weighted and importance is not None else jnp.ones((), W.dtype)
        low, high = _min_max(groups, 1.0, grid)
        k = exponent_of(jnp.max(jnp.abs(groups)))

        def attempt(best, shrink):
            levels = lay(shrink * low, shrink * high, grid)
            levels = levels.with_steps(levels.step[:, None], levels.zero[:, None])
            error = reduced(groups - levels.decode(levels.encode(groups)), k)
            cost = jnp.sum(weight * jnp.abs(error) ** self.norm, axis=1)
            return (jnp.minimum(cost, best[0]), jnp.where(cost < best[0], shrink, best[1])), None

        start = (jnp.full_like(high, jnp.inf), jnp.ones_like(high))
        (_, shrink), _ = jax.lax.scan(attempt, start, jnp.linspace(1, self.least, self.candidates, dtype=W.dtype))
        return lay(shrink * low, shrink * high, grid)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class MinError(Based):
    """The multiple of another scale that leaves the least output error ||X w - Xq q||, found by running the recursion.

    `candidates` multiples, evenly spaced from `least` to `most`, are tried by method and rounding themselves; each neuron
    takes its own best one (all together where one step serves the whole matrix). Then as many between its neighbours, and
    so on, `rounds` times in all.

    `base` is the scale whose steps are multiplied.

    Examples:
        >>> tensor, info = jpfq.solve(W, gram, bits=3, scale=jpfq.scale.MinError(jpfq.scale.AbsMax(), least=0.4))
        >>> jpfq.scale.MinError(candidates=8, rounds=2).runs  # of the recursion
        16
    """

    base: Scale = AbsMax()
    least: Number = 0.3
    most: Number = 1.0
    candidates: int = static(8)
    rounds: int = static(2)
    searches = True

    def __post_init__(self):
        for x in (self.least, self.most):
            _check_positive(x, "MinError: a multiple")
        if is_number(self.least) and is_number(self.most) and not self.least < self.most:
            raise ValueError(f"MinError searches from least to most; got {self.least!r} to {self.most!r}.")
        if not is_count(self.candidates, 2):
            raise ValueError(f"MinError takes two candidates or more; got {self.candidates!r}.")
        if not is_count(self.rounds):
            raise ValueError(f"MinError takes one round or more; got {self.rounds!r}.")
        if isinstance(self.base, Scale) and self.base.searches:
            raise ValueError("MinError searches among multiples of a plain scale, not of another search.")

    @property
    def runs(self):
        return self.candidates * self.rounds

    def __call__(self, W, grid, importance=None):
        return self.base(W, grid, importance)

    def multiples(self, dtype):
        # Offsets are multiplied here and added elsewhere: a compiler may fuse a product and a sum, which rounds once instead
        # of twice, and the runs of a sweep are to agree with single ones to the bit.
        first, inner = np.linspace(0, 1, self.candidates), np.linspace(-1, 1, self.candidates + 2)[1:-1]
        # Each round looks between the neighbours of the best so far.
        reaches = (2 / (self.candidates + 1)) ** np.arange(self.rounds - 1) / (self.candidates - 1)
        least, most = (jnp.asarray(x, dtype) for x in (self.least, self.most))
        return least, [(most - least) * jnp.asarray(x, dtype) for x in (first, *(reach * inner for reach in reaches))]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Fixed(Scale):
    """The step itself, in units of the weights: a number, or an array that broadcasts to (groups, out).

    Examples:
        >>> tensor, info = jpfq.solve(W, gram, bits=4, scale=jpfq.scale.Fixed(0.25))
        >>> tensor.step.shape, bool((tensor.step == 0.25).all())
        ((1, 1), True)
    """

    step: Any
    per = PerChannel()  # not a setting: the shape of the step says it
    fixed = True

    def __post_init__(self):
        _check_positive(self.step, "Fixed: the step")

    @property
    def shared(self):
        return jnp.shape(self.step)[-1:] in ((), (1,))

    @property
    def local(self):
        return False

    def run(self, n):
        return n // self.step.shape[0] if jnp.ndim(self.step) == 2 else n

    def __call__(self, W, grid, importance=None):
        if grid.alphabet().zero is None:
            raise ValueError(f"Fixed gives a step but no zero point, which {_kind(grid)} needs: use AbsMax or MinMSE.")
        step = jnp.asarray(self.step, W.dtype)
        if step.ndim > 2 or (step.ndim and step.shape[-1] not in (1, W.shape[1])):
            raise ValueError(
                f"Fixed was given a step of shape {step.shape}; a kernel of {W.shape[1]} neurons takes a number, "
                f"({W.shape[1]},) or (groups, {W.shape[1]})."
            )
        step = step.reshape((1,) * (2 - step.ndim) + step.shape)
        if W.shape[0] % step.shape[0]:
            raise ValueError(f"Fixed has {step.shape[0]} groups, which do not divide {W.shape[0]} input coordinates.")
        return _levels(step, None, grid)


def _min_max(groups, c, grid):
    """[c min, c max] of each group, made symmetric unless the grid fits its zero point."""
    if grid.alphabet().zero is None:
        return c * groups.min(1), c * groups.max(1)
    radius = c * jnp.abs(groups).max(1)
    return -radius, radius


def ends_of(low: jax.Array, high: jax.Array, grid: Grid) -> tuple[jax.Array, jax.Array]:
    """An interval that the grid can cover: symmetric about 0 unless its zero point is fitted."""
    if grid.alphabet().zero is None:
        return jnp.minimum(low, 0), jnp.maximum(high, 0)
    radius = jnp.maximum(jnp.abs(low), jnp.abs(high))
    return -radius, radius


def lay(low, high, grid: Grid, store: Callable | None = None) -> ScaledGrid:
    """The grid over the intervals [low, high]. `store` rounds steps as they are stored, and zero points fit those."""
    lo, hi, zero, reach = grid.alphabet()
    if reach is None:
        raise ValueError(
            "Infinite has no largest level to put a radius on: give its step with scale=jpfq.scale.Fixed(step)."
        )
    number = lambda x: jnp.asarray(x, high.dtype)  # of a traced integer
    if zero is not None:
        step = high / number(reach)
        return _levels(step if store is None else store(step), zero, grid)
    low, high = jnp.minimum(low, 0), jnp.maximum(high, 0)
    step = (high - low) / number(hi - lo)
    step = step if store is None else store(step)
    if grid.offset:
        return _levels(step, -low, grid)
    zero = jnp.floor(-low / jnp.where(step > 0, step, 1) + 0.5)
    return _levels(step, zero if store is None else jnp.minimum(zero, number(hi)), grid)  # 0 stays a level


def _levels(step, zero, grid: Grid) -> ScaledGrid:
    lo, hi, fixed_zero, _ = grid.alphabet()
    lo, hi, zero = (jnp.asarray(x, step.dtype) for x in (lo, hi, fixed_zero if zero is None else zero))
    zero = jnp.broadcast_to(zero, step.shape)
    return ScaledGrid(step, zero, lo, hi, *levels_of(grid, step.dtype), grid.offset)


def levels_of(grid: Grid, dtype) -> tuple[jax.Array | None, jax.Array | None]:
    """Table and unit of a grid, for `ScaledGrid`."""
    number = lambda x: None if x is None or grid.table is None else jnp.asarray(x, dtype)
    return number(grid.table), number(grid.unit)


def _kind(grid) -> str:
    """The name of a grid whose zero point or offset is fitted; within a solve it comes as bare codes."""
    return "Offset" if grid.offset else "Asymmetric"

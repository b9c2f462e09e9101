"""Ranges: from a histogram of a layer's inputs to the step (and zero point) of a grid.

Max            all of [min, max]
Percentile     what lies between the outer shares of the numbers
MinMSE         the shrunk interval of least square error
KL             the shrunk interval whose rounded histogram diverges least from the histogram (TensorRT)
"""

import abc
import dataclasses
from typing import Self

import jax
import jax.numpy as jnp

from .grid import Grid, Number
from .predicates import is_count, may_be
from .pytree import register_dataclass
from .scale import ends_of, lay
from .scaled_grid import ScaledGrid

BINS = 2048


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Histogram:
    """The counts of numbers in equal bins over [low, high]; histograms over one interval add.

    Fields: `counts` (bins,) over equal bins from `low` to `high`, the least and the largest number.

    Examples:
        >>> histogram = jpfq.ranges.Histogram.over(X.min(), X.max()).add(X)
        >>> int(histogram.counts.sum()) == X.size
        True
    """

    counts: jax.Array  # (bins,)
    low: jax.Array  # ()  the least number
    high: jax.Array  # ()

    @classmethod
    def over(cls, low: jax.Array, high: jax.Array, bins: int = BINS) -> Self:
        """An empty one."""
        return cls(jnp.zeros(bins, low.dtype), low, high)

    def add(self, x: jax.Array, weights: jax.Array | None = None) -> Self:
        """With the numbers of `x`, each as often as `weights` of the same shape say."""
        width = (self.high - self.low) / self.counts.size
        bins = jnp.clip((x - self.low) / jnp.where(width > 0, width, 1), 0, self.counts.size - 1).astype(jnp.int32)
        weights = None if weights is None else weights.ravel().astype(self.counts.dtype)
        new = jnp.bincount(bins.ravel(), weights, length=self.counts.size).astype(self.counts.dtype)
        return dataclasses.replace(self, counts=self.counts + new)

    @property
    def centres(self) -> jax.Array:
        """The middle of each bin (bins,)."""
        share = (jnp.arange(self.counts.size, dtype=self.counts.dtype) + 0.5) / self.counts.size
        return self.low + share * (self.high - self.low)


class Range(abc.ABC):
    """A rule that lays a grid over the inputs of a layer.

    Examples:
        >>> isinstance(jpfq.ranges.Max(), jpfq.ranges.Range)
        True
    """

    @property
    def needs_counts(self) -> bool:
        """True if more is asked for than the least and the largest number."""
        return True

    @abc.abstractmethod
    def __call__(self, histogram: Histogram, grid: Grid) -> ScaledGrid:
        """Levels with one step and zero point, of shape ()."""


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Max(Range):
    """All inputs seen, from the least to the largest: nothing is clipped.

    Examples:
        >>> inputs = jpfq.Activations(jpfq.Integer(8), jpfq.ranges.Max())
    """

    @property
    def needs_counts(self):
        return False

    def __call__(self, histogram, grid):
        return lay(*ends_of(histogram.low, histogram.high, grid), grid)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Percentile(Range):
    """The interval that leaves a share of (1 - p) / 2 of the inputs outside at each end.

    A grid of fixed zero reaches to the p-quantile of |x| instead.

    Examples:
        >>> inputs = jpfq.Activations(jpfq.Integer(8), jpfq.ranges.Percentile(p=0.999))
    """

    p: Number = 0.9999

    def __post_init__(self):
        if not may_be(self.p, lambda x: 0.5 < x <= 1):
            raise ValueError(f"Percentile takes a share p in (0.5, 1], such as 0.999; got {self.p!r}.")

    def __call__(self, histogram, grid):
        p = jnp.asarray(self.p, histogram.counts.dtype)
        if _fits_zero(grid):
            edge = lambda share: _quantile(histogram.centres, histogram.counts, share)
            low, high = edge((1 - p) / 2), edge((1 + p) / 2)
        else:
            order = jnp.argsort(jnp.abs(histogram.centres))
            high = _quantile(jnp.abs(histogram.centres)[order], histogram.counts[order], p)
            low = -high
        all_of = p >= 1
        return lay(*ends_of(jnp.where(all_of, histogram.low, low), jnp.where(all_of, histogram.high, high), grid), grid)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class MinMSE(Range):
    """The interval of least mean square error; where the zero point is fitted, both ends are moved.

    `candidates` is the number of shrunk copies that are tried.

    Examples:
        >>> inputs = jpfq.Activations(jpfq.Asymmetric(4), jpfq.ranges.MinMSE(candidates=64))
    """

    candidates: int = dataclasses.field(default=32, metadata={"static": True})

    def __post_init__(self):
        _check_candidates(self)

    def __call__(self, histogram, grid):
        x, counts = histogram.centres, histogram.counts

        def cost(levels):
            return jnp.sum(counts * (x - levels.decode(levels.encode(x))) ** 2)

        return _best(cost, histogram, grid, self.candidates, both=True)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class KL(Range):
    """The interval whose rounded histogram has the least Kullback-Leibler divergence from the histogram itself.

    What lies outside counts at the ends; each level spreads its share evenly over the bins it rounds that are not empty.
    Bins in which the inputs are exactly 0, as after ReLU, do not count.

    `candidates` is the number of shrunk copies that are tried.

    Examples:
        >>> inputs = jpfq.Activations(jpfq.Integer(8), jpfq.ranges.KL())
    """

    candidates: int = dataclasses.field(default=100, metadata={"static": True})

    def __post_init__(self):
        _check_candidates(self)

    def __call__(self, histogram, grid):
        x, width = histogram.centres, (histogram.high - histogram.low) / histogram.counts.size
        counts = jnp.where(jnp.abs(x) <= width / 2, 0, histogram.counts)
        bins = jnp.arange(counts.size)

        def cost(levels):
            inside = ~levels.saturates(x)
            first, last = jnp.argmax(inside), counts.size - 1 - jnp.argmax(inside[::-1])
            clipped = jnp.zeros_like(counts).at[jnp.clip(bins, first, last)].add(counts)
            kept = jnp.where(inside, counts, 0)
            codes = levels.encode(x)
            level = jnp.cumsum(jnp.diff(codes, prepend=codes[:1]) != 0)  # codes ascend: a number for each
            filled = jnp.zeros_like(counts).at[level].add((kept > 0).astype(counts.dtype))
            share = jnp.zeros_like(counts).at[level].add(kept) / jnp.maximum(filled, 1)
            rounded = jnp.where(kept > 0, share[level], 0)
            p, q = clipped / jnp.maximum(clipped.sum(), 1), rounded / jnp.maximum(rounded.sum(), 1)
            return jnp.sum(jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1) / jnp.maximum(q, 1e-9)), 0))

        return _best(cost, histogram, grid, self.candidates, both=False)


def _best(cost, histogram, grid, candidates, both) -> ScaledGrid:
    """Among shrunk copies of the interval, the levels of least cost. The copies differ by steps of 1 / candidates."""
    low, high = ends_of(histogram.low, histogram.high, grid)
    shares = jnp.linspace(1, 1 / candidates, candidates, dtype=high.dtype)
    if both and _fits_zero(grid):
        lows, highs = (x.ravel() for x in jnp.meshgrid(shares, shares))
    else:
        lows = highs = shares
    costs = jax.lax.map(lambda c: cost(lay(c[0] * low, c[1] * high, grid)), (lows, highs))
    best = jnp.argmin(costs)
    return lay(lows[best] * low, highs[best] * high, grid)


def _fits_zero(grid):
    return grid.alphabet().zero is None


def _quantile(x, counts, share):
    """The first x below or at which there is that share of the counts; x ascends."""
    below = jnp.cumsum(counts)
    return x[jnp.argmax(below >= share * below[-1])]


def _check_candidates(range_):
    if not is_count(range_.candidates, 2):
        raise ValueError(f"{type(range_).__name__} takes two candidates or more; got {range_.candidates!r}.")

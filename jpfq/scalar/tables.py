"""Grids that are tables: sorted levels at any distances, of which a code is the index.

    Levels(values)      the numbers that are named
    E2M1 .. E5M2        floating point of 4, 6 and 8 bits, finite values only, as the OCP formats define them
    NF4                 the sixteen quantiles of QLoRA (arXiv 2305.14314)
    PowersOfTwo(bits)   0 and +-2^-k

Rounding to the nearest level takes the upper one of two at equal distance, as on every grid here. The floating-point
standards take the one of even mantissa: the two differ exactly where a value lies halfway and the lower level is even.
"""

import dataclasses
import functools
import math
from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np

from .grid import Alphabet, Grid, is_number
from .predicates import is_count
from .pytree import refuse_traced, register_dataclass

MAX_ENTRIES = 256
LLOYD_ROUNDS = 500
SHOWN_LEVELS = 4  # up to which tables of results spell them out
LARGEST_INTEGER = 2**24  # a level in units of `Alphabet.unit`: float32 holds every integer up to here


class Table(Grid):
    """A grid whose levels are a table. The largest magnitude is what a scale puts its radius on."""

    values: tuple[float, ...]  # the levels in units of the step, ascending

    def alphabet(self):
        return Alphabet(0, len(self.values) - 1, 0, max(map(abs, self.values)))

    @property
    def table(self):
        return np.asarray(self.values)

    @property
    def unit(self):
        return _unit(self.values)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Levels(Table):
    """The levels that are named: `values` are from 2 to 256 finite numbers, ascending, in units of the step.

    `reach` is the number that a scale puts its radius on; left out, the largest magnitude among the levels.

    Examples:
        >>> tensor, info = jpfq.solve(W, gram, grid=jpfq.Levels([-4, -1, 0, 1, 4]))
        >>> tensor.levels.table.tolist()
        [-4.0, -1.0, 0.0, 1.0, 4.0]
    """

    values: tuple[float, ...] = dataclasses.field(metadata={"static": True})
    reach: float | None = dataclasses.field(default=None, metadata={"static": True})

    def __post_init__(self):
        for name in ("values", "reach"):
            refuse_traced("Levels", name, getattr(self, name))
        object.__setattr__(self, "values", _checked(self.values))
        if self.reach is not None and not (is_number(self.reach) and 0 < self.reach < math.inf):
            raise ValueError(f"Levels: reach is a positive number of steps; got {self.reach!r}.")

    def alphabet(self):
        return super().alphabet() if self.reach is None else super().alphabet()._replace(reach=self.reach)

    def __str__(self):
        if len(self.values) <= SHOWN_LEVELS:
            return repr(self)
        return f"Levels({len(self.values)} from {self.values[0]:.3g} to {self.values[-1]:.3g})"

    @property
    def table_bits(self):
        return 32 * len(self.values)

    @classmethod
    def fit(cls, weights: Any, count: int, importance: Any = None) -> "Levels":
        """A codebook: the levels of least weighted square error for numbers, by Lloyd's algorithm (Lloyd 1982, Max 1960).

        A scale puts its radius on 1, of which the largest level falls short.

        Args:
            weights: numbers of any shape, each divided by the radius that a scale finds for it.
            count: of levels, from 2 to 256.
            importance: what a square error of each costs, of a shape that broadcasts to theirs, such as diag(H)[:, None];
                left out, all count alike.

        Raises:
            ValueError: the numbers are not finite, or there are fewer different ones than levels.

        Examples:
            >>> grid = jpfq.Levels.fit(W / abs(W).max(0), 16, importance=gram.diagonal[:, None])
            >>> tensor, info = jpfq.solve(W, gram, grid=grid)
            >>> grid.levels, tensor.bits_per_weight  # 4, 32 / 32 for a step, and 32 * 16 / 256 for the table
            (16, 7.0)
        """
        return cls(_lloyd(weights, count, importance), 1.0)


class _Float(Table):
    """The finite values of a floating-point type, -0 being 0."""

    type: str

    @property
    def values(self):  # type: ignore[override]
        return _finite_values(self.type)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class E2M1(_Float):
    """FP4: 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives, the codes of MXFP4 and NVFP4.

    Examples:
        >>> jpfq.E2M1().values[-4:], jpfq.E2M1().levels
        ((2.0, 3.0, 4.0, 6.0), 15)
    """

    type = "float4_e2m1fn"


@register_dataclass
@dataclasses.dataclass(frozen=True)
class E2M3(_Float):
    """FP6 of two bits of exponent, up to 7.5.

    Examples:
        >>> jpfq.E2M3().values[-1], jpfq.E2M3().storage_bits
        (7.5, 6)
    """

    type = "float6_e2m3fn"


@register_dataclass
@dataclasses.dataclass(frozen=True)
class E3M2(_Float):
    """FP6 of three bits of exponent, up to 28.

    Examples:
        >>> jpfq.E3M2().values[-1], jpfq.E3M2().storage_bits
        (28.0, 6)
    """

    type = "float6_e3m2fn"


@register_dataclass
@dataclasses.dataclass(frozen=True)
class E4M3(_Float):
    """FP8 of four bits of exponent and no infinities (`float8_e4m3fn`), up to 448.

    Examples:
        >>> jpfq.E4M3().values[-1], jpfq.E4M3().levels
        (448.0, 253)
    """

    type = "float8_e4m3fn"


@register_dataclass
@dataclasses.dataclass(frozen=True)
class E5M2(_Float):
    """FP8 of five bits of exponent (`float8_e5m2`), up to 57344.

    Examples:
        >>> jpfq.E5M2().values[-1], jpfq.E5M2().levels
        (57344.0, 247)
    """

    type = "float8_e5m2"


@register_dataclass
@dataclasses.dataclass(frozen=True)
class NF4(Table):
    """The sixteen levels of NormalFloat, quantiles of a normal distribution in [-1, 1] with 0 among them (QLoRA).

    Examples:
        >>> jpfq.NF4().values[0], jpfq.NF4().values[7], jpfq.NF4().levels
        (-1.0, 0.0, 16)
    """

    @property
    def values(self):  # type: ignore[override]
        return _NF4


@register_dataclass
@dataclasses.dataclass(frozen=True)
class PowersOfTwo(Table):
    """0 and +-2^-k, k = 0 .. 2^(bits - 1) - 2: products with these weights are shifts.

    Examples:
        >>> jpfq.PowersOfTwo(3).values
        (-1.0, -0.5, -0.25, 0.0, 0.25, 0.5, 1.0)
    """

    bits: int = dataclasses.field(metadata={"static": True})

    def __post_init__(self):
        refuse_traced("PowersOfTwo", "bits", self.bits)
        if not is_count(self.bits, 2) or self.bits > 6:
            raise ValueError(f"PowersOfTwo takes from 2 to 6 bits; got {self.bits!r}.")

    @property
    def values(self):  # type: ignore[override]
        powers = [2.0**-k for k in range(2 ** (self.bits - 1) - 1)]
        return (*(-x for x in powers), 0.0, *reversed(powers))


_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


@functools.cache
def _finite_values(name: str) -> tuple[float, ...]:
    dtype = np.dtype(getattr(jnp, name))
    bits = {"float4": 4, "float6": 6, "float8": 8}[name.split("_")[0]]
    values = np.arange(2**bits, dtype=np.uint8).view(dtype).astype(np.float64)
    return tuple(float(x) for x in np.unique(values[np.isfinite(values)] + 0.0))


@functools.cache
def _unit(values: tuple[float, ...]) -> float | None:
    """The largest number that all values are integer multiples of, if the multiples are small."""
    parts = [Fraction(x) for x in values if x]
    denominator = math.lcm(*(x.denominator for x in parts))
    divisor = math.gcd(*(x.numerator * (denominator // x.denominator) for x in parts))
    unit = Fraction(divisor, denominator)
    return float(unit) if max(abs(x) / unit for x in parts) <= LARGEST_INTEGER else None


def _lloyd(weights, count, importance) -> tuple[float, ...]:
    """Levels that are the weighted means of the numbers nearest to them."""
    if not is_count(count, 2) or count > MAX_ENTRIES:
        raise ValueError(f"Levels.fit takes from 2 to {MAX_ENTRIES} levels; got {count!r}.")
    x = np.asarray(weights, np.float64)
    w = np.broadcast_to(1.0 if importance is None else np.asarray(importance, np.float64), x.shape).ravel()
    if not (np.isfinite(x).all() and np.isfinite(w).all() and (w >= 0).all() and w.any()):
        raise ValueError(
            "Levels.fit takes finite numbers, and importance that is positive somewhere and nowhere below 0."
        )
    x, place = np.unique(x.ravel()[w > 0], return_inverse=True)
    if (distinct := np.unique(x.astype(np.float32)).size) < count:
        raise ValueError(f"Levels.fit was asked for {count} levels, but there are {distinct} different numbers.")
    w = np.bincount(place.ravel(), w[w > 0])
    mass, moment = (np.concatenate([[0.0], np.cumsum(sums)]) for sums in (w, w * x))
    parts = np.arange(1, count)
    ends = np.searchsorted(mass, mass[-1] * parts / count)
    ends = np.minimum(np.maximum.accumulate(ends - parts).clip(0), x.size - count) + parts  # a number at least in each
    levels = np.zeros(count)
    for _ in range(LLOYD_ROUNDS):
        ends = np.concatenate([[0], ends, [x.size]])
        parts = np.diff(mass[ends]) > 0  # a level that no number is nearest to goes halfway to its neighbours
        means = np.diff(moment[ends])[parts] / np.diff(mass[ends])[parts]
        levels = np.interp(np.arange(count), np.flatnonzero(parts), means)
        before, ends = ends[1:-1], np.searchsorted(x, (levels[1:] + levels[:-1]) / 2)
        if np.array_equal(before, ends):
            break
    return tuple(levels)


def _checked(values) -> tuple[float, ...]:
    """Levels as floats; raises for what is no table."""
    try:
        entries = tuple(float(x) + 0.0 for x in values)
    except (TypeError, ValueError):
        raise ValueError(f"Levels takes a list of numbers, such as [-2, 0, 1, 4]; got {values!r}.") from None
    if not 2 <= len(entries) <= MAX_ENTRIES:
        raise ValueError(f"Levels takes from 2 to {MAX_ENTRIES} numbers; got {len(entries)}.")
    for i, x in enumerate(entries):
        if not math.isfinite(x) or abs(x) > 2.0**64:
            raise ValueError(f"Levels takes finite numbers up to 2^64; entry {i} is {x!r}.")
        if i and x <= entries[i - 1]:
            how = "equal to" if x == entries[i - 1] else "below"
            raise ValueError(
                f"Levels takes ascending, distinct numbers; entry {i} ({x!r}) is {how} entry {i - 1} ({entries[i - 1]!r})."
            )
    if np.unique(np.asarray(entries, np.float32)).size < len(entries):
        raise ValueError("Levels takes numbers that are distinct in float32; two of these are too close.")
    return entries

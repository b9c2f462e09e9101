"""Grids: the integer codes a weight may take, and the values they stand for.

A `Grid` is a setting: which integers exist, and which of them means zero or, for a table (tables.py), what each stands for.
`ScaledGrid` (scaled_grid.py) is that grid laid over actual weights. A scale (scale.py) makes the second from the first.
"""

import abc
import dataclasses
import math
import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .pytree import register_dataclass

Number = Any  # a Python number, or a traced scalar where a sweep runs over it

ARRAYS = (np.ndarray, np.generic, jax.Array)
MAX_BITS = 16
UNBOUNDED = 2**24  # the largest code of `Infinite`: float32 holds every integer up to here


class Alphabet(NamedTuple):
    """The integers of a grid.

    lo, hi: lowest and highest code. zero: the code, perhaps half-integer, that means the value 0; None where it is fitted
    to the weights. reach: the distance in steps from zero to the level a scale puts its radius on; None if there is none.
    """

    lo: Number
    hi: Number
    zero: Number | None
    reach: Number | None


class Grid(abc.ABC):
    """A setting that names an alphabet. Its numbers are pytree leaves: one compiled program serves every width."""

    @abc.abstractmethod
    def alphabet(self) -> Alphabet:
        """The integers of this grid."""

    @property
    def table(self) -> Any:
        """The ascending levels (levels,), in steps, that codes from 0 are indices of; None where code k is level k."""
        return None

    @property
    def unit(self) -> Number | None:
        """The number that all levels are whole multiples of; None where there is none."""
        return 1

    @property
    def offset(self) -> bool:
        """True if 0 is fitted as a real number, an offset in units of the weights: value = step * level - offset."""
        return False

    def __str__(self):
        given = (f for f in dataclasses.fields(self) if getattr(self, f.name) != f.default)  # type: ignore[arg-type]
        return f"{type(self).__name__}({', '.join(str(getattr(self, f.name)) for f in given)})"

    @property
    def levels(self) -> Number:
        """The number of values that a weight may take."""
        lo, hi, *_ = self.alphabet()
        return hi - lo + 1

    @property
    def fits_zero(self) -> bool:
        """True if the code of the value 0 is fitted to the weights, an integer."""
        return self.alphabet().zero is None and not self.offset

    @property
    def has_zero(self) -> bool | None:
        """True if the value 0 is a level; None where the grid is traced."""
        lo, hi, zero, _ = self.alphabet()
        if zero is None:
            return not self.offset
        if self.table is not None:
            return None if isinstance(self.table, Tracer) else bool((np.asarray(self.table) == zero).any())
        if not all(is_number(x) or (isinstance(x, ARRAYS) and not isinstance(x, Tracer)) for x in (lo, hi, zero)):
            return None
        return bool(np.all((np.floor(zero) == zero) & (lo <= zero) & (zero <= hi)))

    @property
    def log2_levels(self) -> float:
        """Bits per weight that an ideal fixed-rate code needs: log2(levels), 1.58 for ternary."""
        return math.log2(self.levels)

    @property
    def storage_bits(self) -> int:
        """Whole bits that hold any one code."""
        return math.ceil(self.log2_levels)

    @property
    def table_bits(self) -> int:
        """Bits of a table that is stored beside the codes of a kernel; 0 where the name of the grid says its levels."""
        return 0


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Integer(Grid):
    """Signed integers -2^(b-1) .. 2^(b-1) - 1; `narrow` leaves out the lowest, which makes the grid symmetric.

    The radius goes on the top level 2^(b-1) - 1. Two bits at least: for one bit take `Binary`.

    Examples:
        >>> jpfq.Integer(4).levels, jpfq.Integer(4, narrow=True).levels
        (16, 15)
    """

    bits: Number
    narrow: bool = dataclasses.field(default=False, metadata={"static": True})

    def __post_init__(self):
        _check_bits(self.bits, "Integer", least=2, remedy=" For one bit use jpfq.Binary().")

    def alphabet(self):
        top = 2 ** (self.bits - 1) - 1
        return Alphabet(lo=-top if self.narrow else -top - 1, hi=top, zero=0, reach=top)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Asymmetric(Grid):
    """Unsigned integers 0 .. 2^b - 1 with an integer zero point fitted to the weights (OPTQ's default).

    Examples:
        >>> levels = jpfq.scale.AbsMax()(W, jpfq.Asymmetric(bits=4))
        >>> levels.step.shape, levels.zero.shape  # a zero point of its own for each neuron
        ((1, 8), (1, 8))
    """

    bits: Number

    def __post_init__(self):
        _check_bits(self.bits, "Asymmetric")

    def alphabet(self):
        top = 2**self.bits - 1
        return Alphabet(lo=0, hi=top, zero=None, reach=top)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Offset(Grid):
    """Unsigned integers times the step, minus an offset that is fitted to the weights: step * code - offset (Q4_1, Q4_K).

    The offset is no multiple of the step, so 0 is not among the levels. It is stored as steps are, in a `step_dtype` of few
    digits: float16, bfloat16 or "uint6_float16".

    Examples:
        >>> tensor, info = jpfq.solve(W, gram, grid=jpfq.Offset(bits=4), step_dtype="float16")
        >>> tensor.bits_per_weight  # 4, and 16 + 16 for 32 weights
        5.0
    """

    bits: Number

    def __post_init__(self):
        _check_bits(self.bits, "Offset")

    @property
    def offset(self):
        return True

    def alphabet(self):
        top = 2**self.bits - 1
        return Alphabet(lo=0, hi=top, zero=None, reach=top)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Symmetric(Grid):
    """The 2K + 1 levels {0, +-step, .., +-K step} of GPFQ22, where K = 2^(b-1): one level more than b bits can store.

    Examples:
        >>> jpfq.Symmetric(K=8).levels  # "four bits" in the papers of GPFQ
        17
    """

    K: Number

    def __post_init__(self):
        _check_count(self.K, "Symmetric", least=1)

    def alphabet(self):
        return Alphabet(lo=-self.K, hi=self.K, zero=0, reach=self.K)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Equispaced(Grid):
    """The M levels radius * linspace(-1, 1, M) of GPFQ20. Zero is among them only when M is odd.

    Examples:
        >>> jpfq.Equispaced(M=4).alphabet()  # codes 0 .. 3; the value 0 lies between two of them
        Alphabet(lo=0, hi=3, zero=1.5, reach=1.5)
    """

    M: Number

    def __post_init__(self):
        _check_count(self.M, "Equispaced", least=2)

    def alphabet(self):
        half = (self.M - 1) / 2
        return Alphabet(lo=0, hi=self.M - 1, zero=half, reach=half)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Ternary(Grid):
    """{-radius, 0, radius}: 1.58 bits, stored in two.

    Examples:
        >>> tensor, info = jpfq.solve(W, gram, grid=jpfq.Ternary())
        >>> sorted(set(tensor.codes.ravel().tolist()))
        [-1, 0, 1]
    """

    def alphabet(self):
        return Alphabet(lo=-1, hi=1, zero=0, reach=1)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Binary(Grid):
    """{-radius, radius}. There is no zero: a weight of exactly 0 is a tie and goes up, to +radius.

    Examples:
        >>> tensor, info = jpfq.solve(W, gram, grid=jpfq.Binary())
        >>> tensor.bits_per_weight  # one for the code, and 32 / 32 for the step of a neuron with 32 inputs
        2.0
    """

    def alphabet(self):
        return Alphabet(lo=0, hi=1, zero=0.5, reach=0.5)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Infinite(Grid):
    """All multiples of the step, as in the theory of GPFQ22 and SPFQ. It has no radius: give the step with `Fixed`.

    Codes stay within +-2^24, the integers that float32 holds; nothing else saturates.

    Examples:
        >>> tensor, info = jpfq.solve(W, gram, grid=jpfq.Infinite(), scale=jpfq.scale.Fixed(0.1))
        >>> float(info.saturation)
        0.0
    """

    def alphabet(self):
        return Alphabet(lo=-UNBOUNDED, hi=UNBOUNDED, zero=0, reach=None)

    @property
    def levels(self):
        return math.inf

    @property
    def log2_levels(self):
        return math.inf

    @property
    def storage_bits(self):
        return 32


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Codes(Grid):
    """A grid given by its alphabet. All grids written so share one program; tables do where they are of one size."""

    lo: Number
    hi: Number
    zero: Number | None
    reach: Number | None
    table: Any = None  # type: ignore[assignment]
    unit: Number | None = None  # type: ignore[assignment]
    offset: bool = dataclasses.field(default=False, metadata={"static": True})  # type: ignore[assignment]

    @classmethod
    def of(cls, grid: Grid) -> "Codes":
        """The same grid, in numbers of one type."""
        real = lambda x: float(x) if is_number(x) else jnp.asarray(x, float)  # strict promotion allows no int * float
        table, unit = (None, None) if grid.table is None else (grid.table, grid.unit)
        return cls(*(None if x is None else real(x) for x in (*grid.alphabet(), table, unit)), offset=grid.offset)

    def alphabet(self):
        return Alphabet(self.lo, self.hi, self.zero, self.reach)


def grid_of_bits(bits: Number) -> Grid:
    """The grid that a bare `bits=b` means: `Integer(b)`, and `Binary()` for one bit."""
    _check_bits(bits, "bits")
    return Binary() if is_number(bits) and bits == 1 else Integer(bits)


def is_number(x) -> bool:
    """True if `x` is a plain number that can be checked: not a tracer, nor a placeholder of a tree operation."""
    return isinstance(x, numbers.Real) and not isinstance(x, bool)


def _check_bits(bits, name, least=1, remedy=""):
    wrong_type = isinstance(bits, (bool, str))
    if wrong_type or (
        is_number(bits) and (not math.isfinite(bits) or bits != int(bits) or not least <= bits <= MAX_BITS)
    ):
        raise ValueError(f"{name} takes an integer number of bits from {least} to {MAX_BITS}; got {bits!r}.{remedy}")


def _check_count(count, name, least):
    wrong_type = isinstance(count, (bool, str))
    if wrong_type or (is_number(count) and (not math.isfinite(count) or count != int(count) or count < least)):
        raise ValueError(f"{name} takes an integer of at least {least}; got {count!r}.")

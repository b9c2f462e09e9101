"""Steps as they are stored: rounded to a type of fewer bits before the recursion, so that codes answer for it.

    float32            as it is
    bfloat16, float16  half precision
    float8_e8m0fnu     a power of two, as in MXFP4, MXFP6 and MXFP8 (OCP microscaling formats)
    float8_e4m3fn      four significant bits, times one float32 per kernel, as in NVFP4
    uint6_float16      an integer up to 63, times one float16 for 8 groups of a neuron, as in Q4_K of GGUF
    int8_float16       an integer up to 127, times one float16 for 16 groups, as in Q6_K

The float32 over steps of `float8_e4m3fn` is a power of two, so that the product is exact, and the least one under which the
largest step fits. The float16 over integers is that which puts the largest of them on the top one. A step beyond what its
type holds takes the nearest one that it holds, and never 0. Offsets are stored as steps are, and may be 0.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .grid import Grid
from .per import Per, PerGroup
from .scaled_grid import ScaledGrid


@dataclasses.dataclass(frozen=True)
class UnderHalf:
    """Integers from 0 to `top`, times a float16 for each `run` of groups along the inputs; `bits` store one."""

    name: str
    bits: int
    top: int
    run: int

    def __str__(self):
        return self.name


StepType = np.dtype | UnderHalf | None  # None is float32

E8M0, E4M3 = np.dtype(jnp.float8_e8m0fnu), np.dtype(jnp.float8_e4m3fn)
UINT6, INT8 = UnderHalf("uint6_float16", 6, 63, 8), UnderHalf("int8_float16", 8, 127, 16)
TYPES: dict[str, np.dtype | UnderHalf] = {
    np.dtype(x).name: np.dtype(x) for x in (jnp.float32, jnp.bfloat16, jnp.float16, E8M0, E4M3)
}
TYPES |= {kind.name: kind for kind in (UINT6, INT8)}
LEAST_HALF, MOST_HALF = 2.0**-24, 65504.0
LEAST_POWER, MOST_POWER = -126, 127  # of E8M0, as far as float32 holds it as a normal number


def step_type(given: Any) -> StepType:
    """The type of a setting; None stands for float32. Raises ValueError for what no format stores steps in."""
    if given is None:
        return None
    name = str(given)
    if name not in TYPES:
        try:
            name = np.dtype(given).name
        except TypeError:
            name = None
    if name not in TYPES:
        raise ValueError(f"step_dtype is one of {', '.join(TYPES)}, such as jnp.bfloat16; got {given!r}.")
    return None if name == "float32" else TYPES[name]


def check_step_type(recipe: Any) -> None:
    """Raises where the type that steps are stored in contradicts another part of a recipe."""
    dtype, per = recipe.step_dtype, recipe.scale.per
    if isinstance(dtype, UnderHalf) and (not isinstance(per, PerGroup) or recipe.refits):
        raise ValueError(
            f"step_dtype={str(dtype)!r} has a float16 over {dtype.run} groups of a neuron: take a scale with "
            f"per=jpfq.scale.PerGroup(..), without refit; got {recipe.scale}."
        )
    if recipe.grid.offset and (dtype is None or is_coarse(dtype)):
        raise ValueError(
            f"{recipe.grid} stores an offset beside each step: take step_dtype='float16', 'bfloat16' or 'uint6_float16'; "
            f"got {dtype or 'float32'}."
        )


def step_misfit(dtype: StepType, per: Per, n: int) -> str | None:
    """The reason why the steps of a matrix of n inputs cannot be stored in a type; None if they can."""
    if isinstance(dtype, UnderHalf) and isinstance(per, PerGroup) and n % (run := per.size * dtype.run):
        return f"{dtype} has a float16 for every {run} inputs, which do not divide its {n}: take another format for it"
    return None


def step_bits(dtype: StepType) -> int:
    """Bits that one step takes, its share of a float16 over several included."""
    if isinstance(dtype, UnderHalf):
        return dtype.bits + 16 // dtype.run
    return 8 * (4 if dtype is None else dtype.itemsize)


def zero_bits(grid: Grid, dtype: StepType) -> int:
    """Bits that the zero point or the offset of one step takes."""
    if grid.offset:
        return step_bits(dtype)
    return grid.storage_bits if grid.fits_zero else 0


def is_coarse(dtype: StepType) -> bool:
    """True for types of so few digits that a step of them is not to be changed once codes are chosen for it."""
    return dtype in (E8M0, E4M3)


def is_held(dtype: StepType) -> bool:
    """True for types whose steps are not trained: of few digits, or with a factor that others have too."""
    return is_coarse(dtype) or isinstance(dtype, UnderHalf)


def kernel_bits(dtype: StepType) -> int:
    """Bits of what all steps of a kernel share."""
    return 32 if dtype == E4M3 else 0


@dataclasses.dataclass(frozen=True)
class StepStorage:
    """Steps as a file holds them: `dtype`, times `unit`, a power of two that all steps of a kernel share.

    up_from: the multiple of a power of two from which on a step takes the next one.
    """

    dtype: StepType
    unit: jax.Array | float = 1.0
    up_from: jax.Array | float = 4 / 3

    @classmethod
    def over(
        cls, step: jax.Array, dtype: StepType, reach: Any, largest: Callable[[jax.Array], jax.Array]
    ) -> "StepStorage":
        """The storage of the steps of a kernel, by the largest of them, on a grid that reaches to a level.

        Powers of two are those of the OCP formats, 2^floor(log2 radius) over the power of two at or below that level: 8/6 of
        a power goes up on E2M1, 512/448 on E4M3.
        """
        if dtype == E8M0 and reach is not None:
            mantissa, _ = jnp.frexp(jnp.asarray(reach, step.dtype))
            return cls(dtype, up_from=1 / mantissa)
        return cls(dtype, unit_under(largest(step))) if dtype == E4M3 else cls(dtype)

    def __call__(self, step: jax.Array) -> jax.Array:
        """The steps that will be read back. Steps of 0 stay 0, but for powers of two, which have none."""
        if self.dtype is None:
            return step
        if isinstance(self.dtype, UnderHalf):
            return _under_half(step, self.dtype, 1)
        if self.dtype == E8M0:
            mantissa, exponent = jnp.frexp(step)
            power = jnp.where(step > 0, exponent - jnp.where(2 * mantissa < self.up_from, 1, 0), LEAST_POWER)
            return jnp.ldexp(jnp.ones_like(step), jnp.clip(power, LEAST_POWER, MOST_POWER))
        within = jnp.clip(step / self.unit, *self._range).astype(self.dtype).astype(step.dtype)
        return jnp.where(step > 0, within * self.unit, 0)

    def levels(self, levels: ScaledGrid) -> ScaledGrid:
        """Levels of the matrix of a kernel, (groups, out), with the steps and the offsets that will be read back."""
        step, zero = self(levels.step), levels.zero
        if levels.offset:
            zero = _under_half(zero, self.dtype, 0) if isinstance(self.dtype, UnderHalf) else self(zero)
        return levels.with_steps(step, zero)

    def exceeds(self, step: jax.Array) -> jax.Array:
        """True where a step is beyond what is held, by more than rounding."""
        if self.dtype is None:
            return jnp.zeros(step.shape, bool)
        unit = _halves(step, self.dtype) if isinstance(self.dtype, UnderHalf) else self.unit
        least, most = self._range
        return (step > 0) & ((2 * step / unit < least) | (0.8 * step / unit > most))

    @property
    def _range(self) -> tuple[float, float]:
        """The least and the largest step above 0, in units; those that XLA takes for 0 in float32 are none."""
        if self.dtype == E8M0:
            return 2.0**LEAST_POWER, 2.0**MOST_POWER
        if isinstance(self.dtype, UnderHalf):
            return 1.0, float(self.dtype.top)
        assert self.dtype is not None
        info = jnp.finfo(self.dtype)
        return max(float(info.smallest_subnormal), float(np.finfo(np.float32).tiny)), float(info.max)


def _under_half(x, kind, least):
    """Multiples of one float16 for each run of groups; those of a number above 0 are at least `least`."""
    half = _halves(x, kind)
    return jnp.where(x > 0, half * jnp.clip(jnp.round(x / jnp.where(half > 0, half, 1)), least, kind.top), 0)


def _halves(x, kind):
    """The float16 over each of the numbers (groups, out), as a float32."""
    largest = jnp.max(x.reshape(-1, kind.run, *x.shape[1:]), 1) / kind.top
    half = jnp.clip(largest, LEAST_HALF, MOST_HALF).astype(jnp.float16).astype(x.dtype)
    return jnp.repeat(jnp.where(largest > 0, half, 0), kind.run, 0)


def unit_of_stored(step: np.ndarray) -> float:
    """The unit under which all steps, which were stored as `float8_e4m3fn`, are numbers of that type.

    Raises ValueError where there is none.
    """
    exponent = int(np.frexp(step.max(initial=0.0))[1])
    for unit in (2.0 ** (exponent - 9), 2.0 ** (exponent - 8)):
        if np.array_equal((step / unit).astype(E4M3).astype(step.dtype) * unit, step):
            return unit
    raise ValueError("The steps are no numbers of float8_e4m3fn under one power of two.")


def is_storable(step: np.ndarray, dtype: StepType) -> bool:
    """True if steps of all parts of a kernel are numbers of that type under one unit."""
    if dtype != E4M3:
        return True
    try:
        unit_of_stored(step)
    except ValueError:
        return False
    return True


def factors(x: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
    """The float16 and the integers up to `top` whose products are the rows of x (.., run): (..) and (.., run).

    Raises:
        ValueError: a row has none.
    """
    largest = x.max(-1)
    half, known = np.zeros(largest.shape, np.float16), largest == 0
    for over in range(top, 0, -1):  # the largest number is the top one times the float16, but for the least of those
        with np.errstate(over="ignore"):
            found = (largest / np.float32(over)).astype(np.float16)
        wide = np.where(found > 0, found, 1).astype(np.float32)[..., None]
        fits = (wide * np.rint(x / wide) == x).all(-1) & np.isfinite(found) & ~known
        half, known = np.where(fits, found, half), known | fits
        if known.all():
            break
    else:
        raise ValueError(
            f"its steps or offsets are no integers up to {top} times one float16 for {x.shape[-1]} of them"
        )
    wide = np.where(half > 0, half, 1).astype(np.float32)[..., None]
    return half, np.rint(x / wide).astype(np.uint8)


def packed_steps(step: np.ndarray, dtype: StepType) -> tuple[np.ndarray, float]:
    """Steps as numbers of the type they are stored in, and the unit they are multiplied by.

    Integers under a float16 are returned multiplied by it, in float32.
    """
    if dtype is None or isinstance(dtype, UnderHalf):
        return step, 1.0
    unit = unit_of_stored(step) if dtype == E4M3 else 1.0
    return (step / unit).astype(dtype), unit


def unit_under(largest: jax.Array) -> jax.Array:
    """The least power of two under which the largest step fits."""
    mantissa, exponent = jnp.frexp(jnp.where(largest > 0, largest, 1))  # largest = mantissa 2^exponent, mantissa < 1
    return jnp.ldexp(jnp.ones_like(largest), exponent - jnp.where(mantissa <= 448 / 512, 9, 8))

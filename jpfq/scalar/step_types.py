"""Steps as they are stored: rounded to a type of fewer bits before the recursion, so that codes answer for it.

    float32            as it is
    bfloat16, float16  half precision
    float8_e8m0fnu     a power of two, as in MXFP4, MXFP6 and MXFP8 (OCP microscaling formats)
    float8_e4m3fn      four significant bits, times one float32 per kernel, as in NVFP4

The float32 over steps of `float8_e4m3fn` is a power of two, so that the product is exact, and the least one under which the
largest step fits. A step beyond what its type holds takes the nearest one that it holds, and never 0.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

E8M0, E4M3 = np.dtype(jnp.float8_e8m0fnu), np.dtype(jnp.float8_e4m3fn)
TYPES = {np.dtype(x).name: np.dtype(x) for x in (jnp.float32, jnp.bfloat16, jnp.float16, E8M0, E4M3)}
LEAST_POWER, MOST_POWER = -126, 127  # of E8M0, as far as float32 holds it as a normal number


def step_type(given: Any) -> np.dtype | None:
    """The type of a setting; None stands for float32. Raises ValueError for what no format stores steps in."""
    if given is None:
        return None
    try:
        name = np.dtype(given).name
    except TypeError:
        name = None
    if name not in TYPES:
        raise ValueError(f"step_dtype is one of {', '.join(TYPES)}, such as jnp.bfloat16; got {given!r}.")
    return None if name == "float32" else TYPES[name]


def step_bits(dtype: np.dtype | None) -> int:
    """Bits that one step takes."""
    return 8 * (4 if dtype is None else dtype.itemsize)


def is_coarse(dtype: np.dtype | None) -> bool:
    """True for types of so few digits that a step of them is not to be changed once codes are chosen for it."""
    return dtype in (E8M0, E4M3)


def kernel_bits(dtype: np.dtype | None) -> int:
    """Bits of what all steps of a kernel share."""
    return 32 if dtype == E4M3 else 0


@dataclasses.dataclass(frozen=True)
class StepStorage:
    """What steps become in a file: `dtype`, times `unit`, a power of two that all steps of a kernel share.

    up_from: the multiple of a power of two from which on a step takes the next one.
    """

    dtype: np.dtype | None
    unit: jax.Array | float = 1.0
    up_from: jax.Array | float = 4 / 3

    @classmethod
    def over(
        cls, step: jax.Array, dtype: np.dtype | None, reach: Any, largest: Callable[[jax.Array], jax.Array]
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
        if self.dtype == E8M0:
            mantissa, exponent = jnp.frexp(step)
            power = jnp.where(step > 0, exponent - jnp.where(2 * mantissa < self.up_from, 1, 0), LEAST_POWER)
            return jnp.ldexp(jnp.ones_like(step), jnp.clip(power, LEAST_POWER, MOST_POWER))
        within = jnp.clip(step / self.unit, *self._range).astype(self.dtype).astype(step.dtype)
        return jnp.where(step > 0, within * self.unit, 0)

    def exceeds(self, step: jax.Array) -> jax.Array:
        """True where a step is beyond what is held, by more than rounding."""
        if self.dtype is None:
            return jnp.zeros(step.shape, bool)
        least, most = self._range
        return (step > 0) & ((2 * step / self.unit < least) | (0.8 * step / self.unit > most))

    @property
    def _range(self) -> tuple[float, float]:
        """The least and the largest step above 0, in units; those that XLA takes for 0 in float32 are none."""
        if self.dtype == E8M0:
            return 2.0**LEAST_POWER, 2.0**MOST_POWER
        assert self.dtype is not None
        info = jnp.finfo(self.dtype)
        return max(float(info.smallest_subnormal), float(np.finfo(np.float32).tiny)), float(info.max)


def unit_of_stored(step: np.ndarray) -> float:
    """The unit under which all steps, which were stored as `float8_e4m3fn`, are numbers of that type.

    Raises ValueError where there is none.
    """
    exponent = int(np.frexp(step.max(initial=0.0))[1])
    for unit in (2.0 ** (exponent - 9), 2.0 ** (exponent - 8)):
        if np.array_equal((step / unit).astype(E4M3).astype(step.dtype) * unit, step):
            return unit
    raise ValueError("The steps are no numbers of float8_e4m3fn under one power of two.")


def is_storable(step: np.ndarray, dtype: np.dtype | None) -> bool:
    """True if steps of all parts of a kernel are numbers of that type under one unit."""
    if dtype != E4M3:
        return True
    try:
        unit_of_stored(step)
    except ValueError:
        return False
    return True


def packed_steps(step: np.ndarray, dtype: np.dtype | None) -> tuple[np.ndarray, float]:
    """Steps as numbers of the type they are stored in, and the unit they are multiplied by."""
    if dtype is None:
        return step, 1.0
    unit = unit_of_stored(step) if dtype == E4M3 else 1.0
    return (step / unit).astype(dtype), unit


def unit_under(largest: jax.Array) -> jax.Array:
    """The least power of two under which the largest step fits."""
    mantissa, exponent = jnp.frexp(jnp.where(largest > 0, largest, 1))  # largest = mantissa 2^exponent, mantissa < 1
    return jnp.ldexp(jnp.ones_like(largest), exponent - jnp.where(mantissa <= 448 / 512, 9, 8))

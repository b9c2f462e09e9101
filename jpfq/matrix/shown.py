"""Checks of calibration data: whether they can be used, and the power of two that they are scaled by."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .host import namespace, numpy_or_jit

_STEP = 14  # powers by which inputs are scaled are multiples of it, so that few programs are compiled


class Shown(NamedTuple):
    """The properties of data that decide whether they can be used and in which units."""

    finite_X: bool
    finite_Xq: bool
    rows: bool  # whether there are any, of weight above 0
    inputs: bool  # whether any is not 0
    power: int  # of 2 by which to multiply inputs, so that squares neither underflow nor overflow; 0 for ordinary sizes

    @classmethod
    def of(cls, diagonal: jax.Array, X: jax.Array, Xq: jax.Array, count: jax.Array) -> "Shown":
        """From diag(H), sums or means of both networks' inputs, and the count, with any leading axes. Reads them once."""
        return cls.read(cls.reduced(diagonal, X, Xq, count))

    @staticmethod
    @numpy_or_jit()
    def reduced(diagonal: jax.Array, X: jax.Array, Xq: jax.Array, count: jax.Array) -> jax.Array:
        """The input of `read` (5,): the largest entry of each, by one reduction, which compiles five times faster."""
        xp = namespace(diagonal)
        X, Xq, count = (xp.broadcast_to(x, diagonal.shape) for x in (X, Xq, count[..., None]))
        flags = ~xp.isfinite(X), ~xp.isfinite(Xq), (X != 0) | (Xq != 0), diagonal, count
        return xp.stack([x.astype(diagonal.dtype) for x in flags]).reshape(5, -1).max(1)

    @classmethod
    def read(cls, largest_of: jax.Array) -> "Shown":
        """From the array that `reduced` returns."""
        not_X, not_Xq, inputs, largest, count = np.asarray(largest_of)
        finite_X, finite_Xq, rows = not not_X, not not_Xq, bool(count > 0)
        inputs = bool(inputs) or not largest <= 0
        size = (np.inf if np.isnan(largest) else largest) / max(count, 1)  # infinity less infinity is NaN
        third, power = _third(largest_of.dtype), 0
        if finite_X and finite_Xq and inputs and not 4.0**-third <= size <= 4.0**third:
            lost = size == 0 or np.isinf(size)  # how far it is from 1 is lost
            most = third * (1 if size < 1 else -1)
            power = 2 * most if lost else _STEP * round(-np.log2(size) / 2 / _STEP)
        return cls(finite_X, finite_Xq, rows, inputs, int(power))

    def refuse(self, name: str) -> None:
        """Raises for data without rows, or without an input that is not 0."""
        if not self.rows:
            raise ValueError(
                f"The calibration data of {name} hold no rows, or only rows of weight 0: give rows that count, or leave "
                "it as it is by a rule with skip=True."
            )
        if not self.inputs:
            raise ValueError(
                f"The calibration data of {name} show nothing: all its inputs are 0 on all rows. Give inputs that reach it, "
                "or leave it as it is by a rule with skip=True."
            )


def _third(dtype) -> int:
    """A third of the exponents below 1: 42 in float32."""
    return -jnp.finfo(dtype).minexp // 3

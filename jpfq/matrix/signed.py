"""A quantized kernel in the signed integers of other runtimes: step * (codes - zero) with codes around 0."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .packed import compact, extent
from .qtensor import QTensor


class Signed(NamedTuple):
    """kernel = step * (codes - zero), to the bit; `zero` is None where it is 0 everywhere."""

    codes: jax.Array  # int32
    step: jax.Array
    zero: jax.Array | None  # int32
    bits: int  # of two's complement that hold codes and zero points


def signed(tensor: QTensor) -> Signed:
    """The tensor with codes moved around 0. A zero point between two codes takes half the step and doubled codes."""
    codes, step, zero = tensor.codes.astype(jnp.int32), tensor.step, compact(tensor.zero)
    if tensor.grid.offset:
        raise ValueError(f"the levels of {tensor.grid} are a step times integers, minus an offset")
    if tensor.grid.table is not None:
        return _of_table(codes, step, tensor.grid)
    lo, levels = extent(tensor.grid)
    ends = np.array([lo, lo + levels - 1])
    if zero.size == 1:
        double = 1 if float(zero.item()) == round(float(zero.item())) else 2
        shift = round(double * float(zero.item()))
        codes, ends = double * codes - shift, double * ends - shift
        step, zero = step / double, None
    else:
        values = np.asarray(tensor.zero)
        if (values != np.rint(values)).any():
            raise ValueError("its zero points differ and are no integers")
        shift = lo + (levels + 1) // 2
        codes, zero, ends = codes - shift, tensor.zero.astype(jnp.int32) - shift, ends - shift
        ends = np.array([min(ends[0], int(zero.min())), max(ends[1], int(zero.max()))])
    return Signed(codes, step, zero, _bits(ends))


def _of_table(codes, step, grid):
    """Levels that are whole multiples of one number, such as those of E2M1, are integers."""
    if grid.unit is None:
        raise ValueError(f"the levels of {grid} are no whole multiples of one number")
    integers = np.rint(np.asarray(grid.table) / grid.unit).astype(np.int32)
    return Signed(jnp.asarray(integers)[codes], step * grid.unit, None, _bits(integers))


def _bits(ends):
    return 1 + max(int(-1 - ends.min()).bit_length(), int(ends.max()).bit_length())

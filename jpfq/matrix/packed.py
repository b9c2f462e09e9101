"""Packed: a quantized kernel in memory while it serves, its codes packed into bytes."""

import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ..scalar import Grid
from ..scalar.bits import MAX_LEVELS, pack, packed_size, unpack
from ..scalar.pytree import register_dataclass
from ..scalar.step_types import StepType
from .explicit_mesh import anywhere
from .layout import Layout
from .qtensor import QTensor, code_dtype
from .rotate import Hadamard

T = TypeVar("T")


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """A `QTensor` with packed codes: a pytree of arrays to keep on the device, `dequantize` to be called inside `jit`.

    words: codes of the grid, from 0, packed along `axis`, which comes last; the codes themselves where the grid has more
    than 2^16 levels. step: as in `QTensor`. zero: likewise, one number where it is everywhere the same, and in the
    smallest type that holds it.

    Fields besides: `grid` of the codes, `shape` of the kernel and its `dtype`, `rotated` and `step_dtype` as in `QTensor`.

    Examples:
        >>> packed = jpfq.Packed.of(quantized.tensors["head/kernel"])
        >>> packed.words.shape, packed.words.dtype  # two codes of 4 bits to a byte
        ((32, 4), dtype('uint8'))
    """

    words: jax.Array
    step: jax.Array
    zero: jax.Array
    grid: Grid = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(metadata={"static": True})
    dtype: np.dtype = dataclasses.field(metadata={"static": True})  # of the kernel it stands for
    rotated: tuple[Hadamard, Layout] | None = dataclasses.field(default=None, metadata={"static": True})
    step_dtype: StepType = dataclasses.field(default=None, metadata={"static": True})

    @classmethod
    @anywhere
    def of(cls, tensor: QTensor) -> "Packed":
        """Packs a tensor along the axis with the least padding, the last one in a tie.

        Args:
            tensor: not traced.

        Examples:
            >>> packed = jpfq.Packed.of(quantized.tensors["head/kernel"])
        """
        grid, zero = plain(tensor.grid), compact(tensor.zero)
        lo, levels = extent(grid)
        axis, words = len(tensor.shape) - 1, tensor.codes
        if levels <= MAX_LEVELS:
            waste = lambda axis: packed_size(tensor.shape[axis], levels) / max(1, tensor.shape[axis])
            axis = min(reversed(range(len(tensor.shape))), key=waste)
            words = pack(jnp.moveaxis(tensor.codes.astype(jnp.int32) - lo, axis, -1), levels)
        return cls(words, tensor.step, zero, grid, tensor.shape, axis, tensor.dtype, tensor.rotated, tensor.step_dtype)

    @anywhere
    def unpack(self) -> QTensor:
        """The tensor that was packed.

        Examples:
            >>> tensor = quantized.tensors["head/kernel"]
            >>> bool((jpfq.Packed.of(tensor).unpack().codes == tensor.codes).all())
            True
        """
        lo, levels = extent(self.grid)
        codes = self.words
        if levels <= MAX_LEVELS:
            codes = jnp.moveaxis(unpack(codes, levels, self.shape[self.axis]), -1, self.axis)
            codes = (codes.astype(jnp.int32) + lo).astype(code_dtype(self.grid))
        zero = self.zero.astype(self.step.dtype)
        if zero.size == 1:
            zero = jnp.broadcast_to(zero, self.step.shape)
        return QTensor(codes, self.step, zero, self.grid, self.dtype, self.rotated, self.step_dtype)

    def dequantize(self) -> jax.Array:
        """The kernel, in its own dtype.

        Examples:
            >>> jpfq.Packed.of(quantized.tensors["head/kernel"]).dequantize().shape
            (32, 8)
        """
        return self.unpack().dequantize()

    @property
    def nbytes(self) -> int:
        """Bytes that its arrays take on the device."""
        return self.words.nbytes + self.step.nbytes + self.zero.nbytes


def dequantize(tree: Any) -> Any:
    """A pytree with kernels in place of what is packed or quantized. Inside `jit` the kernels live only while they are used.

    Args:
        tree: with `Packed` or `QTensor` in it, such as `quantized.serve().params`.

    Examples:
        >>> apply = jax.jit(lambda packed, x: model.apply({"params": jpfq.dequantize(packed)}, x))
        >>> logits = apply(quantized.serve().params, X)
    """
    kinds = Packed, QTensor
    leaf = lambda x: isinstance(x, kinds)
    return jax.tree.map(lambda x: x.dequantize() if leaf(x) else x, tree, is_leaf=leaf)


def plain(setting: T) -> T:
    """A grid or other setting with Python numbers in place of arrays."""
    return jax.tree.map(lambda x: x.item() if isinstance(x, (jax.Array, np.generic, np.ndarray)) else x, setting)


def extent(grid: Grid) -> tuple[int, int]:
    """(lowest code, number of codes) of a grid."""
    lo, hi, *_ = grid.alphabet()
    return int(lo), int(hi) - int(lo) + 1


def compact(zero: jax.Array) -> jax.Array:
    """A zero point as one number where it is everywhere the same; else in the smallest type that holds it exactly."""
    values = np.asarray(zero)
    if values.size and (values == values.flat[0]).all():
        return zero[(slice(0, 1),) * zero.ndim]
    whole = values.size > 0 and bool((values == np.rint(values)).all())
    fits = lambda kind: np.iinfo(kind).min <= values.min() and values.max() <= np.iinfo(kind).max
    kind = next((kind for kind in (np.uint8, np.int8, np.uint16, np.int16) if whole and fits(kind)), zero.dtype)
    return zero.astype(kind)

"""QTensor: a quantized kernel as integer codes and steps, in the kernel's own shape; and Info, its error metrics."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..scalar import Grid, Integer, ScaledGrid, TwoRanges, WorstCase
from ..scalar.exponent import aligned
from ..scalar.pytree import register_dataclass
from ..scalar.scale import levels_of
from ..scalar.step_types import StepType, kernel_bits, step_bits, zero_bits
from .explicit_mesh import anywhere, is_traced
from .host import namespace, numpy_or_jit
from .layout import Layout
from .neurons import ALL, Neurons
from .rotate import Hadamard

SQUARES = ("square_error", "energy", "square_floor", "square_bound", "square_rounding")  # of `Info`
_mean = {"mean": True}  # of parts of a kernel the mean, where all other metrics add


@register_dataclass
@dataclasses.dataclass(frozen=True)
class QTensor:
    """step * (codes - zero), where one entry of `step` serves a block of codes.

    On a table that is step * (table[codes] - zero), and on `jpfq.Offset` step * codes - zero.

    `step` and `zero` have the rank of `codes`, and each of their axes divides that of `codes`: entry i of an axis serves
    the i-th of its equal runs. Per channel on a dense kernel (in, out) that is a step of shape (1, out); in groups of 32
    inputs, (in / 32, out).

    Where the inputs were rotated before quantizing, `rotated` names the rotation, and how the kernel is a matrix: the codes
    are those of the rotated kernel, which `dequantize` turns back.

    Fields: `codes` are integers of `grid`; `dtype` is that of the kernel they stand for; `step_dtype` is what the steps are
    stored in, and hold no more digits than.

    Examples:
        >>> tensor = quantized.tensors["head/kernel"]
        >>> tensor.codes.dtype, tensor.step.shape, tensor.bits_per_weight  # 4, and 32 / 32 for a step
        (dtype('int8'), (1, 8), 5.0)
    """

    codes: jax.Array
    step: jax.Array
    zero: jax.Array
    grid: Grid
    dtype: np.dtype = dataclasses.field(metadata={"static": True})  # of the kernel it stands for
    rotated: tuple[Hadamard, Layout] | None = dataclasses.field(default=None, metadata={"static": True})
    step_dtype: StepType = dataclasses.field(default=None, metadata={"static": True})  # None is float32

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel."""
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes when codes are packed at their storage bits, steps kept in their type and fitted zero points as codes.

        Offsets take what steps do. A table of `jpfq.Levels` is counted in float32.
        """
        bits = self.codes.size * self.grid.storage_bits + self.zero.size * zero_bits(self.grid, self.step_dtype)
        bits += step_bits(self.step_dtype) * self.step.size + kernel_bits(self.step_dtype) + self.grid.table_bits
        return -(-bits // 8)

    @property
    def bits_per_weight(self) -> float:
        """Packed bits per weight, steps and zero points included."""
        return 8 * self.nbytes / self.codes.size

    @property
    @anywhere
    def levels(self) -> ScaledGrid:
        """The levels of every weight: step and zero in the shape of the codes."""
        lo, hi, *_ = self.grid.alphabet()
        lo, hi = (jnp.asarray(x, self.step.dtype) for x in (lo, hi))
        step, zero = _spread(self.step, self.shape), _spread(self.zero, self.shape)
        return ScaledGrid(step, zero, lo, hi, *levels_of(self.grid, self.step.dtype), self.grid.offset)

    @anywhere
    def dequantize(self) -> jax.Array:
        """The kernel these codes stand for, in its own dtype.

        Examples:
            >>> kernel = quantized.tensors["head/kernel"].dequantize()
            >>> bool((kernel == quantized.params["head"]["kernel"]).all())
            True
        """
        table, _ = levels_of(self.grid, self.step.dtype)
        offset = self.grid.offset
        return _dequantize(self.codes, self.step, self.zero, table, self.dtype, self.rotated, offset)

    @anywhere
    def rounded(self, kernel: jax.Array) -> "QTensor":
        """Another kernel of this shape at the nearest of the same levels. Undoes `dequantize` where no step is 0.

        Args:
            kernel: in the shape of the codes.

        Examples:
            >>> tensor = quantized.tensors["head/kernel"]
            >>> bool((tensor.rounded(tensor.dequantize()).codes == tensor.codes).all())
            True
        """
        return dataclasses.replace(self, codes=self.levels.encode(self.turned(kernel)).astype(self.codes.dtype))

    def split(self) -> "tuple[QTensor, QTensor]":
        """Two kernels of integers that add up to this one, fine and coarse, for a server that wants two.

        What they stand for adds up to `dequantize()`, to the bit unless the kernel is rotated.

        Raises:
            ValueError: the kernel is on a grid of one range.

        Examples:
            >>> tensor, info = jpfq.solve(W, gram, grid=jpfq.TwoRanges(4, fine=5, ratio=4))
            >>> fine, coarse = tensor.split()
            >>> bool((fine.dequantize() + coarse.dequantize() == tensor.dequantize()).all()), str(fine.grid)
            (True, 'Integer(4)')
        """
        if not isinstance(self.grid, TwoRanges):
            raise ValueError(f"Kernels on jpfq.TwoRanges(..) are split into two; this one is on {self.grid}.")
        fine, coarse = self.grid.parts
        return self._part(fine, 1), self._part(coarse, self.grid.ratio)

    def _part(self, table, factor) -> "QTensor":
        """The kernel whose codes are what a table has for these, on the fewest bits that hold it."""
        width = max(2, int(max(table.max(), -table.min() - 1)).bit_length() + 1)
        codes = jnp.asarray(table[np.asarray(self.codes)], np.int8)
        return dataclasses.replace(self, codes=codes, step=self.step * factor, grid=Integer(width))

    @anywhere
    def straight(self, kernel: jax.Array) -> jax.Array:
        """Another kernel of this shape at the values of these levels; derivatives pass straight through the rounding.

        Args:
            kernel: in the shape of the codes.

        Examples:
            >>> tensor = quantized.tensors["head/kernel"]
            >>> jax.grad(lambda kernel: tensor.straight(kernel).sum())(tensor.dequantize()).shape
            (32, 8)
        """
        return _unrotated(self.levels.straight(self.turned(kernel)), self.dtype, self.rotated)

    @anywhere
    def at(self, level: jax.Array) -> jax.Array:
        """The kernel of other levels, in units of the steps, than those of the codes. Differentiable, also by the steps."""
        return _unrotated(self.levels.at(level), self.dtype, self.rotated)

    @anywhere
    def turned(self, kernel: jax.Array) -> jax.Array:
        """A kernel in the coordinates and the type in which it is rounded."""
        kernel = kernel.astype(self.step.dtype)
        if self.rotated is not None:
            rotation, layout = self.rotated
            kernel = layout.operand(jax.vmap(rotation.rotate)(layout.matrices(kernel)))
        return kernel


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Info:
    """The error metrics of one kernel's quantization, on the calibration data.

    Examples:
        >>> info = quantized.info["hidden/kernel"]
        >>> 0 < float(info.relative_error) < 0.2, int(info.dead)
        (True, 0)
    """

    square_error: jax.Array  # ||X W - Xq q||_F^2
    energy: jax.Array  # ||X W||_F^2; nan where inputs are so small that their squares are lost
    saturation: jax.Array = dataclasses.field(metadata=_mean)  # share of arguments more than half a step off the grid
    dead: jax.Array  # input coordinates of which the data say nothing: their weights are rounded to nearest
    sparsity: jax.Array = dataclasses.field(metadata=_mean)  # share of weights quantized to 0
    entropy: jax.Array = dataclasses.field(metadata=_mean)  # of the codes, bits per weight: an entropy coder's rate
    zero_steps: jax.Array  # steps of 0 under weights that are not all 0: an error where positive
    square_floor: jax.Array  # of the square error, what the method would leave on an infinitely fine grid
    square_bound: jax.Array  # on the square error; nan where there is none
    failed: jax.Array  # entries of the system that are not finite: a factorisation that failed where positive
    square_rounding: jax.Array | float = np.nan  # how far rounding in float32 may have moved the square error
    exponent: jax.Array | int = 0  # squares are in units of 4^exponent; 0 where they fit into float32 as they are
    reach: WorstCase | None = None  # how far its integer sums go; None where no accumulator was asked for
    saturated_steps: jax.Array | int = 0  # steps beyond what their type stores, which took the nearest one that it does
    rows: jax.Array | None = None  # of a kernel of several matrices (experts): rows that are not 0, of each

    @property
    def relative_error(self) -> jax.Array:
        """||X W - Xq q||_F / ||X W||_F; 0 where both are 0. See `relative_rounding` for its digits."""
        return self._relative(self.square_error)

    @property
    def relative_floor(self) -> jax.Array:
        """The share of `relative_error` that no grid, however fine, would remove: what X - Xq leaves with this method."""
        return self._relative(self.square_floor)

    @property
    def relative_bound(self) -> jax.Array:
        """A bound on `relative_error`, and with it on the true one: `relative_floor` and what rounding adds at most.

        It follows from weights, data and steps alone, as if in exact arithmetic, plus twice the square of
        `relative_rounding` under the root, which is what float32 can make of it; on a coarse grid that is nothing beside it.

        It holds for the recursion as long as no argument lies beyond the grid. Where codes saturate, or a finisher improves
        them on data that are shrunk, they may end up beyond: then there is no bound, nan, as where the method or the data
        form has none.
        """
        return self._relative(self.square_bound)

    @property
    def relative_rounding(self) -> jax.Array:
        """The resolution of `relative_error` in float32: its square is off the true one by this square at most.

        An error far below it, as of codes that fit a single row almost exactly, is not told apart from 0.
        """
        return self._relative(self.square_rounding)

    @anywhere
    def _relative(self, square):
        return _relative(square, self.energy)

    @classmethod
    def join(cls, infos: "list[Info]", sizes: jax.Array | None = None) -> "Info":
        """The `Info` of a kernel quantized in parts (the layers of a stack), of equal size or of `sizes` (parts,)."""
        reach = WorstCase.join([info.reach for info in infos])
        found = [jnp.atleast_1d(info.rows) for info in infos if info.rows is not None]
        rows = jnp.concatenate(found) if found else None
        bare = [dataclasses.replace(info, reach=None, rows=None) for info in infos]
        return dataclasses.replace(_join(bare, sizes), reach=reach, rows=rows)


@jax.jit
def _join(infos, sizes):
    means = {f.name for f in dataclasses.fields(Info) if f.metadata.get("mean")}

    def mean(x: Any) -> Any:
        return x.mean() if sizes is None else jnp.sum(x * sizes) / sizes.sum()

    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *infos)
    fields: dict[str, Any] = {name: x for name, x in vars(stacked).items() if name not in ("reach", "rows")}
    squares, k = aligned(jnp.stack([fields[name] for name in SQUARES], 1), fields["exponent"][:, None])
    fields |= dict(zip(SQUARES, squares.T, strict=True)) | {"exponent": k}
    return Info(**{name: mean(x) if name in means else x.sum() for name, x in fields.items()})


@jax.jit
def _relative(square, energy):
    share = jnp.sqrt(square / jnp.where((square == 0) & (energy == 0), 1, energy))
    return jnp.where(jnp.isfinite(energy), share, jnp.nan)


@numpy_or_jit("dtype", "rotated", "offset", unless=lambda *given: given[5] is not None)
def _dequantize(codes, step, zero, table, dtype, rotated, offset):
    """Dequantizes codes of any grid without a table by one program."""
    levels = codes.astype(step.dtype) if table is None else table[codes.astype(np.int32)]
    step, zero = _spread(step, codes.shape), _spread(zero, codes.shape)
    return _unrotated(step * levels - zero if offset else step * (levels - zero), dtype, rotated)


def _unrotated(kernel, dtype, rotated):
    """A kernel in its own coordinates and type."""
    if rotated is not None:
        rotation, layout = rotated
        kernel = layout.operand(jax.vmap(rotation.unrotate)(layout.matrices(kernel)))
    return kernel.astype(dtype)


def code_dtype(grid: Grid) -> np.dtype:
    """The smallest of NumPy's integers that holds the codes of a grid, or of grids in lanes; int32 where it is traced."""
    lo, hi, *_ = grid.alphabet()
    if is_traced(lo) or is_traced(hi):
        return np.dtype(np.int32)
    lo, hi = int(np.min(lo)), int(np.max(hi))
    kinds = (np.int8, np.uint8, np.int16, np.uint16, np.int32)
    return np.dtype(next(k for k in kinds if np.iinfo(k).min <= lo and hi <= np.iinfo(k).max))


def entropy(codes: jax.Array, neurons: Neurons = ALL, real: jax.Array | None = None) -> jax.Array:
    """Entropy of integer codes (.., out) in bits; codes 2^16 and more above the lowest are counted together.

    Codes where `real` (.., 1) is False count for nothing.
    """
    codes = codes.astype(jnp.int32)
    above = jnp.minimum(codes - neurons.min(codes), 2**16 - 1)
    above = neurons.where(above if real is None else jnp.where(real, above, 2**16), 2**16)
    counts = neurons.add(jnp.bincount(above.ravel(), length=2**16))  # none at 2^16
    share = counts / counts.sum()
    return -jnp.sum(share * jnp.log2(jnp.where(share > 0, share, 1)))


def _spread(x, shape):
    """Repeats every entry of `x` over the run it serves."""
    xp = namespace(x)
    for axis, (here, full) in enumerate(zip(x.shape, shape, strict=True)):
        if here not in (1, full):
            x = xp.repeat(x, full // here, axis)
    return xp.broadcast_to(x, shape)

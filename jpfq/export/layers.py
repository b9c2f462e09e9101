"""Linear layers in the layouts of compressed-tensors: which one holds a kernel, its arrays, and what config.json says.

With weights (out, in), NAME.weight_scale the steps (out, groups of inputs):

    pack-quantized         weight_packed int32, 32 / bits integers to a word along the inputs, the first lowest, each with
                           2^(bits - 1) added; weight_zero_point int32, packed along the outputs; weight_shape (2,)
    int-quantized          weight int8 (out, in)
    float-quantized        weight float8_e4m3fn (out, in); in blocks, weight_scale (blocks of outputs, blocks of inputs)
    mxfp8-quantized        the same, weight_scale uint8, the exponent of a power of two with 127 added
    mxfp6-pack-quantized   weight_packed uint8, four codes of 6 bits to three bytes, the first lowest; scales likewise
    mxfp4-pack-quantized   weight_packed uint8, two codes of 4 bits to a byte, the first lowest; scales likewise
    nvfp4-pack-quantized   the same, weight_scale float8_e4m3fn, divided by weight_global_scale float32 (1,)
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..calibrate.activation import ActivationQuantizer
from ..matrix import QTensor
from ..model.sites import Site
from ..scalar import E2M1, E2M3, E4M3, Asymmetric, Grid, Integer
from ..scalar.bits import pack_bits
from ..scalar.step_types import E4M3 as E4M3_STEP
from ..scalar.step_types import E8M0 as E8M0_STEP
from ..scalar.step_types import packed_steps
from .matrix import Linear, integers, linear

Arrays = dict[str, np.ndarray]
MX = {E2M1: ("mxfp4-pack-quantized", 4), E2M3: ("mxfp6-pack-quantized", 6), E4M3: ("mxfp8-quantized", 8)}


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The rounding of a layer's inputs by a server: by one step, or by one for each token, found as it runs."""

    bits: int
    type: str
    symmetric: bool
    dynamic: bool

    def config(self) -> dict[str, Any]:
        """Its entry of config.json."""
        strategy = "token" if self.dynamic else "tensor"
        return {
            "num_bits": self.bits,
            "type": self.type,
            "symmetric": self.symmetric,
            "strategy": strategy,
            "dynamic": self.dynamic,
        }


DYNAMIC = {"int8": Inputs(8, "int", True, True), "fp8": Inputs(8, "float", True, True)}


@dataclasses.dataclass(frozen=True)
class Scheme:
    """The quantization of one layer."""

    format: str
    bits: int
    type: str
    group: int | None
    symmetric: bool
    inputs: Inputs | None = None
    block: tuple[int, int] | None = None  # outputs and inputs that share a step

    def config(self) -> dict[str, Any]:
        """Its entry of config.json, without the names of the layers."""
        strategy = "channel" if self.group is None else "group"
        weights: dict[str, Any] = {
            "num_bits": self.bits,
            "type": self.type,
            "symmetric": self.symmetric,
            "strategy": "tensor_group" if self.format == "nvfp4-pack-quantized" else strategy,
            "group_size": self.group,
            "dynamic": False,
        }
        if self.block is not None:
            weights |= {"strategy": "block", "group_size": None, "block_structure": list(self.block)}
        if self.format.startswith("mx"):
            weights |= {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
        if self.format == "nvfp4-pack-quantized":
            weights |= {"scale_dtype": "torch.float8_e4m3fn", "zp_dtype": "torch.float8_e4m3fn"}
        inputs = None if self.inputs is None else self.inputs.config()
        return {"weights": weights, "input_activations": inputs, "output_activations": None, "format": self.format}


def layer(tensor: QTensor, path: str, site: Site | None, inputs: Inputs | None) -> tuple[Scheme, Arrays]:
    """The scheme of a kernel used in a product, whose inputs are rounded so, and its arrays by the end of their names.

    Raises:
        ValueError: no layout holds it, and why.
    """
    grid, step_dtype = tensor.grid, tensor.step_dtype
    if isinstance(grid, (E2M1, E2M3, E4M3)):
        found = linear(tensor, path, site)
        sixteen, thirty_two = found.in_groups(16), found.in_groups(32)
        if isinstance(grid, E2M1) and step_dtype == E4M3_STEP and sixteen is not None:
            return Scheme("nvfp4-pack-quantized", 4, "float", 16, True, inputs), _nvfp4(sixteen, grid)
        if step_dtype == E8M0_STEP and thirty_two is not None:
            format, bits = MX[type(grid)]
            arrays = _packed(thirty_two, grid) if bits < 8 else {"weight": _float8(thirty_two, grid)}
            return Scheme(format, bits, "float", 32, True, inputs), arrays | _exponents(thirty_two)
        if isinstance(grid, E4M3):
            block, step = found.blocks()
            arrays = {"weight": _float8(found, grid), "weight_scale": step}
            return Scheme("float-quantized", 8, "float", found.group, True, inputs, block), arrays
        raise ValueError(
            f"{grid} is held in groups of 32 with steps of float8_e8m0fnu (jpfq.formats.mxfp4, mxfp6)"
            + (", or of 16 with steps of float8_e4m3fn (jpfq.formats.nvfp4)" if isinstance(grid, E2M1) else "")
        )
    return _integers(tensor, path, site, inputs)


def inputs_of(quantizers: list[ActivationQuantizer] | None) -> tuple[Inputs | None, Arrays]:
    """The rounding of a layer's inputs by a server as they were calibrated, and the arrays it takes.

    Raises:
        ValueError: no server rounds them so, and why.
    """
    if not quantizers:
        return None, {}
    settings = quantizers[0].settings
    grid, dynamic = settings.grid, settings.per == "row"
    kind = _kind(grid)
    if kind is None or settings.per in ("channel", "group") or settings.rotation is not None or len(quantizers) > 1:
        more = ", once for each of its uses" if len(quantizers) > 1 else ""
        more = ", rotated" if settings.rotation is not None else more
        raise ValueError(f"its inputs are rounded to {grid} per {settings.per}{more}, which the format does not have")
    if settings.step_dtype is not None:
        raise ValueError(f"its inputs have steps of {settings.step_dtype}, and servers take float32 steps per row")
    if dynamic and isinstance(grid, Asymmetric):
        raise ValueError(f"its inputs are rounded to {grid} per row: servers take Integer(8) or E4M3() there")
    if isinstance(grid, Integer) and grid.narrow and not dynamic:
        raise ValueError(f"its inputs are rounded to {grid}, without the lowest integer, which servers have")
    inputs = Inputs(8, kind, not isinstance(grid, Asymmetric), dynamic)
    levels = quantizers[0].levels
    if levels is None:
        return inputs, {}
    arrays = {"input_scale": np.asarray(levels.step).reshape(1)}
    if isinstance(grid, Asymmetric):  # codes 0 .. 255 are -128 .. 127 there
        arrays["input_zero_point"] = (np.asarray(levels.zero).reshape(1) - 128).astype(np.int8)
    return inputs, arrays


def packed_int32(codes: np.ndarray, bits: int) -> np.ndarray:
    """Signed integers (rows, columns) as int32 (rows, ceil(columns / n)), n = 32 / bits to a word, the first lowest."""
    per = 32 // bits
    shifted = (codes + 2 ** (bits - 1)).astype(np.uint32)
    shifted = np.pad(shifted, [(0, 0), (0, -codes.shape[1] % per)]).reshape(len(codes), -1, per)
    return np.bitwise_or.reduce(shifted << (bits * np.arange(per, dtype=np.uint32)), -1).view(np.int32)


def _kind(grid: Grid) -> str | None:
    if isinstance(grid, E4M3):
        return "float"
    return "int" if isinstance(grid, (Integer, Asymmetric)) and grid.storage_bits == 8 else None


def _integers(tensor, path, site, inputs):
    found, needed, symmetric = integers(tensor, path, site)
    if needed > 8:
        raise ValueError(f"{tensor.grid} takes {needed} bits with a sign, and there are 4 or 8")
    bits = 4 if needed <= 4 else 8
    codes, step, group = found.codes, found.step, found.group
    if bits == 8 and inputs is not None and symmetric:
        arrays = {"weight": codes.astype(np.int8), "weight_scale": step}
        return Scheme("int-quantized", 8, "int", group, True, inputs), arrays
    arrays = {
        "weight_packed": packed_int32(codes, bits),
        "weight_scale": step,
        "weight_shape": np.array(codes.shape, np.int64),
    }
    if not symmetric:
        arrays["weight_zero_point"] = np.ascontiguousarray(packed_int32(found.zero.T, bits).T)
    return Scheme("pack-quantized", bits, "int", group, symmetric, inputs), arrays


def _bit_patterns(codes: np.ndarray, grid: Any) -> np.ndarray:
    """Codes of a floating-point grid as the bits of its numbers."""
    return np.array(grid.values).astype(getattr(jnp, grid.type)).view(np.uint8)[codes]


def _float8(found: Linear, grid: Any) -> np.ndarray:
    return _bit_patterns(found.codes, grid).view(jnp.float8_e4m3fn)


def _packed(found: Linear, grid: Any) -> Arrays:
    patterns = _bit_patterns(found.codes, grid)
    return {"weight_packed": np.asarray(pack_bits(jnp.asarray(patterns), grid.storage_bits))}


def _exponents(found: Linear) -> Arrays:
    steps, _ = packed_steps(found.step, E8M0_STEP)
    return {"weight_scale": np.ascontiguousarray(steps).view(np.uint8)}


def _nvfp4(found: Linear, grid: Any) -> Arrays:
    steps, unit = packed_steps(found.step, E4M3_STEP)
    return _packed(found, grid) | {"weight_scale": steps, "weight_global_scale": np.array([1 / unit], np.float32)}

"""Results in AWQ, the layout of AutoAWQ's GEMM kernels, which vLLM loads on GPU and TPU.

A dense kernel (in, out) = scales * (weight - zeros), with unsigned integers of 4 bits, becomes

    NAME.qweight    int32 (in, out / 8)
    NAME.qzeros     int32 (in / group, out / 8)
    NAME.scales     float16 (in / group, out)

Eight integers lie in a word along the outputs: 0, 2, 4, 6, 1, 3, 5, 7 from the lowest four bits on. A grid without fitted
zero points has the same one everywhere. One group size holds for all layers.
"""

import dataclasses
import os
from typing import Any

import jax.numpy as jnp
import numpy as np

from ..matrix import QTensor
from ..matrix.packed import extent
from ..model.sites import Site
from .folder import Folder, write
from .matrix import Linear, integers, is_half, linear, products

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
SIZES = (128, 64, 32)  # of groups that kernels of servers have, for layers without any


def awq(quantized: Any, folder: str | os.PathLike, **options: Any) -> dict[str, str]:
    """Writes model.safetensors, in several files where it is large, and config.json into a new folder.

    Kernels of up to 16 integer levels with float16 steps are held (`jpfq.formats.awq`).

    Args:
        quantized: a result without quantized inputs, which the format does not have.
        folder: a new folder.
        **options: those of `jpfq.export.folder.Folder`.

    Returns:
        By path, the reason for each quantized kernel that is written dequantized.

    Raises:
        ValueError: no kernel can be held, inputs are quantized, the folder is in use, or two parameters take one name.
    """
    to = Folder.of("awq", folder, options)
    if quantized.inputs.keys() & quantized.tensors.keys():
        raise ValueError("AWQ holds weights, and no rounding of inputs. Quantize without activations.")
    sites = {} if to.batch is None else products(quantized._functional, to.batch)
    size = _size(quantized.tensors, sites)

    def held(path, site):
        found = _unsigned(quantized.tensors[path], path, site)
        grouped = found.in_groups(found.codes.shape[1] if size == -1 else size)
        if grouped is None:
            own = f"groups of {found.group}" if found.group else f"{found.codes.shape[1]} inputs"
            raise ValueError(f"it has {own}, and AWQ one group size for all layers, here {size}")
        return "awq", arrays(grouped)

    return write(quantized, to, held, lambda schemes, plain: _config(size, schemes, plain))


def arrays(found: Linear) -> dict[str, np.ndarray]:
    """The arrays of a matrix of codes and zero points 0 .. 15, by the end of their names."""
    return {
        "qweight": packed(found.codes.T),
        "qzeros": packed(found.zero.T),
        "scales": np.ascontiguousarray(found.step.T).astype(np.float16),
    }


def packed(codes: np.ndarray) -> np.ndarray:
    """Integers 0 .. 15 (rows, out) as int32 (rows, out / 8)."""
    words = codes.astype(np.uint32).reshape(len(codes), -1, len(ORDER))[..., ORDER]
    return np.bitwise_or.reduce(words << (4 * np.arange(len(ORDER), dtype=np.uint32)), -1).view(np.int32)


def _unsigned(tensor: QTensor, path: str, site: Site | None) -> Linear:
    """The matrix of a kernel, with codes and zero points 0 .. 15; ValueError says why there is none."""
    lo, levels = extent(tensor.grid)
    zero = np.asarray(tensor.zero) - lo
    if tensor.grid.table is None and levels <= 16 and np.isin(zero, np.arange(16)).all():
        codes = tensor.codes.astype(jnp.int32) - lo
        found = linear(dataclasses.replace(tensor, codes=codes, zero=jnp.asarray(zero, jnp.int32)), path, site)
    else:
        signed, bits, _ = integers(tensor, path, site)
        if bits > 4:
            raise ValueError(f"{tensor.grid} takes {bits} bits with a sign, and AWQ has 4")
        found = signed._replace(codes=signed.codes + 8, zero=signed.zero + 8)
    if found.codes.shape[0] % len(ORDER):
        raise ValueError(f"it has {found.codes.shape[0]} outputs, and AWQ takes multiples of {len(ORDER)}")
    if not is_half(found.step):
        raise ValueError("its steps are not of float16: see jpfq.formats.awq, or set step_dtype='float16'")
    return found


def _size(tensors: dict[str, QTensor], sites: dict[str, Site]) -> int:
    """The group size that the most kernels can have, the larger of two; -1 stands for all inputs."""
    found = []
    for path, tensor in tensors.items():
        try:
            matrix = _unsigned(tensor, path, sites.get(path))
        except ValueError:
            continue  # whose reason `held` says
        found.append((matrix.group, matrix._replace(codes=matrix.codes[:1].copy())))
    sizes = {group for group, _ in found if group} or {*SIZES, -1}
    holds = lambda size: sum(m.in_groups(m.codes.shape[1] if size == -1 else size) is not None for _, m in found)
    return max(sizes, key=lambda size: (holds(size), size))


def _config(size: int, schemes: dict[str, Any], plain: list[str]) -> dict:
    for name in plain:  # servers leave every layer whose name has one of these in it
        if taken := [layer for layer in schemes if name in layer]:
            raise ValueError(
                f"AWQ names layers to leave by parts of names, and {name!r} is part of {taken[0]!r}, which is quantized: "
                "tell them apart by names=."
            )
    return {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": size,
        "zero_point": True,  # there are always zero points, for a symmetric grid 8 everywhere
        "modules_to_not_convert": plain or None,
    }

"""Kernels in the blocks of GGUF: each is a step or more, and codes along the inputs.

    Q4_0    32 inputs: a float16 step d, and codes of 4 bits with 8 added; value = (code - 8) d
    Q4_1    32 inputs: a float16 step d and a float16 m; value = d code + m
    Q8_0    32 inputs: a float16 step, and codes int8
    Q4_K    256 inputs: float16 d and dmin, and for each 32 of them scale and minimum, of 6 bits each; codes of 4 bits;
            value = d scale code - dmin minimum
    Q6_K    256 inputs: codes of 6 bits with 32 added, for each 16 of them a scale int8, and a float16 d;
            value = d scale (code - 32)

Codes of 4 bits lie two to a byte: of 32 (64 in Q4_K) in a row the first half is in the low halves of the bytes.
"""

from typing import NamedTuple

import numpy as np

from ..matrix import QTensor
from ..model.sites import Site
from ..scalar.step_types import INT8, UINT6, UnderHalf, factors
from .matrix import integers, is_half, linear

BLOCK, SUPERBLOCK = 32, 256


class Blocks(NamedTuple):
    """A type of GGUF, and the bytes (out, bytes) of a matrix in it."""

    kind: str
    data: np.ndarray


def blocks_of(tensor: QTensor, path: str, site: Site | None) -> Blocks:
    """A kernel in the type that holds it.

    Raises:
        ValueError: none does, and why.
    """
    if tensor.grid.offset and tensor.grid.storage_bits == 4:
        return _with_offsets(tensor, path, site)
    found, bits, symmetric = integers(tensor, path, site)
    if bits > 8 or not symmetric:
        raise ValueError(f"{tensor.grid} is no run of integers of 8 bits about 0")
    if tensor.step_dtype == INT8 and bits <= 6 and (grouped := found.in_groups(SUPERBLOCK // INT8.run)) is not None:
        return Blocks("Q6_K", q6_k(found.codes, *_factors(grouped.step, INT8)))
    grouped = found.in_groups(BLOCK)
    if grouped is None or not is_half(grouped.step):
        raise ValueError("its steps are not of float16, one for every 32 inputs: see jpfq.formats.q4_0 and q8_0")
    kind, make = ("Q4_0", q4_0) if bits <= 4 else ("Q8_0", q8_0)
    return Blocks(kind, make(found.codes, grouped.step))


def q4_0(codes: np.ndarray, step: np.ndarray) -> np.ndarray:
    """The bytes of codes (out, in) about 0 and steps (out, in / 32)."""
    return _rows(_half(step), _nibbles(codes + 8, BLOCK))


def q4_1(codes: np.ndarray, step: np.ndarray, least: np.ndarray) -> np.ndarray:
    """The bytes of codes (out, in) from 0, and steps and least values (out, in / 32)."""
    return _rows(_half(step), _half(least), _nibbles(codes, BLOCK))


def q8_0(codes: np.ndarray, step: np.ndarray) -> np.ndarray:
    """The bytes of codes (out, in) and steps (out, in / 32)."""
    return _rows(_half(step), codes.astype(np.int8).view(np.uint8).reshape(len(codes), -1, BLOCK))


def q4_k(
    codes: np.ndarray, half: np.ndarray, scale: np.ndarray, least_half: np.ndarray, least: np.ndarray
) -> np.ndarray:
    """The bytes of codes (out, in) from 0; float16s (out, in / 256), and the integers (out, in / 256, 8) that they multiply.

    Of scales and minima 0 to 3 the lower 6 bits of a byte are the number. The upper two have the upper two of number 4 to
    7, whose lower four share a byte.
    """
    (scale_low, scale_high), (least_low, least_high) = (np.split(x, 2, axis=-1) for x in (scale, least))
    first = scale_low | (scale_high >> 4) << 6
    second = least_low | (least_high >> 4) << 6
    third = (scale_high & 15) | (least_high & 15) << 4
    return _rows(_half(half), _half(least_half), first, second, third, _nibbles(codes, 64).reshape(len(codes), -1, 128))


def q6_k(codes: np.ndarray, half: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """The bytes of codes (out, in) about 0; float16s (out, in / 256), and the integers (out, in / 256, 16) they multiply.

    In each half of a block, byte i has the lower four bits of codes i and i + 64; and a byte has the upper two of codes i,
    i + 32, i + 64 and i + 96.
    """
    halves = (codes + 32).astype(np.uint8).reshape(len(codes), -1, 2, 4, 32)
    flat = lambda x: x.reshape(len(codes), halves.shape[1], -1)
    low = halves & 15
    upper = (halves >> 4) << np.array([0, 2, 4, 6], np.uint8)[:, None]
    low = low[:, :, :, :2] | low[:, :, :, 2:] << 4
    return _rows(
        flat(low), flat(np.bitwise_or.reduce(upper, axis=3)), scale.astype(np.int8).view(np.uint8), _half(half)
    )


def _with_offsets(tensor, path, site) -> Blocks:
    found = linear(tensor, path, site)
    grouped = found.in_groups(BLOCK)
    if grouped is None:
        raise ValueError("its steps are not one for every 32 inputs: see jpfq.formats.q4_1 and q4_k")
    if tensor.step_dtype == UINT6:
        return Blocks("Q4_K", q4_k(found.codes, *_factors(grouped.step, UINT6), *_factors(grouped.zero, UINT6)))
    if not (is_half(grouped.step) and is_half(grouped.zero)):
        raise ValueError("its steps and offsets are not of float16: see jpfq.formats.q4_1")
    return Blocks("Q4_1", q4_1(found.codes, grouped.step, -grouped.zero))


def _factors(x: np.ndarray, kind: UnderHalf) -> tuple[np.ndarray, np.ndarray]:
    """A float16 for each run of numbers (out, groups), and the integers that it multiplies."""
    if x.shape[1] % kind.run:
        raise ValueError(f"its inputs are no multiple of {SUPERBLOCK}")
    return factors(x.reshape(len(x), -1, kind.run), kind.top)


def _half(x):
    """Numbers (out, blocks) as the bytes of float16."""
    return np.ascontiguousarray(x.astype(np.float16)[..., None]).view(np.uint8)


def _nibbles(codes, run):
    """Codes (out, in) from 0 to 15, two to a byte: of `run` in a row the second half in the upper four bits."""
    codes = codes.astype(np.uint8).reshape(len(codes), -1, run)
    return codes[..., : run // 2] | codes[..., run // 2 :] << 4


def _rows(*parts):
    """The bytes (out, blocks, ..) of the parts of each block, one after another."""
    return np.ascontiguousarray(np.concatenate(parts, -1)).reshape(len(parts[0]), -1)

"""Inputs of layers in blocks of few bits, in NumPy and float64.

The casts of ml_dtypes are those of the standards, ties to even.
"""

import ml_dtypes
import numpy as np

TYPES = {"E2M1": ml_dtypes.float4_e2m1fn, "E4M3": ml_dtypes.float8_e4m3fn, "E5M2": ml_dtypes.float8_e5m2}


def values(name):
    """The finite values of a type, ascending."""
    bits = 4 if name == "E2M1" else 8
    found = np.arange(2**bits, dtype=np.uint8).view(TYPES[name]).astype(np.float64)
    return np.unique(found[np.isfinite(found)] + 0.0)


def nearest(position, levels):
    """The level nearest to each position; of two at equal distance, the upper one."""
    distance = np.abs(np.asarray(position, np.float64)[..., None] - levels)
    return levels[len(levels) - 1 - np.argmin(distance[..., ::-1], -1)]


def powers(largest, top):
    """OCP's shared scales, 2^(floor(log2 largest) - floor(log2 top)); the least one for blocks of 0."""
    exponent = np.frexp(np.where(largest > 0, largest, 2.0**-126))[1] - np.frexp(top)[1]
    return np.ldexp(1.0, np.maximum(exponent, -126))


def nvfp4_steps(largest, unit):
    """Steps of E2M1 blocks in E4M3 times a unit, cast by ml_dtypes."""
    held = np.clip(largest / 6 / unit, 2.0**-9, 448).astype(np.float32).astype(ml_dtypes.float8_e4m3fn)
    return np.where(largest > 0, held.astype(np.float64) * unit, 0)


def unit_of(largest):
    """The least power of two under which a step is at most 448."""
    return 2.0 ** np.ceil(np.log2(largest / 448))


def in_blocks(x, size, steps, levels):
    """Rounds x (.., n) block by block: `steps` of the largest magnitude of each block; the last block may be short."""
    x, n = np.asarray(x, np.float64), x.shape[-1]
    out = np.zeros_like(x)
    for start in range(0, n, size):
        part = x[..., start : start + size]
        step = steps(np.abs(part).max(-1, keepdims=True))
        out[..., start : start + size] = step * nearest(part / np.where(step > 0, step, 1), levels)
    return out


def asymmetric(x, bits):
    """Rounds x (.., n) to 2^bits integers with a zero point, one step along the last axis."""
    x, top = np.asarray(x, np.float64), 2**bits - 1
    low, high = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
    step = (high - low) / top
    safe = np.where(step > 0, step, 1)
    zero = np.floor(-low / safe + 0.5)
    return step * (np.clip(np.floor(x / safe + zero + 0.5), 0, top) - zero)

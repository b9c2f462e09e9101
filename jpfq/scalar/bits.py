"""Integer codes packed into bytes, and back.

Codes 0 .. levels - 1 take `ceil(log2(levels))` bits each, except where more of them fit into a byte as digits: five ternary
codes, because 3^5 = 243 (1.6 bits each, of the 1.58 an ideal code of fixed rate takes), and three of 5 or 6 levels.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

from .predicates import is_count

MAX_LEVELS = 2**16
MAX_BITS = 31


def code_bits(levels: int) -> float:
    """Bits that one packed code takes, padding aside."""
    codes, size = _chunk(levels)
    return 8 * size / codes


def packed_size(count: int, levels: int) -> int:
    """Bytes that `count` codes take, the last ones padded with codes of 0."""
    codes, size = _chunk(levels)
    return -(-count // codes) * size


@partial(jax.jit, static_argnames="levels")
def pack(codes: jax.Array, levels: int) -> jax.Array:
    """Codes (.., count) of 0 .. levels - 1 as bytes (.., packed_size(count, levels)), the first code lowest."""
    per, size = _chunk(levels)
    codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % per)])
    codes = codes.reshape(*codes.shape[:-1], codes.shape[-1] // per, per)
    if size > 1:  # every run by itself, which is three times as fast as the row as a whole
        return pack_bits(codes, size * 8 // per).reshape(*codes.shape[:-2], codes.shape[-2] * size)
    base = _base(levels)
    return jnp.asarray(sum(codes[..., i].astype(jnp.uint8) * jnp.uint8(base**i) for i in range(per)))


@partial(jax.jit, static_argnames=("levels", "count"))
def unpack(words: jax.Array, levels: int, count: int) -> jax.Array:
    """The inverse of `pack`: codes (.., count) of uint8, or uint16 where there are more than 256 levels."""
    per, size = _chunk(levels)
    if words.shape[-1] != packed_size(count, levels):
        raise ValueError(
            f"{count} codes of {levels} levels are packed into {packed_size(count, levels)} bytes; got {words.shape[-1]}."
        )
    padded = words.shape[-1] // size * per
    if size > 1:
        return unpack_bits(words, size * 8 // per, padded)[..., :count]
    base = _base(levels)
    codes = jnp.stack([words // jnp.uint8(base**i) % jnp.uint8(base) for i in range(per)], -1) if per > 1 else words
    return codes.reshape(*words.shape[:-1], padded)[..., :count]


@partial(jax.jit, static_argnames="bits")
def pack_bits(codes: jax.Array, bits: int) -> jax.Array:
    """Codes 0 .. 2^bits - 1 (.., count) as whole bits, lowest first: uint8 (.., ceil(count bits / 8)).

    Unlike `pack` of 2^bits levels it fills up each row to a whole byte, not to whole codes in whole bytes.

    Args:
        codes: whole numbers.
        bits: of each, from 1 to 31.

    Examples:
        >>> jpfq.embed.pack(jnp.array([1, 2, 3, 0]), 2).tolist()
        [57]
    """
    kind, lead, total = _kind(bits), codes.shape[:-1], codes.shape[-1] * bits
    each = codes.astype(kind)[..., None] >> _places(bits, codes.ndim + 1, kind) & 1
    flat = jnp.pad(each.astype(jnp.uint8).reshape(*lead, total), [(0, 0)] * len(lead) + [(0, -total % 8)])
    bytes = flat.reshape(*lead, -(-total // 8), 8) << _places(8, codes.ndim + 1, jnp.uint8)
    return bytes.sum(-1, dtype=jnp.uint8)


@partial(jax.jit, static_argnames=("bits", "count"))
def unpack_bits(words: jax.Array, bits: int, count: int) -> jax.Array:
    """The inverse of `pack_bits`: codes (.., count) of the smallest unsigned integers that hold them.

    Args:
        words: from `pack_bits`.
        bits: of each code.
        count: codes in a row.

    Examples:
        >>> jpfq.embed.unpack(jnp.array([57], jnp.uint8), 2, count=4).tolist()
        [1, 2, 3, 0]
    """
    kind, size = _kind(bits), -(-count * bits // 8)
    if words.dtype != jnp.uint8 or words.shape[-1] != size:
        raise ValueError(
            f"{count} codes of {bits} bits are packed into uint8 (.., {size}); got {words.dtype} of shape {words.shape}."
        )
    flat = jnp.unpackbits(words, axis=-1, count=count * bits, bitorder="little")
    each = flat.reshape(*words.shape[:-1], count, bits).astype(kind)
    return (each << _places(bits, each.ndim, kind)).sum(-1, dtype=kind)


def _kind(bits):
    """The smallest type of codes of so many bits."""
    if not is_count(bits) or bits > MAX_BITS:
        raise ValueError(f"Codes are packed at a whole number of bits from 1 to {MAX_BITS}; got {bits!r}.")
    return next(kind for kind in (jnp.uint8, jnp.uint16, jnp.uint32) if bits <= jnp.iinfo(kind).bits)


def _chunk(levels: int) -> tuple[int, int]:
    """(codes, bytes) of the smallest run of bytes that holds whole codes."""
    if not is_count(levels) or levels > MAX_LEVELS:
        raise ValueError(f"Codes are packed for 1 to {MAX_LEVELS} levels; got {levels!r}.")
    width = _width(levels)
    digits = next(n for n in range(8, -1, -1) if max(levels, 2) ** n <= 2**8)
    if digits * width >= 8:  # as tight as whole bits, or tighter
        return digits, 1
    common = math.gcd(width, 8)
    return 8 // common, width // common


def _base(levels: int) -> int:
    """The base of the digits of a byte; a power of two where that holds as many, which makes divisions shifts."""
    power = 2 ** _width(levels)
    return power if power ** _chunk(levels)[0] <= 2**8 else levels


def _places(count, ndim, kind):
    """0 .. count - 1 along the last of so many axes."""
    return jnp.arange(count, dtype=kind).reshape((1,) * (ndim - 1) + (count,))


def _width(levels: int) -> int:
    return max(1, (levels - 1).bit_length())

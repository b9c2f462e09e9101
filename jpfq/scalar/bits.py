"""Integer codes packed into bytes, and back.

Codes 0 .. levels - 1 take `ceil(log2(levels))` bits each, except where more of them fit into a byte as digits: five ternary
codes, because 3^5 = 243 (1.6 bits each, of the 1.58 an ideal code of fixed rate takes), and three of 5 or 6 levels.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp

MAX_LEVELS = 2**16


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
    if size == 1:
        base = _base(levels)
        chunks = sum(codes[..., i].astype(jnp.uint8) * jnp.uint8(base**i) for i in range(per))
        return jnp.asarray(chunks)
    width = size * 8 // per
    bits = codes.astype(jnp.uint16)[..., None] >> _places(width, codes.ndim + 1, jnp.uint16) & 1
    bits = bits.astype(jnp.uint8).reshape(*codes.shape[:-1], size, 8)
    words = (bits << _places(8, bits.ndim, jnp.uint8)).sum(-1, dtype=jnp.uint8)
    return words.reshape(*codes.shape[:-2], codes.shape[-2] * size)


@partial(jax.jit, static_argnames=("levels", "count"))
def unpack(words: jax.Array, levels: int, count: int) -> jax.Array:
    """The inverse of `pack`: codes (.., count) of uint8, or uint16 where there are more than 256 levels."""
    per, size = _chunk(levels)
    if words.shape[-1] != packed_size(count, levels):
        raise ValueError(
            f"{count} codes of {levels} levels are packed into {packed_size(count, levels)} bytes; got {words.shape[-1]}."
        )
    if size == 1:
        base = _base(levels)
        codes = jnp.stack([words // jnp.uint8(base**i) % jnp.uint8(base) for i in range(per)], -1) if per > 1 else words
    else:
        width, kind = size * 8 // per, jnp.uint8 if levels <= 2**8 else jnp.uint16
        bits = words[..., None] >> _places(8, words.ndim + 1, jnp.uint8) & 1
        bits = bits.reshape(*words.shape[:-1], words.shape[-1] // size * per, width).astype(kind)
        codes = (bits << _places(width, bits.ndim, kind)).sum(-1, dtype=kind)
    return codes.reshape(*words.shape[:-1], words.shape[-1] // size * per)[..., :count]


def _chunk(levels: int) -> tuple[int, int]:
    """(codes, bytes) of the smallest run of bytes that holds whole codes."""
    if not isinstance(levels, int) or isinstance(levels, bool) or not 1 <= levels <= MAX_LEVELS:
        raise ValueError(f"Codes are packed for 1 to {MAX_LEVELS} levels; got {levels!r}.")
    width = _width(levels)
    digits = next(n for n in range(8, -1, -1) if max(levels, 2) ** n <= 2**8)
    if digits * width >= 8:  # as tight as whole bits, or tighter
        return digits, 1
    common = math.gcd(width, 8)
    return 8 // common, width // common


def _base(levels: int) -> int:
    """Of the digits of a byte; a power of two where that holds as many, which makes divisions shifts."""
    power = 2 ** _width(levels)
    return power if power ** _chunk(levels)[0] <= 2**8 else levels


def _places(count, ndim, kind):
    """0 .. count - 1 along the last of so many axes."""
    return jnp.arange(count, dtype=kind).reshape((1,) * (ndim - 1) + (count,))


def _width(levels: int) -> int:
    return max(1, (levels - 1).bit_length())

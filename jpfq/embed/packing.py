"""Packs small whole numbers into bytes."""

import functools

import jax
import jax.numpy as jnp

MOST = 31


@functools.partial(jax.jit, static_argnames="bits")
def pack(x: jax.Array, bits: int) -> jax.Array:
    """Numbers 0 .. 2^bits - 1 (.., count) as uint8 (.., bytes), lowest bits first; each row fills whole bytes.

    Args:
        x: whole numbers.
        bits: of each, from 1 to 31.

    Example:
        >>> jpfq.embed.pack(jnp.array([1, 2, 3, 0]), 2).tolist()
        [57]
    """
    _check(bits)
    each = x.astype(jnp.uint32)[..., None] >> jnp.arange(bits, dtype=jnp.uint32).reshape((1,) * x.ndim + (-1,))
    flat = (each & jnp.uint32(1)).astype(jnp.uint8).reshape(*x.shape[:-1], x.shape[-1] * bits)
    return jnp.packbits(flat, axis=-1, bitorder="little")


@functools.partial(jax.jit, static_argnames=("bits", "count"))
def unpack(packed: jax.Array, bits: int, count: int) -> jax.Array:
    """The inverse of `pack`: `count` numbers of each row, as int32.

    Args:
        packed: from `pack`.
        bits: of each number.
        count: numbers in a row.

    Example:
        >>> jpfq.embed.unpack(jnp.array([57], jnp.uint8), 2, count=4).tolist()
        [1, 2, 3, 0]
    """
    _check(bits)
    flat = jnp.unpackbits(packed, axis=-1, count=count * bits, bitorder="little")
    each = flat.reshape(*packed.shape[:-1], count, bits).astype(jnp.int32)
    return jnp.sum(each << jnp.arange(bits, dtype=jnp.int32).reshape((1,) * packed.ndim + (-1,)), -1, dtype=jnp.int32)


def _check(bits):
    if not isinstance(bits, int) or isinstance(bits, bool) or not 1 <= bits <= MOST:
        raise ValueError(f"Numbers are packed at a whole number of bits from 1 to {MOST}; got {bits!r}.")

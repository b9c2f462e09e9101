"""Sums of squares of numbers so large or so small that their squares leave the range of float32.

Such numbers are divided by a power of two first, 2^k, and their squares are in units of 4^k. For all others k is 0.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

ORDINARY = 30  # numbers from 2^-30 to 2^30 are squared as they are: sums of many fit, and so do small errors


def exponent_of(*largest: jax.Array) -> jax.Array:
    """k for products of numbers, of which the largest are given (); 0 where one is 0, NaN or infinite."""
    usable = [jnp.isfinite(x) & (x > 0) for x in largest]
    k = sum((jnp.frexp(x)[1] for x in largest), jnp.zeros((), jnp.int32))
    extreme = jnp.all(jnp.stack(usable)) & (jnp.abs(k) > ORDINARY)
    return jnp.where(extreme, k, 0)


def reduced(x: jax.Array, k: jax.Array) -> jax.Array:
    """x / 2^k. In two steps, as 2^k itself may be out of range."""
    half = -k // 2
    return x * _power(half, x.dtype) * _power(-k - half, x.dtype)


def _power(k, dtype):
    """2^k of a type, for k within its normal range, by its bits: a small program, where `ldexp` is a long one."""
    kind = jnp.finfo(dtype)
    bits = (jnp.clip(k, kind.minexp, kind.maxexp - 1) + (kind.maxexp - 1)).astype(f"int{kind.bits}") << kind.nmant
    return lax.bitcast_convert_type(bits, dtype)


def aligned(squares: Any, exponents: Any) -> tuple[Any, Any]:
    """Squares (parts, ..) in units of 4^k, in those of the largest k among the parts; and this k."""
    library = np if isinstance(exponents, np.ndarray) else jnp
    k = exponents.max(0, keepdims=True)
    return library.ldexp(squares, (2 * (exponents - k)).astype(np.int32)), k[0]

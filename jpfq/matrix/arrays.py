"""Helpers of arrays: products at full precision, types, whether all entries are finite."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .explicit_mesh import no_mesh
from .split import Split

HALVES = 256  # inputs from which on half of a symmetric product costs more than to copy it


def raised(x: jax.Array, power: int) -> jax.Array:
    """x 2^power."""
    return x * jnp.asarray(2.0**power, x.dtype) if power else x


def matmul(a, b):
    """a @ b at full precision: products that feed the recursion never run in bfloat16 or TF32."""
    if isinstance(a, Split):
        return a.times(b)
    return jnp.matmul(a, b, precision="highest")


def at_least_float32(x):
    """`x` in the type that Grams and the recursion work in: float64 stays, all else becomes float32."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise ValueError(f"Inputs must be real numbers; got {x.dtype}.")
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def is_finite(x) -> bool:
    """True if no entry of an array is infinite or NaN; also while something else is traced."""
    return are_finite([x])[0]


def are_finite(arrays: Sequence[jax.Array]) -> list[bool]:
    """`is_finite` of each: by NumPy in the memory of the host, else by one program for all that lie on the same devices."""
    places: dict = {}
    found: dict[int, bool] = {}
    with no_mesh(), jax.ensure_compile_time_eval():
        for i, x in enumerate(arrays):
            devices = frozenset(x.sharding.device_set) if isinstance(x, jax.Array) else frozenset()
            if all(device.platform == "cpu" for device in devices) and getattr(x, "is_fully_addressable", True):
                found[i] = all(bool(np.isfinite(part).all()) for part in _parts(x))  # nothing to compile
            else:
                places.setdefault(devices, []).append(i)
        for numbers in places.values():
            found |= zip(numbers, map(bool, all_finite([arrays[i] for i in numbers])), strict=True)
    return [found[i] for i in range(len(arrays))]


def _parts(x):
    """An array as NumPy arrays, one for each of its shards: without the copy of the whole that a `jax.Array` would keep."""
    if not isinstance(x, jax.Array):
        return [np.asarray(x)]
    return [np.asarray(shard.data) for shard in x.addressable_shards if shard.replica_id == 0]


@jax.jit
def all_finite(arrays):
    """`are_finite` as arrays, which nobody waits for."""
    return [jnp.isfinite(x).all() for x in arrays]


def inner(X, Y):
    """X^T Y over all row axes, without merging them (a sharded axis must not be reshaped)."""
    rows = tuple(range(X.ndim - 1))
    return lax.dot_general(X, Y, ((rows, rows), ((), ())), precision="highest")


def square(X, Y):
    """X^T Y where it is symmetric: a quarter of it, below the diagonal, is copied from above."""
    n = Y.shape[-1]
    if n < HALVES:
        return inner(X, Y)
    half = n // 2
    top, corner = inner(X[..., :half], Y), inner(X[..., half:], Y[..., half:])
    return jnp.concatenate([top, jnp.concatenate([top[:, half:].T, corner], 1)])


def sum_rows(weight, X):
    rows = tuple(range(weight.ndim))
    return lax.dot_general(weight, X, ((rows, rows), ((), ())), precision="highest")


def over_rows(weights, rows):
    """Weights whose axes are the leading axes of the rows, broadcast to all of them."""
    weights = jnp.asarray(weights)
    if weights.shape != rows[: weights.ndim]:
        raise ValueError(
            f"Row weights of shape {weights.shape} do not fit rows of shape {rows}: leading axes must agree."
        )
    return jnp.broadcast_to(weights.reshape(weights.shape + (1,) * (len(rows) - weights.ndim)), rows)

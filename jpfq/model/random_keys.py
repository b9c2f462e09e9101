"""Helpers for random keys: typed from raw, and folded for each lane of a sweep."""

import jax
import jax.numpy as jnp


def typed(key: jax.Array | None) -> jax.Array | None:
    """A typed key, of shape (), from a typed or a raw one."""
    if key is None or jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    return jax.random.wrap_key_data(key)


def fold_in(key: jax.Array, data: int) -> jax.Array:
    """`jax.random.fold_in` for one key, or for the key of every lane."""
    fold = lambda key: jax.random.fold_in(key, data)
    return jax.vmap(fold)(key) if key.ndim else fold(key)

"""Random keys: of either kind, alone or one for each lane of a sweep."""

import jax
import jax.numpy as jnp


def typed(key: jax.Array | None) -> jax.Array | None:
    """A key of the new kind, whose shape () says that it is one, from either kind."""
    if key is None or jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    return jax.random.wrap_key_data(key)


def fold_in(key: jax.Array, number: int) -> jax.Array:
    """`jax.random.fold_in` into a key, or into the key of every lane."""
    fold = lambda key: jax.random.fold_in(key, number)
    return jax.vmap(fold)(key) if key.ndim else fold(key)

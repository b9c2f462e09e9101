"""Offloading: arrays of waiting batches, moved to host memory and back."""

from typing import Any, NamedTuple

import jax
import numpy as np


class Offloaded(NamedTuple):
    """An array moved to host memory, and the sharding it had."""

    parts: dict[str, np.ndarray]  # the shards of this host's devices, by their index in the array
    shape: tuple[int, ...]
    sharding: Any

    @classmethod
    def of(cls, x: jax.Array) -> "Offloaded":
        """Moves an array to the host."""
        parts = {str(shard.index): shard.data for shard in x.addressable_shards}
        return cls({index: np.array(part) for index, part in parts.items()}, x.shape, x.sharding)

    def restore(self) -> jax.Array:
        """The array on its devices."""
        return jax.make_array_from_callback(self.shape, self.sharding, lambda index: self.parts[str(index)])

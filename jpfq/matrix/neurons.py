"""The neurons that a program holds: all of a matrix, or on one of many devices a run of them.

Every stage of a solve works on each neuron by itself, except for steps that neurons share, metrics over all of them, and
the indices that random keys are folded with. Those use the methods below. On one device they are plain reductions; on many
devices they are the only communication, and it happens outside the recursion.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


@dataclasses.dataclass(frozen=True)
class Neurons:
    """The neurons on the last axis of every array; with an `axis`, under `jax.shard_map` and this device's part of `count`.

    Devices hold equal runs, in order. Where there are more than `count` in all, the last ones are padding,
    and no reduction counts them.
    """

    count: Any = None  # an int, or an array (); None where there is no padding
    first: Any = None  # the index of the first one held here; None for 0
    axis: str | tuple[str, ...] | None = None  # of the mesh
    shared: bool = True  # a single step serves all of them; False where it is that of a single neuron

    def indices(self, here: int) -> jax.Array:
        """The indices of the neurons held here (here,)."""
        if self.axis is None:
            return jnp.arange(here) if self.first is None else self.first + jnp.arange(here)
        return lax.axis_index(self.axis).astype(int) * here + jnp.arange(here)

    def where(self, x: jax.Array, other: float) -> jax.Array:
        """x (.., here), with `other` in place of padding."""
        if self.count is None:
            return x
        counts = self.indices(x.shape[-1]) < self.count
        return jnp.where(jnp.broadcast_to(counts, x.shape), x, jnp.asarray(other, x.dtype))

    def real(self, here: int) -> Any:
        """The number of neurons on all devices, without padding."""
        if self.count is None or self.axis is not None:
            return self.count or here
        return jnp.minimum(self.count if self.first is None else self.count - self.first, here)

    def add(self, x: jax.Array) -> jax.Array:
        """The sum of the devices' x."""
        return x if self.axis is None else lax.psum(x, self.axis)

    def sum(self, x: jax.Array) -> jax.Array:
        """The sum of x (.., here) over all neurons and all other axes."""
        return self.add(jnp.sum(self.where(x, 0)))

    def min(self, x: jax.Array) -> jax.Array:
        """The least entry of x (.., here), padding included."""
        return jnp.min(x) if self.axis is None else lax.pmin(jnp.min(x), self.axis)

    def max(self, x: jax.Array) -> jax.Array:
        """The largest entry of x (.., here), padding included."""
        return jnp.max(x) if self.axis is None else lax.pmax(jnp.max(x), self.axis)

    def whole(self, x: jax.Array) -> jax.Array:
        """x (.., here) of all neurons (.., count), on every device."""
        if self.axis is None:
            return x
        return lax.all_gather(x, self.axis, axis=x.ndim - 1, tiled=True)[..., : self.count]

    def own(self, x: jax.Array) -> jax.Array:
        """The part of x (.., count) that belongs to the neurons here (.., here)."""
        if self.axis is None:
            return x
        here = -(-self.count // lax.axis_size(self.axis))
        return jnp.take(x, jnp.minimum(self.indices(here), self.count - 1), axis=-1)


ALL = Neurons()

"""The mesh of parameters and batches.

Everything runs where the arrays are. XLA splits the forward passes and sums the Grams according to the shardings of
parameters and batches, and the solves split their neurons over the same devices (matrix/shard.py).
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ..matrix import Devices
from ..matrix.explicit_mesh import automatic, automatic_mesh, is_traced
from ..matrix.lanes import LANES
from .functional import Functional


def devices_of(arrays: Iterable) -> Devices | None:
    """The first mesh of several devices that arrays lie on, with its axes in the order of their use."""
    placed = [x.sharding for x in arrays if isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding)]
    placed = [sharding for sharding in placed if sharding.mesh.size > 1]
    if not placed:
        return None
    mesh = placed[0].mesh
    used = (axis for sharding in placed if sharding.mesh == mesh for axis in _axes(sharding.spec))
    assert isinstance(mesh, Mesh)
    return Devices(mesh, tuple(dict.fromkeys([*used, *mesh.axis_names])))


def _axes(spec):
    return [axis for entry in spec if entry for axis in ((entry,) if isinstance(entry, str) else entry)]


def on_auto_axes(functional: Functional) -> Functional:
    """A model with its arrays on Auto axes."""
    return dataclasses.replace(functional, leaves=tuple(map(automatic, functional.leaves)))


def on_mesh_of(leaf: Any, tree: Any) -> Any:
    """A tree of small arrays, replicated over the mesh of `leaf`, or on its device if it has no mesh."""
    whole = None
    if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding):
        whole = NamedSharding(leaf.sharding.mesh, P())
    place = lambda x: like(x, leaf) if whole is None else jax.device_put(x, whole)
    return jax.tree.map(lambda x: place(x) if isinstance(x, jax.Array) else x, tree)


def like(new: jax.Array, old: Any) -> Any:
    """A new leaf with the placement of the old one. If the old one is uncommitted, so is the new one.

    JAX cannot uncommit an array, so such an array is copied through the host.
    """
    if not isinstance(new, jax.Array) or is_traced(new) or is_traced(old):
        return new
    if isinstance(old, jax.Array) and old.committed:
        return jax.device_put(new, old.sharding)
    return jax.device_put(jax.device_get(new)) if new.committed else new


@dataclasses.dataclass(frozen=True)
class LanesMesh:
    """The mesh of a sweep whose settings are split over one of its axes."""

    original: Mesh  # as the user gave it
    axis: str

    @classmethod
    def of(cls, sharding: Any) -> "LanesMesh":
        """From the sharding of the axis of settings."""
        one = isinstance(sharding, NamedSharding) and len(sharding.spec) == 1 and isinstance(sharding.spec[0], str)
        if not one or not isinstance(sharding.mesh, Mesh):
            raise ValueError(
                f"sharding has one axis, such as NamedSharding(mesh, PartitionSpec('sweep')); got {sharding!r}."
            )
        return cls(sharding.mesh, sharding.spec[0])

    @property
    def size(self) -> int:
        """The number of devices along the axis."""
        return self.original.shape[self.axis]

    @functools.cached_property
    def mesh(self) -> Mesh:
        """The same devices with Auto axes, of which that of the settings has the name that `over_lanes` expects."""
        names = tuple(LANES if name == self.axis else name for name in self.original.axis_names)
        return Mesh(self.original.devices, names)

    def place(self, x: Any) -> Any:
        """An array on the mesh, with its sharding if it is there already, else replicated."""
        if not isinstance(x, (jax.Array, np.ndarray)):
            return x
        sharding, spec = getattr(x, "sharding", None), P()
        if isinstance(sharding, NamedSharding) and sharding.mesh.size > 1:
            if automatic_mesh(sharding.mesh) != automatic_mesh(self.original):
                raise ValueError(
                    f"An array of shape {x.shape} lies on another mesh than the settings: {sharding.mesh}. Put it on that "
                    "of sharding=, or on none."
                )
            if self.axis in _axes(sharding.spec):
                raise ValueError(
                    f"An array of shape {x.shape} is split over {self.axis!r}, the axis of the settings: {sharding.spec}. "
                    "Split it over another axis of the mesh, or not at all."
                )
            spec = sharding.spec
        return jax.device_put(x, NamedSharding(self.mesh, spec))

    def restore(self, tree: Any, leaf: Any) -> Any:
        """Arrays of this mesh, replicated where `leaf` lies."""
        if isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding):
            return on_mesh_of(leaf, tree)
        return jax.device_put(tree, next(iter(leaf.devices())) if isinstance(leaf, jax.Array) else jax.devices()[0])


def check_runs(functional: Functional, batch: Any) -> None:
    """Raises if a model that was given on Explicit axes does not run on Auto axes."""
    try:
        jax.eval_shape(functional.fn, functional.leaves, batch)
    except (ValueError, TypeError) as error:
        raise ValueError(
            "The arrays lie on a mesh with Explicit axes. Quantizing runs the model on the same mesh with Auto axes, where "
            f"it fails: {error}\nRemove out_sharding=... and reshard from the model, or skip them on a mesh of "
            "jax.make_mesh(shape, names, axis_types=(jax.sharding.AxisType.Auto,) * len(shape))."
        ) from error

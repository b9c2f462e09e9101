"""Meshes with Explicit axes: everything runs on the same devices with Auto axes, on which reshapes are free."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding

from .gram import is_traced


def automatic(x: Any) -> Any:
    """An array of a mesh with Explicit axes as one of the same devices with Auto axes; anything else as it is."""
    if (
        not isinstance(x, jax.Array)
        or is_traced(x)
        or not isinstance(x.sharding, NamedSharding)
        or not is_explicit(x.sharding.mesh)
    ):
        return x
    return jax.device_put(x, NamedSharding(automatic_mesh(x.sharding.mesh), x.sharding.spec))


def is_explicit(mesh: Any) -> bool:
    """Whether any axis of a mesh is Explicit."""
    return AxisType.Explicit in (mesh.axis_types or ())


def automatic_mesh(mesh: Any) -> Mesh:
    """The same devices with Auto axes."""
    return Mesh(mesh.devices, mesh.axis_names)


def context() -> contextlib.AbstractContextManager:
    """What to work in: the mesh that `jax.set_mesh` set, its axes Auto."""
    try:
        mesh = jax.sharding.get_mesh()
    except ValueError:  # inside jit, where the mesh is the caller's and cannot be set
        return contextlib.nullcontext()
    return jax.set_mesh(automatic_mesh(mesh)) if is_explicit(mesh) else contextlib.nullcontext()


def run(f: Callable, *args: Any) -> Any:
    """f(*args) on Auto axes; what it returns lies on the mesh that the first of the arrays with Explicit axes came from."""
    placed = [automatic(x) for x in args]
    with context():
        out = f(*placed)
    given = next((x for x, y in zip(args, placed, strict=True) if x is not y), None)
    if given is None:
        return out
    return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(given.sharding.mesh, x.sharding.spec)), out)

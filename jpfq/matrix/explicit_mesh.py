"""Meshes: work with arrays wherever they lie, within whatever mesh `jax.set_mesh` has set.

JAX refuses arrays of another mesh than the one that is set, and on Explicit axes many operations ask how their outcome is to
lie. So everything runs on the same devices with Auto axes, where neither is so: within no mesh, or where a model runs, which
may name its axes, within the mesh that its parameters lie on. What comes out lies on the mesh that was given.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

NONE = Mesh(np.empty((), dtype=object), ())
F = TypeVar("F", bound=Callable)


def automatic(x: Any) -> Any:
    """An array of a mesh with Explicit axes as one of the same devices with Auto axes; anything else as it is.

    Objects that hold arrays but are no pytrees, such as results, say themselves how: by a property `on_auto_axes`.
    """
    if not isinstance(x, jax.Array):
        return getattr(x, "on_auto_axes", x)
    if is_traced(x) or not isinstance(x.sharding, NamedSharding) or not is_explicit(x.sharding.mesh):
        return x
    return jax.device_put(x, NamedSharding(automatic_mesh(x.sharding.mesh), x.sharding.spec))


def is_traced(x) -> bool:
    """True if an array is a tracer, as under jit or vmap, whose values cannot be looked at."""
    return isinstance(x, Tracer)


def moved(f: Callable[[Any], Any], tree: Any) -> Any:
    """A pytree with each leaf moved by `f`; the very same tree where no leaf moves."""
    leaves, structure = jax.tree.flatten(tree)
    new = [f(x) for x in leaves]
    return tree if all(a is b for a, b in zip(leaves, new, strict=True)) else structure.unflatten(new)


def is_explicit(mesh: Any) -> bool:
    """True if any axis of a mesh is Explicit."""
    return AxisType.Explicit in (mesh.axis_types or ())


def automatic_mesh(mesh: Any) -> Mesh:
    """The same devices with Auto axes."""
    return Mesh(mesh.devices, mesh.axis_names)


def context(arrays: Iterable = ()) -> contextlib.AbstractContextManager:
    """A context to run a model in: the mesh of the first array that lies on one, else the set one; its axes Auto."""
    set_mesh = _set_mesh()
    if set_mesh is None or set_mesh.empty:
        return _within(None)
    mesh = automatic_mesh(_mesh_of(arrays) or set_mesh)
    return _within(None if mesh == set_mesh else mesh)


def no_mesh() -> contextlib.AbstractContextManager:
    """A context without a mesh, to compute in where no model runs."""
    mesh = _set_mesh()
    return _within(None if mesh is None or mesh.empty else NONE)


@contextlib.contextmanager
def _within(mesh):
    """A mesh, or the one that is set. Settings go to the device and metrics come back, whatever guards other transfers."""
    with jax.transfer_guard("allow"), contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
        yield


def run(f: Callable, *args: Any, model: bool = False, **settings: Any) -> Any:
    """f(*args, **settings) on Auto axes; what it returns lies on the mesh with Explicit axes that was given or is set.

    model: whether a model runs in it, so that a mesh is to be set.
    """
    set_mesh = _set_mesh()
    given = args, settings
    if set_mesh is None or any(map(is_traced, jax.tree.leaves(given))):
        return f(*args, **settings)
    with _within(None):
        args, settings = placed = moved(automatic, given)
    explicit = (mesh for a, b in zip(*map(jax.tree.leaves, (given, placed)), strict=True) if (mesh := _left(a, b)))
    home = next(explicit, set_mesh if is_explicit(set_mesh) else None)
    if model and (mesh := _mesh_of(_arrays(placed))) is not None:
        args, settings = moved(lambda x: _brought(mesh, x), placed)  # a batch made within another mesh
    with context(_arrays(placed)) if model else no_mesh():
        out = f(*args, **settings)
    if home is None:
        return out
    on_auto = automatic_mesh(home)

    def back(x):
        if not isinstance(x, jax.Array):
            return x.moved(back) if hasattr(x, "on_auto_axes") else x
        lies = not is_traced(x) and isinstance(x.sharding, NamedSharding) and x.sharding.mesh == on_auto
        spec: Any = x.sharding.spec if lies else None  # pyright: ignore[reportAttributeAccessIssue]
        return jax.device_put(x, NamedSharding(home, spec)) if lies else x

    return moved(back, out)


def anywhere(f: F) -> F:
    """A function of arrays and results as one that may be called within any mesh, whatever mesh these lie on."""
    return functools.wraps(f)(lambda *args, **settings: run(f, *args, **settings))  # pyright: ignore[reportReturnType]


def runs_anywhere(f: F) -> F:
    """Likewise of a function that runs a model."""
    return functools.wraps(f)(lambda *args, **settings: run(f, *args, model=True, **settings))  # pyright: ignore[reportReturnType]


def inside_jit() -> bool:
    """True if a function is being compiled, so that whatever is computed here becomes part of it."""
    with _within(None):
        return isinstance(jnp.zeros(()), Tracer)


def _set_mesh() -> Mesh | None:
    """The mesh that `jax.set_mesh` set; None inside jit, where the mesh is the caller's and cannot be set."""
    try:
        return jax.sharding.get_mesh()
    except ValueError:
        return None


def _mesh_of(arrays):
    """The mesh of the first array that lies on one."""
    shardings = (x.sharding for x in arrays if isinstance(x, jax.Array) and not is_traced(x))
    return next((s.mesh for s in shardings if isinstance(s, NamedSharding) and isinstance(s.mesh, Mesh)), None)


def _brought(mesh, x):
    """An array bound to other devices than those of a mesh, whole on these."""
    elsewhere = isinstance(x, jax.Array) and x.committed and x.sharding.device_set != set(mesh.devices.flat)
    return jax.device_put(x, NamedSharding(mesh, P())) if elsewhere else x


def _left(given: Any, placed) -> Any:
    """The mesh with Explicit axes that a leaf was taken from."""
    if given is placed:
        return None
    return getattr(given.sharding, "mesh", None) if isinstance(given, jax.Array) else given.home


def _arrays(tree):
    for x in jax.tree.leaves(tree):
        yield from x.arrays if hasattr(x, "on_auto_axes") else (x,)

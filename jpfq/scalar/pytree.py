"""Dataclasses as pytrees."""

import dataclasses
from typing import TypeVar

from jax.tree_util import GetAttrKey, register_pytree_with_keys

T = TypeVar("T")


def register_dataclass(cls: type[T]) -> type[T]:
    """`jax.tree_util.register_dataclass`, except that trees of different classes are different.

    With JAX's own (0.10 to 0.12 at least) the tree structures of two classes hash differently but compare equal where
    their static fields agree: `GPFQ()` and `MSQ()`. When such hashes collide in the table of compiled programs, which
    changes from process to process, `jit` runs the program of the wrong one.
    """
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    static = [f.name for f in fields if f.metadata.get("static")]
    leaves = [f.name for f in fields if not f.metadata.get("static")]
    get = lambda x, names: tuple(getattr(x, name) for name in names)
    register_pytree_with_keys(
        cls,
        lambda x: (tuple((GetAttrKey(name), getattr(x, name)) for name in leaves), get(x, static)),
        lambda values, children: cls(**dict(zip(static, values)), **dict(zip(leaves, children))),
        lambda x: (get(x, leaves), get(x, static)),
    )
    return cls

"""Dataclasses as pytrees."""

import dataclasses
import functools
from typing import Any, TypeVar

from jax.core import Tracer
from jax.tree_util import GetAttrKey, register_pytree_with_keys

T = TypeVar("T")


def register_dataclass(cls: type[T]) -> type[T]:
    """`jax.tree_util.register_dataclass`, except that trees of different classes are different.

    With JAX's own (0.10 to 0.12 at least) the tree structures of two classes hash differently but compare equal where
    their static fields agree: `GPFQ()` and `MSQ()`. When such hashes collide in the table of compiled programs, which
    changes from process to process, `jit` runs the program of the wrong one.

    A static field that is given a traced value is refused: it changes the program.
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
    init = cls.__init__
    positional = [f.name for f in fields if not f.kw_only]

    @functools.wraps(init)
    def checked(self, *args, **kwargs):
        for name, value in (dict(zip(positional, args)) | kwargs).items():
            if name in static:
                refuse_traced(cls.__name__, name, value)
        init(self, *args, **kwargs)

    cls.__init__ = checked
    return cls


def refuse_traced(kind: str, name: str, value: Any) -> None:
    """Raises where a setting that must be known beforehand is swept over by vmap, or computed under jit."""
    if isinstance(value, Tracer):
        raise ValueError(
            f"{kind}: {name} changes the program or a shape, so vmap cannot sweep over it. Loop over it in Python, or name "
            "its values in a jpfq.Space: jpfq.sweep loops over such settings by itself."
        )

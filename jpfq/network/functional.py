"""A model as a pure function of its leaves and a batch, and the way back. Adapters for Flax are in linen.py and nnx.py."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from .compat import key_name


@dataclasses.dataclass(frozen=True)
class Functional:
    """fn(leaves, batch) with a path for each leaf."""

    fn: Callable[[Sequence, Any], Any]
    paths: tuple[str, ...]
    leaves: tuple
    trainable: tuple[bool, ...]  # False for state such as BatchNorm statistics, which is never quantized
    rebuild: Callable[[Sequence], dict[str, Any]]  # new leaves -> what a `Quantized` offers: params, variables or model
    identity: Any = None  # equal for equal `fn` and `rebuild`, and hashable; None where nothing is known to be


def from_function(fn: Callable, params: Any, kwargs: dict) -> Functional:
    """Any fn(params, *inputs) over a pytree of parameters."""
    paths, leaves, tree = flatten(params)
    return Functional(
        lambda leaves, batch: call(lambda *args, **kw: fn(tree.unflatten(leaves), *args, **kw), batch, kwargs),
        paths,
        leaves,
        (True,) * len(leaves),
        lambda leaves: {"params": tree.unflatten(leaves)},
        identity_of(fn, tree, kwargs),
    )


def identity_of(model: Any, tree: Any, kwargs: dict) -> Any:
    """What tells a model, the tree of its parameters and its arguments apart from others; None if it cannot be hashed."""
    identity = model, tree, tuple(kwargs.items())
    try:
        hash(identity)
    except TypeError:  # arrays in the arguments, lists in the settings of a module
        return None
    return identity


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> tuple[tuple[str, ...], tuple, Any]:
    """Paths joined by '/', leaves, and structure of a pytree."""
    flat, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf)
    names = ([key_name(entry) for entry in path] for path, _ in flat)
    return tuple("/".join(n for n in name if n) for name in names), tuple(leaf for _, leaf in flat), structure


def numbered(paths: Sequence[str]) -> list[str]:
    """A name for each leaf: its path, with a number where another before it has the same."""
    seen: dict[str, int] = {}
    found = []
    for path in paths:
        number = seen[path] = seen.get(path, 0) + 1
        found.append(path if number == 1 else f"{path}#{number}")
    return found


def call(f: Callable, batch: Any, kwargs: dict) -> Any:
    """Calls `f` on a batch: a dict holds keyword arguments, a tuple or list positional ones, anything else is the input."""
    named = batch if isinstance(batch, dict) else {}
    given = () if isinstance(batch, dict) else batch if isinstance(batch, (tuple, list)) else (batch,)
    try:
        return f(*given, **named, **kwargs)
    except TypeError as error:
        if not any(words in str(error) for words in ("positional argument", "keyword", "multiple values for argument")):
            raise
        how = f"{len(given)} positional: leave out what it does not take, such as labels; what is no data goes into kwargs"
        if named:
            how = (
                f"keywords {', '.join(map(str, named))}: where the model takes the dict itself, give (batch,), a tuple"
            )
        raise ValueError(f"The model was called with the arguments of a batch, {how}. It said: {error}") from error

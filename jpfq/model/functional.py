"""A model as a pure function of its leaves and a batch, and back. Each framework has a file: see adapters.py."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax

from ..matrix.explicit_mesh import inside_jit, is_traced
from .compat import key_name
from .unlike import PARTITION


@dataclasses.dataclass(frozen=True)
class Functional:
    """A pure function fn(leaves, batch), with a path for each leaf."""

    fn: Callable[[Sequence, Any], Any]
    paths: tuple[str, ...]
    leaves: tuple
    trainable: tuple[bool, ...]  # False for state such as BatchNorm statistics, which is never quantized
    rebuild: Callable[[Sequence], dict[str, Any]]  # new leaves -> params and, by framework, variables or model
    identity: Any = None  # a hashable value, equal only for equal `fn` and `rebuild`; None if there is none
    origin: Callable[[], tuple] | None = None  # returns (function, arguments) that create this, apart from its leaves

    def __reduce__(self):
        """Pickles the origin, since `fn` and `rebuild` are closures."""
        if self.origin is None:
            raise TypeError("This model cannot be pickled: save the result with quantized.save(folder).")
        return _again, (*self.origin(), self.leaves)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The support for one framework; see adapters.py."""

    kind: str  # its name in saved results
    phrase: str  # the name of such a model in messages
    argument: Literal["variables", "params"] | None  # the argument for its arrays; None if the model contains them
    owns: Callable[[Any], bool]  # whether a model belongs to this framework
    functional: Callable[[Any, Any, dict], Functional]  # from the model, its arrays, and arguments that are not data


def _again(make, arguments, leaves):
    return dataclasses.replace(make(*arguments), leaves=leaves)


def from_function(fn: Callable, params: Any, kwargs: dict) -> Functional:
    """A function fn(params, *inputs) of a pytree of parameters."""
    paths, leaves, tree = flatten(params)
    return Functional(
        lambda leaves, batch: call(lambda *args, **kw: fn(tree.unflatten(leaves), *args, **kw), batch, kwargs),
        paths,
        leaves,
        (True,) * len(leaves),
        lambda leaves: {"params": tree.unflatten(leaves)},
        identity_of(fn, tree, kwargs),
        lambda: (from_function, (fn, tree.unflatten(range(len(paths))), kwargs)),
    )


def identity_of(model: Any, tree: Any, kwargs: dict) -> Any:
    """The identity of a model, from its parameter tree and its arguments; None if it is not hashable."""
    identity = model, tree, tuple(kwargs.items())
    try:
        hash(identity)
    except TypeError:  # arrays among the arguments, or lists in the settings of a module
        return None
    return identity


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> tuple[tuple[str, ...], tuple, Any]:
    """The paths (joined by '/'), leaves and structure of a pytree."""
    flat, structure = jax.tree_util.tree_flatten_with_path(tree, is_leaf)
    names = ([key_name(entry) for entry in path] for path, _ in flat)
    return tuple("/".join(n for n in name if n) for name in names), tuple(leaf for _, leaf in flat), structure


def check_arrays(paths: Sequence[str], leaves: Sequence) -> None:
    """Raises if a parameter is not an array, a number or a `jax.ShapeDtypeStruct`."""
    for path, leaf in zip(paths, leaves, strict=True):
        if isinstance(leaf, (bool, int, float, complex)) or (
            hasattr(leaf, "shape") and getattr(leaf, "dtype", "O") != "O"
        ):
            continue
        raise ValueError(f"The parameters hold {_shown(leaf)} at {path!r}, which is not an array. {PARTITION}")


def check_values(named: Iterable[tuple[str, Any]], what: str) -> None:
    """Raises if arrays have no values to compute with, or lie on devices that cannot compute together."""
    first: tuple | None = None
    traced = f"{what} needs the values of arrays, which do not exist inside jit, vmap or grad: call it outside of them"
    if inside_jit():
        raise ValueError(f"{traced}, and give its result to what is compiled.")
    for name, x in named:
        if is_traced(x):
            raise ValueError(f"{traced}; got {name} as a traced {x.aval}.")
        if isinstance(x, jax.ShapeDtypeStruct):
            raise ValueError(f"{what} needs values; got {name} as a shape, {x}. Give arrays; jpfq.plan takes shapes.")
        if isinstance(x, jax.Array) and x.committed:
            own = name, x.sharding.device_set
            first = first or own
            if own[1] != first[1]:
                (one, at), (other, there) = ((n, ", ".join(sorted(map(str, devices)))) for n, devices in (first, own))
                raise ValueError(
                    f"{what} runs the model where its arrays are, but {one} is on {at} and {other} on {there}: put all of "
                    "them on one device or one mesh, with jax.device_put."
                )


def _shown(leaf):
    return f"a function, {getattr(leaf, '__name__', leaf)}," if callable(leaf) else f"{str(leaf)[:60]!r}"


def numbered(paths: Sequence[str]) -> list[str]:
    """A unique name for each leaf: its path, with a number appended if an earlier leaf has the same path."""
    seen: dict[str, int] = {}
    found = []
    for path in paths:
        count = seen[path] = seen.get(path, 0) + 1
        found.append(path if count == 1 else f"{path}#{count}")
    return found


def call(f: Callable, batch: Any, kwargs: dict) -> Any:
    """Calls `f` on a batch: a dict holds keyword arguments, a tuple or list positional ones, anything else is the input."""
    named = batch if isinstance(batch, dict) else {}
    positional = () if isinstance(batch, dict) else batch if isinstance(batch, (tuple, list)) else (batch,)
    try:
        return f(*positional, **named, **kwargs)
    except TypeError as error:
        if not any(words in str(error) for words in ("positional argument", "keyword", "multiple values for argument")):
            raise
        remedy = (
            f"{len(positional)} positional: leave out what it does not take, such as labels; constants go into kwargs"
        )
        if named:
            remedy = f"keywords {', '.join(map(str, named))}: if the model takes a dict, give the tuple (batch,)"
        raise ValueError(f"The model was called with the arguments of a batch, {remedy}. It said: {error}") from error

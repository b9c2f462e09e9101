"""A model as a pure function of its leaves and a batch, and the way back. Each framework has a file: see adapters.py."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import jax

from ..matrix.explicit_mesh import inside_jit, is_traced
from .compat import key_name

PARTITION = (
    "Give the arrays alone, and the rest within the function: of an Equinox module, params, static = "
    "eqx.partition(module, eqx.is_array) and jpfq.quantize(lambda params, x: eqx.combine(params, static)(x), batches, "
    "rules, params=params)."
)


@dataclasses.dataclass(frozen=True)
class Functional:
    """fn(leaves, batch) with a path for each leaf."""

    fn: Callable[[Sequence, Any], Any]
    paths: tuple[str, ...]
    leaves: tuple
    trainable: tuple[bool, ...]  # False for state such as BatchNorm statistics, which is never quantized
    rebuild: Callable[[Sequence], dict[str, Any]]  # new leaves -> what a `Quantized` offers: params, variables or model
    identity: Any = None  # equal for equal `fn` and `rebuild`, and hashable; None where nothing is known to be
    origin: Callable[[], tuple] | None = None  # (function, arguments) that make this again, but for its leaves

    def __reduce__(self):
        """Pickled as what it was made of, since `fn` and `rebuild` are closures."""
        if self.origin is None:
            raise TypeError("This model cannot be pickled: save the result with quantized.save(folder).")
        return _again, (*self.origin(), self.leaves)


@dataclasses.dataclass(frozen=True)
class Adapter:
    """The models of one framework; see adapters.py."""

    kind: str  # as saved results name it
    phrase: str  # as messages name such a model
    argument: Literal["variables", "params"] | None  # by which its arrays are given; None where the model holds them
    owns: Callable[[Any], bool]  # whether a model is of this framework
    functional: Callable[[Any, Any, dict], Functional]  # from the model, its arrays and arguments that are no data


def _again(make, arguments, leaves):
    return dataclasses.replace(make(*arguments), leaves=leaves)


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
        lambda: (from_function, (fn, tree.unflatten(range(len(paths))), kwargs)),
    )


def identity_of(model: Any, tree: Any, kwargs: dict) -> Any:
    """The identity of a model with the tree of its parameters and its arguments; None if it cannot be hashed."""
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


def check_arrays(paths: Sequence[str], leaves: Sequence) -> None:
    """Raises where a parameter is no array, nor a number, nor the shape of an array."""
    for path, leaf in zip(paths, leaves, strict=True):
        if isinstance(leaf, (bool, int, float, complex)) or (
            hasattr(leaf, "shape") and getattr(leaf, "dtype", "O") != "O"
        ):
            continue
        raise ValueError(f"The parameters hold {_shown(leaf)} at {path!r}, which is no array. {PARTITION}")


def check_values(named: Iterable[tuple[str, Any]], what: str) -> None:
    """Raises where arrays have no values to compute with, or are bound to devices that do not compute together."""
    first: tuple | None = None
    traced = f"{what} looks at values, which there are none of inside jit, vmap or grad: call it outside of them"
    if inside_jit():
        raise ValueError(f"{traced}, and give its result to what is compiled.")
    for name, x in named:
        if is_traced(x):
            raise ValueError(f"{traced}; got {name} as a traced {x.aval}.")
        if isinstance(x, jax.ShapeDtypeStruct):
            raise ValueError(f"{what} needs values; got {name} as a shape, {x}. Give arrays; jpfq.plan takes shapes.")
        if isinstance(x, jax.Array) and x.committed:
            here = name, x.sharding.device_set
            first = first or here
            if here[1] != first[1]:
                (one, at), (other, there) = ((n, ", ".join(sorted(map(str, devices)))) for n, devices in (first, here))
                raise ValueError(
                    f"{what} runs the model where its arrays lie, and {one} lies on {at} while {other} lies on {there}: "
                    "put all of them on one device or one mesh, by jax.device_put."
                )


def _shown(leaf):
    return f"a function, {getattr(leaf, '__name__', leaf)}," if callable(leaf) else f"{str(leaf)[:60]!r}"


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

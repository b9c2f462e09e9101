"""Calibration batches: read once, checked, and sorted by shape."""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..matrix.arrays import all_finite
from ..matrix.explicit_mesh import automatic, is_traced


@dataclasses.dataclass(frozen=True)
class Weighted:
    """A batch with row weights, such as a padding mask, that keep some rows out of the statistics.

    weights: (batch,), (batch, position) or whatever leading axes the inputs share; 0 leaves a row out. Where inputs have
    axes of their own, a tree of weights in the structure of the batch, with None for an input that has none.

    Weights follow the data through the model: a window counts as far as the least of its positions, a mean over positions
    as far as the most of them. What stands in rows of weight 0, NaN or infinity too, does not matter: it becomes 0 in
    inputs of floating numbers before the model runs (an input that only tells counted rows from others, as a mask does, is
    left as it is), and a model in which such rows reach rows that count is refused.

    `batch` is a batch as without weights.

    Examples:
        >>> mask = jnp.ones(64).at[50:].set(0)
        >>> padded = jpfq.Weighted(batches[0], mask)  # to be given in place of batches[0]
    """

    batch: Any
    weights: Any


class Shaped(NamedTuple):
    """All batches of one shape."""

    example: Any  # a batch, as a pytree
    leaves: list[list]
    weights: list  # per batch: for each leaf, weights of its leading axes or None; None where there are none at all
    finite: list[tuple[int, list]]  # the number of each batch among all, and whether each of its arrays is finite


class NotFinite(ValueError):
    """Infinity or NaN at the inputs of a layer: `place` is the stream and the batch in it that brought them."""

    def __init__(self, path: str, network: str, place: tuple[int, int], given: int | None = None):
        """
        Args:
            given: the number of the batch, if it is not finite itself.
        """
        self.path, self.network, self.place = path, network, place
        here = f"he inputs of {path} are infinite or NaN in the {network} network"
        made = "the model overflows on the calibration data. Calibrate in float32, or scale the model's inputs down."
        held = (
            "Replace these numbers, or leave their rows out. An input may hold -inf where the model takes it up before a "
            "layer, as attention does of a mask that is added."
        )
        super().__init__(
            f"T{here}: {made}" if given is None else f"Batch {given} holds NaN or infinity: t{here}. {held}"
        )


def read_batches(batches: Iterable, on_host: bool = False) -> list[Shaped]:
    """Batches grouped by shape, in the order of their first appearance; NumPy arrays are left in host memory if asked.

    Raises:
        ValueError: no batches; a batch of another structure, type or feature shape than the first.
    """
    if isinstance(batches, (dict, str)) or hasattr(batches, "shape") or not isinstance(batches, Iterable):
        raise ValueError(f"batches is an iterable of batches, such as a list of arrays; got {_describe(batches)}.")
    groups: dict = {}
    first = None
    for number, item in enumerate(batches):
        batch, weights = (item.batch, item.weights) if isinstance(item, Weighted) else (item, None)
        leaves, tree = jax.tree.flatten(batch)
        arrays = [_array(x, number) for x in leaves]
        keep = lambda x, given: np.array(x) if on_host and not isinstance(given, jax.Array) else x
        leaves = list(map(keep, arrays, leaves))
        signature = tree, [(x.shape, x.dtype) for x in leaves]
        first = first or signature
        _check_like(first, signature, number)
        weights = None if weights is None else _check_weights(weights, leaves, tree, number)
        if weights is not None:
            leaves = [x if w is None else _without_padding(x, w) for x, w in zip(leaves, weights, strict=True)]
        finite = all_finite([x for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)])
        shapes = tuple(x.shape for x in leaves)
        group = groups.setdefault(shapes, Shaped(tree.unflatten(leaves), [], [], []))
        group.leaves.append(leaves)
        group.weights.append(weights)
        group.finite.append((number, finite))
    if not groups:
        raise ValueError("batches is empty: quantization needs calibration data. (A generator can be read only once.)")
    return list(groups.values())


@contextlib.contextmanager
def naming(finite: Sequence[list[tuple[int, list]]]) -> Iterator[None]:
    """Within it, `NotFinite` says so where the batch that brought it is not finite itself; `finite` as of each `Shaped`.

    A model may deal with such inputs before its layers, so nobody waits for these flags unless a layer is reached.
    """
    try:
        yield
    except NotFinite as error:
        stream, batch = error.place
        number, flags = finite[stream][batch]
        if all(map(bool, flags)):
            raise
        raise NotFinite(error.path, error.network, error.place, number) from None


def shapes_of(batch: Any) -> Any:
    """A batch as shapes, for a plan: arrays and `jax.ShapeDtypeStruct`s may stand in it."""
    batch = batch.batch if isinstance(batch, Weighted) else batch
    known = lambda x: isinstance(x, jax.ShapeDtypeStruct) or is_traced(x)
    return jax.tree.map(lambda x: x if known(x) else jax.typeof(_array(x, 0)), batch)


def _refuse_traced(x, number, what):
    if is_traced(x):
        raise ValueError(
            f"Batch {number} has {what} that are traced, {x.aval}: there are no values inside jit, vmap or grad. Call this "
            "outside of them."
        )


def _array(x, number):
    _refuse_traced(x, number, "inputs")
    try:
        if isinstance(x, jax.ShapeDtypeStruct):
            raise ValueError(
                f"Batch {number} holds a shape, {x}, and values are needed: give arrays. jpfq.plan takes shapes."
            )
        if isinstance(x, (bool, str)):
            raise TypeError("a constant, not data")
        return automatic(jnp.asarray(x))
    except TypeError as error:
        raise ValueError(
            f"Batch {number} holds {x!r}, which is no array. Arguments that do not change, such as train=False, go "
            "into kwargs={'train': False}."
        ) from error


def _check_like(first, here, number):
    if here[0] != first[0]:
        raise ValueError(f"Batch {number} has the structure {here[0]}; the first has {first[0]}.")
    for expected, given in zip(first[1], here[1], strict=True):
        if len(expected[0]) != len(given[0]) or expected[1] != given[1]:
            raise ValueError(
                f"Batch {number} has an input of shape {given[0]} and type {given[1]}; the first has {expected[0]} "
                f"{expected[1]}. Sizes may differ between batches, axes and types may not."
            )


def _check_weights(weights, leaves, tree, number):
    """Weights for each leaf, from one array that serves all or from a tree of them."""
    one = hasattr(weights, "shape") or jax.tree_util.treedef_is_leaf(tree)
    try:
        given = [weights] * len(leaves) if one else tree.flatten_up_to(weights)
    except ValueError as error:
        raise ValueError(
            f"Batch {number} has row weights in another structure than its inputs: give one array for all inputs, or "
            f"weights in the structure {tree}, with None for an input that has none. ({error})"
        ) from error
    made = {id(w): _as_weights(w, number) for w in given if w is not None}
    found: list = []
    for x, w in zip(leaves, (None if w is None else made[id(w)] for w in given), strict=True):
        ndim = 0 if w is None else min(x.ndim, w.ndim)
        if w is not None and (x.shape[:ndim] != w.shape[:ndim] or (not one and ndim < w.ndim)):
            shapes = ", ".join(str(x.shape) for x in leaves)
            remedy = (
                "Give each input its own: a tree of weights in the structure of the batch, None for an input without."
            )
            raise ValueError(
                f"Batch {number} has row weights of shape {w.shape}, which are not the leading axes of the input of shape "
                f"{x.shape} (inputs: {shapes}). {remedy if one else ''}".rstrip()
            )
        found.append(w if ndim else None)
    if all(w is None or bool((w == 1).all()) for w in found):
        return None
    return found


def _as_weights(weights, number):
    _refuse_traced(weights, number, "row weights")
    weights = automatic(jnp.asarray(weights)).astype(jnp.float32)
    if weights.ndim == 0:
        raise ValueError(f"Batch {number} has one number for row weights; they are an array, such as (batch,).")
    if not bool((jnp.isfinite(weights) & (weights >= 0)).all()):
        raise ValueError(f"Batch {number} has row weights that are negative or not finite.")
    return weights


def is_data(x: jax.Array, weights: jax.Array) -> bool:
    """True if an input of floating numbers tells more than which rows count, as a mask in numbers does not."""
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return False
    counts = over_rows(weights, x.ndim) > 0
    return not bool(_tells_rows_apart(jnp.asarray(x), counts))


def over_rows(weights: jax.Array, ndim: int) -> jax.Array:
    """Weights of leading axes in the rank of a value: last axes that it lacks are summed up by the most of them."""
    weights = weights.max(tuple(range(ndim, weights.ndim))) if weights.ndim > ndim else weights
    return weights.reshape(*weights.shape, *(1,) * (ndim - weights.ndim))


@jax.jit
def _tells_rows_apart(x, counts):
    """True if all rows that count hold one number, and all others one other, which is no NaN."""
    x = x.real if jnp.issubdtype(x.dtype, jnp.complexfloating) else x
    one = lambda which: jnp.where(which, x, jnp.inf).min() == jnp.where(which, x, -jnp.inf).max()
    none = lambda which: ~jnp.broadcast_to(which, x.shape).any()
    return (one(counts) | none(counts)) & (one(~counts) | none(~counts)) & ~none(~counts)


def _without_padding(x, weights):
    """An input with 0 in rows of weight 0."""
    if not is_data(x, weights):
        return x
    counts = over_rows(weights, x.ndim) > 0
    return np.where(counts, x, 0).astype(x.dtype) if isinstance(x, np.ndarray) else _zeroed(x, counts)


@jax.jit
def _zeroed(x, counts):
    return jnp.where(counts, x, jnp.zeros((), x.dtype))


def _describe(x):
    return f"an array of shape {x.shape}: did you mean [x]?" if hasattr(x, "shape") else f"{type(x).__name__}"

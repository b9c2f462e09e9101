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
    """A batch with row weights, such as a padding mask, that exclude rows from the statistics.

    batch: the same as without weights.
    weights: an array (batch,), (batch, position) or of any leading axes that the inputs share; 0 excludes a row. If inputs
        have different axes, a tree of weights in the structure of the batch, with None for an input without weights.

    Weights follow the data through the model: a convolution window has the smallest weight of its positions, a mean over
    positions the largest. The contents of rows of weight 0 do not matter, even if NaN or infinite: in floating inputs they
    are set to 0 before the model runs, except in an input that is itself a mask. A model in which such rows change rows
    that count is refused.

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
    finite: list[tuple[int, list]]  # the index of each batch among all, and whether each of its arrays is finite


class NotFinite(ValueError):
    """NaN or infinity in the input of a layer. `source` is the stream and the batch in it that they come from."""

    def __init__(self, path: str, network: str, source: tuple[int, int], batch: int | None = None):
        """
        Args:
            batch: the index of the batch, if the batch itself is not finite.
        """
        self.path, self.network, self.source = path, network, source
        found = f"he inputs of {path} are infinite or NaN in the {network} network"
        overflow = (
            "the model overflows on the calibration data. Calibrate in float32, or scale the model's inputs down."
        )
        remedy = (
            "Replace these values, or exclude their rows by weights. An input may hold -inf only if the model uses it up "
            "before a layer, as attention does with an additive mask."
        )
        super().__init__(
            f"T{found}: {overflow}" if batch is None else f"Batch {batch} holds NaN or infinity: t{found}. {remedy}"
        )


def read_batches(batches: Iterable, on_host: bool = False) -> list[Shaped]:
    """Batches grouped by shape, in order of first appearance. With `on_host`, NumPy arrays stay in host memory.

    Raises:
        ValueError: there are no batches, or one differs from the first in structure, dtype or number of axes.
    """
    if isinstance(batches, (dict, str)) or hasattr(batches, "shape") or not isinstance(batches, Iterable):
        raise ValueError(f"batches is an iterable of batches, such as a list of arrays; got {_describe(batches)}.")
    groups: dict = {}
    first = None
    for index, item in enumerate(batches):
        batch, weights = (item.batch, item.weights) if isinstance(item, Weighted) else (item, None)
        leaves, tree = jax.tree.flatten(batch)
        arrays = [_array(x, index) for x in leaves]
        place = lambda x, old: np.array(x) if on_host and not isinstance(old, jax.Array) else x
        leaves = list(map(place, arrays, leaves))
        signature = tree, [(x.shape, x.dtype) for x in leaves]
        first = first or signature
        _check_like(first, signature, index)
        weights = None if weights is None else _check_weights(weights, leaves, tree, index)
        if weights is not None:
            leaves = [x if w is None else _without_padding(x, w) for x, w in zip(leaves, weights, strict=True)]
        finite = all_finite([x for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)])
        shapes = tuple(x.shape for x in leaves)
        group = groups.setdefault(shapes, Shaped(tree.unflatten(leaves), [], [], []))
        group.leaves.append(leaves)
        group.weights.append(weights)
        group.finite.append((index, finite))
    if not groups:
        raise ValueError("batches is empty: quantization needs calibration data. (A generator can be read only once.)")
    return list(groups.values())


@contextlib.contextmanager
def naming(finite: Sequence[list[tuple[int, list]]]) -> Iterator[None]:
    """A context in which `NotFinite` names the batch if that is not finite itself. `finite` is that of each `Shaped`.

    A model may remove such values before its first layer, so the flags are read only after a layer has received them.
    """
    try:
        yield
    except NotFinite as error:
        stream, batch = error.source
        index, flags = finite[stream][batch]
        if all(map(bool, flags)):
            raise
        raise NotFinite(error.path, error.network, error.source, index) from None


def shapes_of(batch: Any) -> Any:
    """The shapes of a batch, which may already contain `jax.ShapeDtypeStruct`s."""
    batch = batch.batch if isinstance(batch, Weighted) else batch
    known = lambda x: isinstance(x, jax.ShapeDtypeStruct) or is_traced(x)
    return jax.tree.map(lambda x: x if known(x) else jax.typeof(_array(x, 0)), batch)


def _refuse_traced(x, index, what):
    if is_traced(x):
        raise ValueError(
            f"Batch {index} has {what} that are traced, {x.aval}: inside jit, vmap or grad arrays have no values. Call "
            "this outside of them."
        )


def _array(x, index):
    _refuse_traced(x, index, "inputs")
    try:
        if isinstance(x, jax.ShapeDtypeStruct):
            raise ValueError(
                f"Batch {index} holds a shape, {x}, but values are needed: give arrays. jpfq.plan takes shapes."
            )
        if isinstance(x, (bool, str)):
            raise TypeError("a constant, not data")
        return automatic(jnp.asarray(x))
    except TypeError as error:
        raise ValueError(
            f"Batch {index} holds {x!r}, which is not an array. Pass constant arguments, such as train=False, as "
            "kwargs={'train': False}."
        ) from error


def _check_like(first, own, index):
    if own[0] != first[0]:
        raise ValueError(f"Batch {index} has the structure {own[0]}; the first has {first[0]}.")
    for expected, given in zip(first[1], own[1], strict=True):
        if len(expected[0]) != len(given[0]) or expected[1] != given[1]:
            raise ValueError(
                f"Batch {index} has an input of shape {given[0]} and type {given[1]}; the first has {expected[0]} "
                f"{expected[1]}. Sizes may differ between batches, the number of axes and the type may not."
            )


def _check_weights(weights, leaves, tree, index):
    """The weights of each leaf, from one array for all of them or from a tree."""
    one = hasattr(weights, "shape") or jax.tree_util.treedef_is_leaf(tree)
    try:
        given = [weights] * len(leaves) if one else tree.flatten_up_to(weights)
    except ValueError as error:
        raise ValueError(
            f"The row weights of batch {index} do not have the structure of its inputs: give one array for all inputs, or "
            f"weights in the structure {tree}, with None for an input without weights. ({error})"
        ) from error
    arrays = {id(w): _as_weights(w, index) for w in given if w is not None}
    found: list = []
    for x, w in zip(leaves, (None if w is None else arrays[id(w)] for w in given), strict=True):
        ndim = 0 if w is None else min(x.ndim, w.ndim)
        if w is not None and (x.shape[:ndim] != w.shape[:ndim] or (not one and ndim < w.ndim)):
            shapes = ", ".join(str(x.shape) for x in leaves)
            remedy = "Give a tree of weights in the structure of the batch, with None for an input without weights."
            raise ValueError(
                f"Batch {index} has row weights of shape {w.shape}, which are not the leading axes of the input of shape "
                f"{x.shape} (inputs: {shapes}). {remedy if one else ''}".rstrip()
            )
        found.append(w if ndim else None)
    if all(w is None or bool((w == 1).all()) for w in found):
        return None
    return found


def _as_weights(weights, index):
    _refuse_traced(weights, index, "row weights")
    weights = automatic(jnp.asarray(weights)).astype(jnp.float32)
    if weights.ndim == 0:
        raise ValueError(f"Batch {index} has a single number as row weights; give an array, such as (batch,).")
    if not bool((jnp.isfinite(weights) & (weights >= 0)).all()):
        raise ValueError(f"Batch {index} has row weights that are negative or not finite; give finite ones from 0 up.")
    return weights


def is_data(x: jax.Array, weights: jax.Array) -> bool:
    """True for a floating input that is not itself a mask of the rows that count."""
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return False
    counts = over_rows(weights, x.ndim) > 0
    return not bool(_tells_rows_apart(jnp.asarray(x), counts))


def over_rows(weights: jax.Array, ndim: int) -> jax.Array:
    """Weights of leading axes, with the rank of a value. Axes that the value lacks are reduced by their maximum."""
    weights = weights.max(tuple(range(ndim, weights.ndim))) if weights.ndim > ndim else weights
    return weights.reshape(*weights.shape, *(1,) * (ndim - weights.ndim))


@jax.jit
def _tells_rows_apart(x, counts):
    """True if all rows that count hold one number and all others another, neither of them NaN."""
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

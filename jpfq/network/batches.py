"""Calibration batches: read once, checked, and sorted by shape."""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..matrix.automatic import automatic
from ..matrix.gram import is_finite, is_traced


@dataclasses.dataclass(frozen=True)
class Weighted:
    """A batch with row weights, such as a padding mask, that keep some rows out of the statistics.

    weights: (batch,), (batch, position) or whatever the leading axes of the layers' inputs are; 0 leaves a row out.
    Where a layer merges these axes with later ones, the batch is taken to come first; where it keeps one row per sample, a
    sample counts if any of its positions does.

    `batch` is a batch as without weights.

    Example:
        >>> mask = jnp.ones(64).at[50:].set(0)
        >>> padded = jpfq.Weighted(batches[0], mask)  # to be given in place of batches[0]
    """

    batch: Any
    weights: Any


class Shaped(NamedTuple):
    """All batches of one shape."""

    example: Any  # a batch, as a pytree
    leaves: list[list]
    weights: list


def read_batches(batches: Iterable, on_host: bool = False) -> list[Shaped]:
    """Batches grouped by shape, in the order of their first appearance; NumPy arrays are left in host memory if asked.

    Raises:
        ValueError: no batches; a batch of another structure, type or feature shape than the first; NaN or infinity.
    """
    if isinstance(batches, (dict, str)) or hasattr(batches, "shape") or not isinstance(batches, Iterable):
        raise ValueError(f"batches is an iterable of batches, such as a list of arrays; got {_describe(batches)}.")
    groups: dict = {}
    first = None
    for number, item in enumerate(batches):
        batch, weights = (item.batch, item.weights) if isinstance(item, Weighted) else (item, None)
        leaves, tree = jax.tree.flatten(batch)
        leaves = [np.array(a) if on_host and not isinstance(x, jax.Array) else a for x, a in _arrays(leaves, number)]
        signature = tree, [(x.shape[1:], x.dtype) for x in leaves]
        first = first or signature
        _check_like(first, signature, number)
        if weights is not None:
            weights = _check_weights(weights, leaves, number)
        shapes = tuple(x.shape for x in leaves)
        group = groups.setdefault(shapes, Shaped(tree.unflatten(leaves), [], []))
        group.leaves.append(leaves)
        group.weights.append(weights)
    if not groups:
        raise ValueError("batches is empty: quantization needs calibration data. (A generator can be read only once.)")
    return list(groups.values())


def shapes_of(batch: Any) -> Any:
    """A batch as shapes, for a plan: arrays and `jax.ShapeDtypeStruct`s may stand in it."""
    batch = batch.batch if isinstance(batch, Weighted) else batch
    known = lambda x: isinstance(x, jax.ShapeDtypeStruct) or is_traced(x)
    return jax.tree.map(lambda x: x if known(x) else jax.typeof(_array(x, 0)), batch)


def _arrays(leaves, number):
    return ((x, _array(x, number)) for x in leaves)


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
        x = automatic(jnp.asarray(x))
    except TypeError as error:
        raise ValueError(
            f"Batch {number} holds {x!r}, which is no array. Arguments that do not change, such as train=False, go "
            "into kwargs={'train': False}."
        ) from error
    if jnp.issubdtype(x.dtype, jnp.inexact) and not is_finite(x):
        raise ValueError(f"Batch {number} holds NaN or infinity.")
    return x


def _check_like(first, here, number):
    if here[0] != first[0]:
        raise ValueError(f"Batch {number} has the structure {here[0]}; the first has {first[0]}.")
    for expected, given in zip(first[1], here[1], strict=True):
        if expected != given:
            show = lambda signature: f"(batch, {', '.join(map(str, signature[0]))}) {signature[1]}"
            raise ValueError(
                f"Batch {number} has an input of shape {show(given)}; the first has {show(expected)}. Only the leading "
                "axis may differ."
            )


def _check_weights(weights, leaves, number):
    _refuse_traced(weights, number, "row weights")
    weights = automatic(jnp.asarray(weights)).astype(jnp.float32)
    if weights.ndim == 0 or not any(x.shape[: weights.ndim] == weights.shape for x in leaves):
        shapes = ", ".join(str(x.shape) for x in leaves)
        raise ValueError(
            f"Batch {number} has row weights of shape {weights.shape}, which are the leading axes of none of its inputs "
            f"({shapes})."
        )
    if not bool((jnp.isfinite(weights) & (weights >= 0)).all()):
        raise ValueError(f"Batch {number} has row weights that are negative or not finite.")
    return weights


def _describe(x):
    return f"an array of shape {x.shape}: did you mean [x]?" if hasattr(x, "shape") else f"{type(x).__name__}"

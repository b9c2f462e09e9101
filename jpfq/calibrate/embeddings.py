"""Embeddings are quantized before all layers, so that the quantized network begins with them.

An embedding that is only read loses ||E - Q||^2 over its rows. The inputs are one token each, so the Gram is diagonal: every
row is rounded by itself, at the steps of least error, whether the calibration data read it or not.

A tied one is also the weight of a product x E^T at the end of the network, whose inputs depend on all layers. There is one
set of codes for both uses, chosen by the sum of their relative errors squared,

    ||X (E - Q)^T||^2 / ||X E^T||^2 + ||E - Q||^2 / ||E||^2,

with the inputs X of the product in the float network. That is the error under the Gram X^T X + lam I, so the recursion runs
along the features as for any kernel. X takes one more pass of the float network.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..matrix import MSQ, Devices, Gram, Info, Natural, QTensor, Recipe, code_dtype, raise_on
from ..matrix.lanes import each
from ..model.embeddings import Embedding
from ..model.random_keys import fold_in
from .assemble import tensor_of
from .gather import Gather
from .loop import solve_one
from .progress import SILENCE, Reporter
from .stream import Stream

Quantizations = dict[str, tuple[QTensor, Info]]


def quantize_embeddings(
    embeddings: Sequence[Embedding],
    recipes: Mapping[str, Recipe],
    leaves: Sequence,
    streams: Callable[[Embedding], Sequence[Stream]],
    key: jax.Array | None = None,
    reporter: Reporter = SILENCE,
    devices: Devices | None = None,
) -> Quantizations:
    """The codes and the figures of each embedding, by path.

    Args:
        embeddings: of the model, as traced for the first shape of batch.
        recipes: settings by path.
        leaves: the parameters.
        streams: new streams of all batches that stop at the products of an embedding.
        key: for random roundings.
        reporter: receives each embedding that is done.
        devices: over which the rows are split.
    """
    found: Quantizations = {}
    for embedding in embeddings:
        recipe = recipes[embedding.path]
        W = embedding.matrices(leaves[embedding.leaf])
        recipe.refuse(0, W.shape[1], embedding.path)
        reporter.doing("gathering")
        if embedding.products:
            data = _tied(W, _gram(streams(embedding), devices))
        else:
            recipe, data = by_rows(recipe), _identity(W)
        reporter.doing("solving")
        draw = None if key is None else fold_in(key, zlib.crc32(embedding.path.encode()))
        solution = solve_one(W, data, recipe, draw, devices)
        raise_on(solution.info, recipe, embedding.path, data)
        solution = solution._replace(codes=solution.codes.astype(code_dtype(recipe.grid)), q=None)
        leaf = leaves[embedding.leaf]
        tensor = tensor_of([(embedding, solution)], leaf.shape, leaf.dtype, recipe, False)
        found[embedding.path] = tensor, Info.join([solution.info])
        reporter.done(float(found[embedding.path][1].relative_error))
    return found


def by_rows(recipe: Recipe) -> Recipe:
    """The recipe for independent inputs, where every method and order gives the codes of rounding to nearest."""
    return dataclasses.replace(recipe, method=MSQ(), order=Natural(), shrinkage=None)


def _gram(streams: Sequence[Stream], devices: Devices | None) -> Gram:
    """The Gram of the inputs of all products of an embedding, from the float network."""
    parts = []
    for index in range(len(streams[0].stops)):
        for stream in streams:
            stream.advance(index)
        gather = Gather(streams, index, devices=devices)
        gram: Any = gather.of(Gram).data
        if gather.shown is not None:
            gather.shown.refuse(gather.path)
        parts.append(dataclasses.replace(gram, C=None, drift=None))  # where the networks differ after a product: by 0
    for stream in streams:
        stream.release()
    return functools.reduce(Gram.merge, parts)


@jax.jit
def _identity(W) -> Gram:
    """The Gram (1, in, in) of inputs that are one feature each."""
    n = W.shape[1]
    ones = jnp.ones((1, n), W.dtype)
    return Gram(jnp.eye(n, dtype=W.dtype)[None], None, None, ones, ones, jnp.full(1, n, W.dtype))


@jax.jit
def _tied(W, gram) -> Gram:
    """A Gram and the identity, in units in which both give the float weights the same energy."""
    energy = each(lambda gram, W: gram.energy(W).sum(), gram, W)
    squares = jnp.sum(W**2, (1, 2))
    unit = jnp.where(squares > 0, energy / jnp.where(squares > 0, squares, 1), 0)
    H = gram.H + unit[:, None, None] * jnp.eye(W.shape[1], dtype=gram.H.dtype)[None]
    return dataclasses.replace(gram, H=H)

"""Slices: a wide matrix is solved a run of neurons at a time, so that intermediate arrays stay small.

A language model's head has a hundred thousand neurons, and a solve makes a dozen arrays of the size of its matrix. Neurons
are independent, so runs of them are solved one after the other, by one program; the last run is padded.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..scalar import Bounded
from .gram import Gram, Rows
from .qtensor import Info, entropy
from .recipe import Recipe
from .stages import Solution, solve_all

ENTRIES = 2**23  # of a matrix at a time, or as many neurons as inputs where these are more: else factors cost the most


def slice_width(size: tuple[int, int, int], recipe: Recipe) -> int:
    """The number of neurons that are solved together."""
    B, n, out = size
    alone = recipe.local_steps and recipe.rounding.fills and recipe.prepare == ()
    most = max(n, ENTRIES // (B * n))
    if not alone or isinstance(recipe.rounding, Bounded) or out <= most:
        return out
    return -(-out // -(-out // most))


def solve_sliced(W: jax.Array, data: Gram | Rows, recipe: Recipe, key: jax.Array | None, dtype: np.dtype) -> Solution:
    """`solve_all` a run of neurons at a time, with codes of that integer type; the codes are the same."""
    B, n, out = W.shape
    width = slice_width((B, n, out), recipe)
    if out % width:
        W = jnp.pad(W, ((0, 0), (0, 0), (0, -out % width)))
    parts = []
    for first in map(jnp.asarray, range(0, out, width)):  # an array, so that all runs are cut by one program
        part = lax.dynamic_slice_in_dim(W, first, width, 2)
        solution = solve_all(part, data, recipe, key, jnp.asarray(out), first)
        parts.append(solution._replace(codes=solution.codes.astype(dtype)))
    infos = [part.info for part in parts]
    codes, q, step, zero = _side_by_side([part._replace(info=None) for part in parts], out)
    del parts  # before the metrics take memory
    return Solution(codes, q, step, zero, _joined(infos, codes, width))


@functools.partial(jax.jit, static_argnames="out")
def _side_by_side(parts, out):
    return tuple(jnp.concatenate(x, -1)[..., :out] for x in list(zip(*parts, strict=True))[:4])


@functools.partial(jax.jit, static_argnames="width")
def _joined(infos, codes, width):
    """The metrics of all neurons from those of each run; all runs but the last have one width."""
    out = codes.shape[-1]
    counts = jnp.asarray([min(width, out - i * width) for i in range(len(infos))], infos[0].saturation.dtype)
    return dataclasses.replace(Info.join(infos, counts), dead=infos[0].dead, entropy=entropy(codes))

"""Buckets: problems of several sizes that one compiled program solves, padded with zeros to the size of the bucket.

A program takes seconds to compile for each size, whatever the size; a solve of a small layer takes hundredths of one. So
small problems are padded:

    W        matrices, inputs and neurons of 0
    H, C, drift, sums    inputs that are 0 on all rows; `Gram.inputs` is the number of real ones

A weight under an input that is always 0 moves no output, whatever it is rounded to, and neurons are independent. So codes
stay as they are, random draws included, whose keys are folded with the indices of matrix, neuron and input.
"""

import dataclasses
import itertools
from collections.abc import Hashable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np

from ..scalar import Codes, PerGroup
from .gram import Gram
from .host import namespace, numpy_or_jit
from .recipe import Recipe
from .stages import Solution

COMPILE = 2.0  # seconds that a program takes to compile, on two cores
STEP, FLOPS = 3e-6, 3e10  # seconds that a step of a loop takes, and operations in a second

Size = tuple[int, int, int]  # matrices, inputs, neurons
Key = TypeVar("Key", bound=Hashable)


def seconds(size: Size, recipe: Recipe) -> float:
    """An estimate of the time of one solve on two cores, in seconds."""
    B, n, out = size
    runs = recipe.scale.runs + (0 if recipe.finish is None else 2 * recipe.finish.passes)
    loop = n * (STEP + B * out * (64 + n) / FLOPS)
    return runs * loop + B * n * n * (10 * n + 10 * out) / FLOPS


class Bucket(NamedTuple):
    """A size that problems are padded to, and whether they have matrices C and drift, which may be 0."""

    size: Size
    drifts: bool


def assign_buckets(problems: Mapping[Key, tuple[Size, bool, Recipe]]) -> dict[Key, Bucket]:
    """The bucket of each problem, for the least estimated time of compiling and solving all of them.

    Two buckets become one as long as that saves time; the pair that saves most comes first. A problem alone in its bucket
    has none, and neither has one whose recipe does not allow padding.

    Args:
        problems: size, whether the two networks differ in the data, and recipe.
    """
    kinds: dict[Any, dict[tuple[Size, bool], list]] = {}
    for key, (size, drifts, recipe) in problems.items():
        if fills(recipe):
            kind = jax.tree.structure(dataclasses.replace(recipe, grid=Codes.of(recipe.grid)))
            kinds.setdefault(kind, {}).setdefault((size, drifts), []).append(key)
    found = {}
    for members in kinds.values():
        recipe = problems[next(iter(members.values()))[0]][2]
        for bucket, kinds_in in _grouped({kind: len(keys) for kind, keys in members.items()}, recipe):
            if len(kinds_in) > 1:
                found |= {key: bucket for kind in kinds_in for key in members[kind]}
    return found


def _grouped(counts, recipe):
    """Buckets and their members, from how many problems there are of each (size, drifts)."""
    groups = [(Bucket(*kind), (kind,)) for kind in counts]

    def cost(group):
        return COMPILE + seconds(group[0].size, recipe) * sum(counts[kind] for kind in group[1])

    def joined(a, b):
        size = tuple(map(max, a[0].size, b[0].size))
        return Bucket(size, a[0].drifts or b[0].drifts), a[1] + b[1]

    def may_join(a, b):
        return fills_inputs(recipe) or a[0].size[1] == b[0].size[1]

    while True:
        pairs = [pair for pair in itertools.combinations(groups, 2) if may_join(*pair)]
        saved = [cost(a) + cost(b) - cost(joined(a, b)) for a, b in pairs]
        if not pairs or max(saved) <= 0:
            return groups
        a, b = pairs[saved.index(max(saved))]
        groups = [*(group for group in groups if group not in (a, b)), joined(a, b)]


def fills(recipe: Recipe) -> bool:
    """True if weights of 0 under inputs of 0 change nothing that a solve by this recipe returns for the others."""
    finish = recipe.finish is None or recipe.finish.fills
    parts = recipe.scale.fills(recipe.grid), recipe.order.fills, recipe.method.fills, recipe.rounding.fills, finish
    plain = recipe.rotation is None and recipe.prepare == () and recipe.refits is None and not recipe.needs_rows
    return plain and not recipe.scale.in_blocks and all(parts)


def fills_inputs(recipe: Recipe) -> bool:
    """True if there may be more inputs too: where their number decides which weights share a step, it is kept."""
    return not isinstance(recipe.scale.per, PerGroup)


@numpy_or_jit("bucket")
def fill(W: jax.Array, gram: Gram, bucket: Bucket) -> tuple[jax.Array, Gram]:
    """Weights (B, in, out) and the Gram of their inputs, of the size of a bucket; arrays of the Gram may have lanes."""
    xp = namespace(W)
    B, n, out = (more - size for more, size in zip(bucket.size, W.shape, strict=True))
    sizes = {"matrix": (B, n, n), "vector": (B, n), "number": (B,)}

    def filled(x, kind):
        width = sizes[kind]
        return xp.pad(x, ((0, 0),) * (x.ndim - len(width)) + tuple((0, more) for more in width))

    H = filled(gram.H, "matrix")
    C, drift = (None if M is None else filled(M, "matrix") for M in (gram.C, gram.drift))
    if C is None and bucket.drifts:
        C = drift = xp.zeros_like(H)
    sum_X, sum_Xq = (filled(x, "vector") for x in (gram.sum_X, gram.sum_Xq))
    count = filled(gram.count, "number")
    inputs = np.where(np.arange(bucket.size[0]) < W.shape[0], W.shape[1], 0)
    inputs = xp.broadcast_to(inputs, count.shape)
    W = xp.pad(W, ((0, B), (0, n), (0, out)))
    return W, Gram(H, C, drift, sum_X, sum_Xq, count, gram.power, inputs)


def cut(solution: Solution, size: Size, dtype: np.dtype) -> Solution:
    """A solution without its padding, codes as integers of that type; all with an axis of lanes, or none."""
    codes, q, step, zero = _cut(solution.codes, solution.q, solution.step, solution.zero, size, dtype)
    return Solution(codes, q, step, zero, solution.info)


@numpy_or_jit("size", "dtype")
def _cut(codes, q, step, zero, size, dtype):
    B, n, out = size
    codes, q = (x[..., :B, :n, :out] for x in (codes, q))
    step, zero = (x[..., :B, :, :out] for x in (step, zero))
    return codes.astype(dtype), q, step, zero

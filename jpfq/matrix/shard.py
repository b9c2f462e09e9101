"""A solve on many devices: each has a run of the neurons and walks through it by itself.

    W (in, out)        split over its neurons, filled up where the devices do not divide them
    H, C, drift        whole on every device
    codes, values      split as W is

The recursion of a neuron needs no other neuron, so between its first and its last coordinate nothing is sent. What neurons
share (one step for a whole matrix, the figures of `Info`) is exchanged before and after; see neurons.py.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ..scalar import Codes
from .gram import Gram, Rows
from .neurons import Neurons
from .recipe import Recipe
from .stages import Solution, solve_all, stages


class Devices(NamedTuple):
    """The axes of a mesh that neurons are split over."""

    mesh: Mesh
    axes: tuple[str, ...]

    @property
    def count(self) -> int:
        """How many runs of neurons there are."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes)


def solve_sharded(
    W: jax.Array, data: Gram | Rows, recipe: Recipe, key: jax.Array | None, devices: Devices | None
) -> Solution:
    """`solve_all` with the neurons of W (B, in, out) split over `devices`; the codes are the same.

    Matrices of fewer neurons than devices, as in a depthwise convolution, are solved whole on every device.
    """
    if devices is None or W.shape[-1] < devices.count:
        return solve_all(W, data, recipe, key)
    return _solve_sharded(W, data, dataclasses.replace(recipe, grid=Codes.of(recipe.grid)), key, devices)


@functools.partial(jax.jit, static_argnames="devices")
def _solve_sharded(W, data, recipe, key, devices):
    out = W.shape[-1]
    neurons = Neurons(out, devices.axes)
    split = P(None, None, devices.axes)
    step = P() if recipe.scale.shared else split
    specs = Solution(split, split, step, step, P())
    run = jax.shard_map(
        lambda *args: stages(*args, neurons),
        mesh=devices.mesh,
        in_specs=(split, P(), P(), P()),
        out_specs=specs,
        check_vma=False,
    )
    W = jnp.pad(W, ((0, 0), (0, 0), (0, -out % devices.count)))
    solution = run(W, data, recipe, key)
    only = lambda x: x[..., :out]
    return Solution(*(only(x) if spec is split else x for x, spec in zip(solution, specs, strict=True)))

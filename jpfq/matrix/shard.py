"""A solve on many devices: each has a run of the neurons and walks through it by itself.

    W (in, out)        split over its neurons, filled up where the devices do not divide them
    H, C, drift        whole on every device; or where they come split over their rows, so they stay
    codes, values      split as W is

The recursion of a neuron needs no other neuron, so between its first and its last coordinate nothing is sent. What neurons
share (one step for a whole matrix, the figures of `Info`) is exchanged before and after; see neurons.py.
Of a split Gram, a panel of rows at a time is sent to all devices, before the recursion enters it (split.py). That serves the
methods whose feedback is H itself (GPFQ, UNI, MSQ); a factorisation needs H whole.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ..scalar import Codes
from .gram import Gram, Rows
from .neurons import Neurons
from .order import MinPivot
from .recipe import Recipe
from .split import Split
from .stages import Solution, solve_all, stages


class Devices(NamedTuple):
    """The axes of a mesh that neurons are split over."""

    mesh: Mesh
    axes: tuple[str, ...]

    @property
    def count(self) -> int:
        """How many runs of neurons there are."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes)

    @property
    def rows(self) -> NamedSharding:
        """How a Gram's matrices (B, in, in) are split over their rows."""
        return NamedSharding(self.mesh, P(None, self.axes, None))

    def hold_rows(self, data: Gram | Rows) -> bool:
        """Whether the data are a Gram whose matrices are so split."""
        if not isinstance(data, Gram) or data.H.shape[1] % self.count:
            return False
        return data.H.sharding.is_equivalent_to(self.rows, 3)


def solve_sharded(
    W: jax.Array, data: Gram | Rows, recipe: Recipe, key: jax.Array | None, devices: Devices | None
) -> Solution:
    """`solve_all` with the neurons of W (B, in, out) split over `devices`; the codes are the same.

    Matrices of fewer neurons than devices, as in a depthwise convolution, are solved whole on every device.
    """
    if devices is None or W.shape[-1] < devices.count:
        return solve_all(W, data, recipe, key)
    recipe = dataclasses.replace(recipe, grid=Codes.of(recipe.grid))
    return _solve_sharded(W, data, recipe, key, devices, devices.hold_rows(data) and by_rows(recipe))


def by_rows(recipe: Recipe) -> bool:
    """Whether a solve gets by with a few rows of H and C at a time."""
    whole = (recipe.rotation, recipe.shrinkage, *recipe.prepare, isinstance(recipe.order, MinPivot) or None)
    return recipe.method.local and all(part is None for part in whole)


@functools.partial(jax.jit, static_argnames=("devices", "split_gram"))
def _solve_sharded(W, data, recipe, key, devices, split_gram):
    out = W.shape[-1]
    neurons = Neurons(out, devices.axes, recipe.scale.shared)
    split = P(None, None, devices.axes)
    step = P() if recipe.scale.shared else split
    specs = Solution(split, split, step, step, P())
    squares = ("H", "C", "drift")
    on_rows = P(None, devices.axes, None) if split_gram else P()
    given = (
        Gram(**{f.name: on_rows if f.name in squares else P() for f in dataclasses.fields(Gram)}) if split_gram else P()
    )

    def local(W, data, recipe, key):
        if split_gram:
            parts = {name: getattr(data, name) for name in squares}
            kept = {name: None if M is None else Split(M, axis=devices.axes) for name, M in parts.items()}
            data = dataclasses.replace(data, **kept)
        return stages(W, data, recipe, key, neurons)

    run = jax.shard_map(
        local,
        mesh=devices.mesh,
        in_specs=(split, given, P(), P()),
        out_specs=specs,
        check_vma=False,
    )
    W = jnp.pad(W, ((0, 0), (0, 0), (0, -out % devices.count)))
    # one axis after the other, to and fro: at once XLA would gather all of W on the way
    over = lambda x, last: lax.with_sharding_constraint(x, NamedSharding(devices.mesh, P(None, None, devices.axes[:last])))
    steps = range(1, len(devices.axes))
    solution = run(functools.reduce(over, steps, W), data, recipe, key)
    back = lambda x: functools.reduce(over, reversed(steps), x)[..., :out]
    return Solution(*(back(x) if spec is split else x for x, spec in zip(solution, specs, strict=True)))

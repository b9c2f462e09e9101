"""A solve on many devices: each solves a run of the neurons by itself.

    W (in, out)        split over its neurons, padded where the devices do not divide them
    H, C, drift        whole on every device; or where they come split over their rows, so they stay
    codes, values      split as W is

The recursion of a neuron needs no other neuron, so between its first and its last coordinate nothing is sent. What neurons
share (one step for a whole matrix, the metrics of `Info`) is exchanged before and after; see neurons.py.
Of a split Gram, a block of rows at a time is sent to all devices, before the recursion enters it (split.py). That serves the
methods whose feedback is H itself (GPFQ, UNI, MSQ); a factorisation needs H whole.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ..scalar import Bounded, Codes, WorstCase
from .explicit_mesh import is_traced
from .gram import Gram, Rows
from .neurons import Neurons
from .order import MinPivot
from .qtensor import Info
from .recipe import Recipe
from .split import Split
from .stages import Solution, solve_all, stages

WHOLE = 2**27  # entries of a matrix of the Gram up to which every device holds it whole: half a gigabyte in float32
SQUARES = ("H", "C", "drift")


@dataclasses.dataclass(frozen=True)
class Devices:
    """The axes of a mesh that neurons are split over."""

    mesh: Mesh
    axes: tuple[str, ...]

    @property
    def count(self) -> int:
        """The number of runs of neurons."""
        return math.prod(self.mesh.shape[axis] for axis in self.axes)

    @property
    def rows(self) -> NamedSharding:
        """The sharding of a Gram's matrices (B, in, in), split over their rows."""
        return NamedSharding(self.mesh, P(None, self.axes, None))

    def rows_of(self, n: int) -> NamedSharding | None:
        """`rows` where a Gram of n inputs is to be split; None where every device is to hold it whole."""
        return self.rows if n * n > WHOLE and n % self.count == 0 else None

    def splits(self, data: Gram | Rows) -> bool:
        """True if the data are a Gram that lies split, or is to."""
        if not isinstance(data, Gram) or data.H.shape[1] % self.count:
            return False
        lies_split = not is_traced(data.H) and data.H.sharding.is_equivalent_to(self.rows, 3)
        return lies_split or self.rows_of(data.H.shape[1]) is not None


def solve_sharded(
    W: jax.Array,
    data: Gram | Rows,
    recipe: Recipe,
    key: jax.Array | None,
    devices: Devices | None,
    count: jax.Array | None = None,
) -> Solution:
    """`solve_all` with the neurons of W (B, in, out) split over `devices`; the codes are the same.

    Matrices of fewer neurons than devices, as in a depthwise convolution, are solved whole on every device.
    """
    if devices is None or W.shape[-1] < devices.count:
        return solve_all(W, data, recipe, key, count)
    return _solve_sharded(*_arguments(W, data, recipe, key, devices))


def program(W: jax.Array, data: Gram | Rows, recipe: Recipe, key: jax.Array | None, devices: Devices) -> Any:
    """The compiled program of `solve_sharded`, for its memory and for what it sends. It takes (W, data, recipe, key)."""
    return _solve_sharded.lower(*_arguments(W, data, recipe, key, devices)).compile()


def _arguments(W, data, recipe, key, devices):
    recipe = dataclasses.replace(recipe, grid=Codes.of(recipe.grid))
    return W, data, recipe, key, devices, devices.splits(data) and by_rows(recipe)


def by_rows(recipe: Recipe) -> bool:
    """True if a solve needs only a few rows of H and C at a time."""
    whole = (recipe.rotation, recipe.shrinkage, *recipe.prepare)
    return recipe.method.local and not any(whole) and not isinstance(recipe.order, MinPivot)


@functools.partial(jax.jit, static_argnames=("devices", "split_gram"))
def _solve_sharded(W, data, recipe, key, devices, split_gram):
    out, axes = W.shape[-1], devices.axes
    neurons = Neurons(out, axis=axes, shared=recipe.scale.shared)
    split: Any = P(None, None, axes)
    whole: Any = P()
    step = whole if recipe.scale.shared else split

    def local(W, squares, data, recipe, key):
        if split_gram:
            squares = {name: None if M is None else Split(M, axis=axes) for name, M in squares.items()}
        data = dataclasses.replace(data, **squares)
        return stages(W, data, recipe, key, neurons)

    squares = {name: getattr(data, name) for name in SQUARES} if isinstance(data, Gram) else {}
    run = jax.shard_map(
        local,
        mesh=devices.mesh,
        in_specs=(split, devices.rows.spec if split_gram else whole, whole, whole, whole),
        out_specs=Solution(split, split, step, step, _of_info(recipe, whole, split)),
        check_vma=False,
    )
    # one axis after the other, to and fro: at once XLA would gather all of W on the way
    over = lambda x, last: lax.with_sharding_constraint(x, NamedSharding(devices.mesh, P(None, None, axes[:last])))
    steps = range(1, len(axes))
    W = functools.reduce(over, steps, jnp.pad(W, ((0, 0), (0, 0), (0, -out % devices.count))))
    solution = run(W, squares, dataclasses.replace(data, **dict.fromkeys(squares)), recipe, key)
    back = lambda x: functools.reduce(over, reversed(steps), x)[..., :out]
    step, zero = (x if recipe.scale.shared else back(x) for x in solution[2:4])
    info = solution.info
    if info.reach is not None:
        info = dataclasses.replace(info, reach=dataclasses.replace(info.reach, ends=info.reach.ends[:, :, :out]))
    return Solution(back(solution.codes), back(solution.q), step, zero, info)


def _of_info(recipe, whole, split):
    """The partition specs of `Info`: its metrics are over all neurons, except the integer sums of each."""
    fields: dict[str, Any] = {f.name: whole for f in dataclasses.fields(Info)}
    fields["reach"] = WorstCase(whole, split) if isinstance(recipe.rounding, Bounded) else None
    return Info(**fields)

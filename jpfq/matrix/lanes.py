"""One function on many arrays: matrices of one kernel, and lanes, the quantized networks of a sweep that run together."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

LANES = "lanes of a sweep"  # the axis of the mesh in use that lanes are split over, where it has one of this name


def each(f: Callable, *args):
    """`f` on each entry of the leading axis of `args`.

    An axis of one entry is dropped instead, which compiles to better loops than a batch of one.
    """
    if jax.tree.leaves(args)[0].shape[0] > 1:
        return jax.vmap(f)(*args)
    return jax.tree.map(lambda x: x[None], f(*jax.tree.map(lambda x: x[0], args)))


def over_lanes(f: Callable, args: Sequence, laned: Sequence[bool], count: int | None = None) -> Any:
    """`f(*args)` for each lane: entries of the leading axis of those `args` that are `laned`; the others serve all.

    `f` closes over no arrays: all that it needs are among `args`. `count` is the number of lanes; it is needed where the
    laned arguments may be settings without arrays.

    As a batch, where there is an accelerator to fill. On a CPU one lane after the other inside the program, which gives
    each lane the same bits as alone: batches of convolutions take twenty times as long there, and batches of
    solves as long as one after the other. On a mesh with an axis LANES every device takes its share of them.
    """
    if not any(laned):
        return f(*args)
    if count is not None and not jax.tree.leaves([x for x, axis in zip(args, laned, strict=True) if axis]):
        return jax.tree.map(lambda y: jnp.broadcast_to(y, (count, *y.shape)), f(*args))
    if LANES not in jax.sharding.get_abstract_mesh().axis_names:
        return _over_lanes(f, args, laned)
    share = jax.shard_map(
        lambda *args: _over_lanes(f, args, laned),
        in_specs=tuple(P(LANES) if axis else P() for axis in laned),
        out_specs=P(LANES),
        axis_names={LANES},
        check_vma=False,
    )
    return share(*args)


def _over_lanes(f, args, laned):
    if batches_lanes():
        return jax.vmap(f, in_axes=[0 if axis else None for axis in laned])(*args)
    stacked = [x for x, axis in zip(args, laned, strict=True) if axis]

    def one(lane):
        own = iter(lane)
        return f(*[next(own) if axis else x for x, axis in zip(args, laned, strict=True)])

    return lax.map(one, stacked)


def batches_lanes() -> bool:
    """True if lanes are computed as a batch, rather than one after the other."""
    return jax.default_backend() != "cpu"


def stack(trees: Sequence) -> Any:
    """Trees of one structure as one tree with lanes; Python numbers stay weakly typed."""
    return jax.tree.map(lambda *leaves: _stack(*leaves), *trees)


def lane(tree: Any, i: int) -> Any:
    """One lane of a tree."""
    return jax.tree.map(lambda x: x[i], tree)


@jax.jit
def _stack(*leaves):
    return jnp.stack(leaves)

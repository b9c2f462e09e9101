"""Computes on blocks of rows inside one program, so that intermediate values stay in a CPU's cache."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..matrix.working_set import elements_at_once

LEAST = 64  # rows in a block, at least: the recursion advances all of them at once


def at_once() -> int:
    """The number of measurements to hold in memory at once."""
    return elements_at_once(on_cpu=2**18)


def by_rows(f: Callable[..., Any], each: int, *args: jax.Array, most: int | None = None) -> Any:
    """f(*args), computed block by block if all rows at once would need too many elements.

    `f` works on each row separately, for any leading axes. Blocks are taken along the longest of these, with equally many
    rows of each device if rows are split over devices, so that no device needs the rows of another. All blocks have one
    size, so that `f` is compiled once; the last one overlaps the block before it.

    Args:
        f: a function from arrays with some of the rows of `args` to a tree of arrays with the same leading axes.
        each: the number of intermediate elements per row.
        args: arrays. Rows are the leading axes: all axes of the first array but its last.
        most: the limit of elements, but at least `LEAST` rows; None for `at_once`.
    """
    lead, most = args[0].shape[:-1], at_once() if most is None else most
    rows = math.prod(lead)
    if not lead or rows * each <= most:
        return f(*args)
    axis = lead.index(max(lead))
    parts = math.gcd(lead[axis], jax.device_count())  # the number of devices that rows are split over divides this
    count = lead[axis] // parts
    size = -(-max(LEAST, most // each) // (rows // count))
    if size >= count:
        return f(*args)
    split = lambda x: x.reshape(*x.shape[:axis], parts, -1, *x.shape[axis + 1 :])
    join = lambda x: x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])
    whole = [split(x) for x in args]

    def block(first):
        return f(*(join(lax.dynamic_slice_in_dim(x, first, size, axis + 1)) for x in whole))

    def visit(done, first):
        put = lambda all, some: lax.dynamic_update_slice_in_dim(all, split(some), first, axis + 1)
        return jax.tree.map(put, done, block(first)), None

    empty = lambda x: jnp.zeros((*x.shape[:axis], parts, count, *x.shape[axis + 1 :]), x.dtype)
    start = jax.tree.map(empty, jax.eval_shape(block, 0))
    # If the last block would reach beyond the end, both slices move back accordingly.
    done, _ = lax.scan(visit, start, size * jnp.arange(-(-count // size)))
    return jax.tree.map(join, done)

"""Rows a few at a time, inside one program: what is made of them on the way stays in a processor's cache."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

LEAST = 64  # rows in a block: the recursion takes its steps in all of them at once


def at_once() -> int:
    """The number of measurements in memory at a time: what stays in a processor's cache, or fills an accelerator."""
    return 2**18 if jax.default_backend() == "cpu" else 2**26


def by_rows(f: Callable[..., Any], each: int, *args: jax.Array, most: int | None = None) -> Any:
    """f(*args), a block of rows after the other where all rows at once would make too many numbers.

    `f` works on each row by itself, whatever leading axes rows have. Blocks are taken along the longest of these, equally
    many rows of each device where rows are split over devices, so that none needs the rows of another. The last block
    takes some rows again: all are of one size, and `f` is compiled once.

    Args:
        f: arrays with some of the rows of `args` to a tree of arrays with the same leading axes.
        each: how many numbers it makes of one row, on the way.
        args: arrays whose leading axes, all but the last of the first one, are rows.
        most: how many numbers there may be at a time, but for `LEAST` rows; None for `at_once`.
    """
    lead, most = args[0].shape[:-1], at_once() if most is None else most
    rows = math.prod(lead)
    if not lead or rows * each <= most:
        return f(*args)
    axis = lead.index(max(lead))
    parts = math.gcd(lead[axis], jax.device_count())  # how rows are split is not known in here: it divides this
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
    # Where the last block would reach beyond the end, both slices move back by as much.
    done, _ = lax.scan(visit, start, size * jnp.arange(-(-count // size)))
    return jax.tree.map(join, done)

"""Rewrites a program into the equations that bounds are known for: maxima over windows and axes as maxima of pairs."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ...model.compat import bind, is_literal
from ...model.functional import Functional
from ...model.program import Program, evaluate, trace

IDENTITIES = {"copy", "copy_p", "stop_gradient", "optimization_barrier", "sharding_constraint", "device_put"}


def lowered(functional: Functional, batch) -> Program:
    """The program of a model for a batch of these shapes, rewritten."""
    program = trace(functional.fn, functional.paths, functional.leaves, batch)
    return _again(program, functional, batch)


def _again(program: Program, functional, batch) -> Program:
    def fn(leaves, batch):
        found = evaluate(program, leaves, jax.tree.leaves(batch), functools.partial(_visit, program))
        return program.tree.unflatten(found)

    return trace(fn, functional.paths, functional.leaves, batch)


def _visit(program, index, eqn, values):
    name, p = eqn.primitive.name, eqn.params
    if program.is_fixed(eqn):
        return bind(eqn, values)
    if name == "reduce_window_max":
        return [_window_max(values[0], p, eqn)]
    if name == "reduce_max":
        return [_axes_max(values[0], p["axes"])]
    if name == "clamp":
        return [
            lax.min(
                lax.max(values[1], jnp.broadcast_to(values[0], values[1].shape)),
                jnp.broadcast_to(values[2], values[1].shape),
            )
        ]
    if name == "split":
        starts = np.cumsum([0, *p["sizes"]])
        return [lax.slice_in_dim(values[0], int(a), int(b), axis=p["axis"]) for a, b in itertools.pairwise(starts)]
    if name == "max":
        sides = [i for i, v in enumerate(eqn.invars) if is_literal(v) and np.all(np.asarray(v.val) == -math.inf)]
        if sides:
            return [values[1 - sides[0]]]
    return bind(eqn, values)


def _window_max(x, p, eqn):
    """The maxima over windows, axis by axis. An edge is padded by its own entry, which lies in the window already."""
    zipped = zip(
        p["window_dimensions"], p["window_strides"], p["padding"], p["base_dilation"], p["window_dilation"], strict=True
    )
    for axis, (size, stride, (before, after), base, dilation) in enumerate(zipped):
        reach = (size - 1) * dilation
        if base != 1 or dilation != 1 or min(before, after) < 0 or max(before, after) > reach or x.shape[axis] < 1:
            raise ValueError(
                "verify: max pooling with dilation, or with padding that fills a window, is not supported."
            )
        if size == 1 and stride == 1:
            continue
        first, last = (lax.slice_in_dim(x, a, a + 1, axis=axis) for a in (0, x.shape[axis] - 1))
        padded = lax.concatenate([*[first] * before, x, *[last] * after], axis) if before or after else x
        count = (padded.shape[axis] - reach - 1) // stride + 1
        cut = lambda i: lax.slice_in_dim(padded, i, i + (count - 1) * stride + 1, stride, axis)
        x = _tree([cut(i) for i in range(size)])
    return x


def _axes_max(x, axes):
    for axis in axes:
        while (n := x.shape[axis]) > 1:
            half = n // 2
            cut = lambda a, b: lax.slice_in_dim(x, a, b, axis=axis)
            y = lax.max(cut(0, half), cut(half, 2 * half))
            x = lax.concatenate([y, cut(2 * half, n)], axis) if n % 2 else y
    return lax.squeeze(x, tuple(axes))


def _tree(parts):
    while len(parts) > 1:
        parts = [lax.max(*parts[i : i + 2]) if i + 1 < len(parts) else parts[i] for i in range(0, len(parts), 2)]
    return parts[0]

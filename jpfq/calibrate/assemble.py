"""Assembles the quantized tensor of a parameter from the solutions of its sites."""

import functools
import math
import operator

import jax
import numpy as np

from ..matrix import QTensor, code_dtype
from ..matrix.host import namespace, numpy_or_jit
from ..scalar.step_types import is_storable


def tensor_of(done, shape, dtype, recipe, laned) -> QTensor:
    """The tensor of a parameter; `done` has its sites with their solutions."""
    places = tuple((site.chain, site.layout) for site, _ in done)
    solutions = [(s.codes, recipe.stored_steps(s.step), recipe.stored_steps(s.zero)) for _, s in done]
    runs = _runs(places, tuple(step.shape[laned:] for _, step, _ in solutions), shape)
    codes, step, zero = _whole(solutions, places, shape, runs, code_dtype(recipe.grid), laned, recipe.grid.offset)
    rotated = None if recipe.rotation is None else (recipe.rotation, done[0][0].layout)
    step_dtype = recipe.step_dtype
    if step_dtype is not None:  # parts whose steps are multiplied, or lie too far apart for one unit, keep float32
        exact = all(math.frexp(abs(site.chain.factor))[0] == 0.5 for site, _ in done)
        lanes = np.asarray(step) if laned else np.asarray(step)[None]
        step_dtype = step_dtype if exact and all(is_storable(one, step_dtype) for one in lanes) else None
    return QTensor(codes, step, zero, recipe.grid, np.dtype(dtype), rotated, step_dtype)


def _scatters(places) -> bool:
    """True if the parameter is not simply the matrix of one site."""
    return len(places) > 1 or bool(places[0][0].steps)


def _rearranges(solutions, places, shape, runs, dtype, laned, offset) -> bool:
    """True if JAX does the rearranging."""
    return laned or _scatters(places)


@numpy_or_jit("places", "shape", "runs", "dtype", "laned", "offset", unless=_rearranges)
def _whole(solutions, places, shape, runs, dtype, laned, offset):
    """Codes, steps and zero points of a parameter. `places` has the chain and layout of each of its sites."""

    def one(solutions):
        as_floats = [
            (codes.astype(step.dtype), step, zero) for codes, step, zero in solutions
        ]  # integers do not scatter
        codes, steps, zeros = zip(*as_floats, strict=True)
        first = tuple(slice(None, None, run) for run in runs)
        step, zero = (_full(places, x, shape, scaled)[first] for x, scaled in ((steps, True), (zeros, offset)))
        return _full(places, codes, shape).astype(dtype), step, zero

    return jax.vmap(one)(solutions) if laned else one(solutions)


def _full(places, arrays, shape, scaled=False):
    """One array of the parameter's shape from arrays (B, groups or in, out or 1) of its sites."""
    parts = (
        chain.scatter(layout.operand(_to_matrices(x, layout.dims)), shape, scaled)
        for (chain, layout), x in zip(places, arrays, strict=True)
    )
    return functools.reduce(operator.add, parts)


def _to_matrices(x, dims):
    B, n, out = dims
    xp = namespace(x)
    return xp.broadcast_to(xp.repeat(xp.repeat(x, n // x.shape[1], 1), out // x.shape[2], 2), (B, n, out))


@functools.lru_cache(maxsize=4096)
def _runs(places, step_shapes, shape) -> tuple[int, ...]:
    """Along each axis of a parameter, the length of the runs that share one step.

    Found by rearranging an index for each step in the same way as the steps. It depends on the structure alone.
    """
    ends = np.cumsum([math.prod(step) for step in step_shapes])
    indices = np.split(np.arange(ends[-1], dtype=np.float32), ends[:-1])
    indexed = [x.reshape(step) for x, step in zip(indices, step_shapes, strict=True)]
    rearrange = lambda indexed: _full(places, indexed, shape)
    labels = np.asarray((jax.jit(rearrange) if _scatters(places) else rearrange)(indexed))
    changes = (np.flatnonzero(np.diff(labels, axis=a).any(axis=_others(labels, a))) + 1 for a in range(labels.ndim))
    return tuple(int(np.gcd.reduce([*c, labels.shape[a]])) for a, c in enumerate(changes))


def _others(x, axis):
    return tuple(a for a in range(x.ndim) if a != axis)

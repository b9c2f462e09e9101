"""Row weights of one array: combined, spread over a shape, or lost with a reason."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp


class Lost(NamedTuple):
    """In place of weights that cannot be followed through an operation."""

    by: str


def least(*weights) -> Any:
    """The least of weights of one rank, entry by entry."""
    found = list({id(w): w for w in weights if w is not None}.values())
    return functools.reduce(jnp.minimum, found) if found else None


def lost_or_least(weights):
    return next((w for w in weights if isinstance(w, Lost)), None) or least(*weights)


def most(w, axes) -> Any:
    return None if w is None else w.max(axes)


def scalar(w, ndim):
    """The weight of a number that meets an array."""
    return w.reshape((1,) * ndim) if w is not None and w.ndim == 0 else w


def full(w, shape, axes):
    """Weights with these axes at their full size; 1 for infinity where there are none, which constrains nothing."""
    w = jnp.full((1,) * len(shape), jnp.inf, jnp.float32) if w is None else w
    return jnp.broadcast_to(w, [n if a in axes else m for a, (n, m) in enumerate(zip(shape, w.shape, strict=True))])


def note(cut, name, flags):
    if flags:
        cut[name] = functools.reduce(jnp.logical_or, flags, cut.get(name, jnp.zeros((), bool)))

"""Operations on row weights: combine, reduce and broadcast them, or mark them as lost."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp


class Lost(NamedTuple):
    """Stands for weights that cannot be followed through an operation."""

    by: str  # the operation


def least(*weights) -> Any:
    """The elementwise minimum of weights of one rank."""
    found = list({id(w): w for w in weights if w is not None}.values())
    return functools.reduce(jnp.minimum, found) if found else None


def lost_or_least(weights):
    """`least`, or the first of the weights that are lost."""
    return next((w for w in weights if isinstance(w, Lost)), None) or least(*weights)


def most(w, axes) -> Any:
    """The largest weights along axes, which are removed."""
    return None if w is None else w.max(axes)


def scalar(w, ndim):
    """The weight of a scalar, in the rank of the array that it is combined with."""
    return w.reshape((1,) * ndim) if w is not None and w.ndim == 0 else w


def full(w, shape, axes):
    """Weights broadcast to their full size along some axes. None becomes infinity, which never is the minimum."""
    w = jnp.full((1,) * len(shape), jnp.inf, jnp.float32) if w is None else w
    return jnp.broadcast_to(w, [n if a in axes else m for a, (n, m) in enumerate(zip(shape, w.shape, strict=True))])


def note(cut, name, flags):
    """Records in `cut`, under the name of an operation, whether any of the flags is set."""
    if flags:
        cut[name] = functools.reduce(jnp.logical_or, flags, cut.get(name, jnp.zeros((), bool)))

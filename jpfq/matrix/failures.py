"""Everything that can go wrong inside a compiled solve, each with its remedy: it is found out and said after the solve."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from .explicit_mesh import is_traced
from .gram import Gram, Rows
from .host import namespace, numpy_or_jit
from .qtensor import Info
from .recipe import Recipe


class Failure(NamedTuple):
    """One thing that can go wrong."""

    happened: Callable[[Any, Info, Gram | None], jax.Array]  # (), from the module of arrays, the metrics and the Gram
    message: Callable[[Info, Recipe, str, Gram | Rows], str]  # the cause and the remedy; the name is that of the matrix


FAILURES = (
    Failure(
        lambda xp, info, gram: (
            xp.zeros(info.failed.shape, bool) if gram is None else ~xp.isfinite(gram.diagonal).all((-2, -1))
        ),
        lambda info, recipe, name, data: (
            f"The calibration data of {name} overflow: its Gram is not finite. Scale the inputs down."
        ),
    ),
    Failure(
        lambda xp, info, gram: info.failed != 0,
        lambda info, recipe, name, data: (
            f"{recipe.method} with prepare={recipe.prepare}: the factorisation of H + lam I failed for {name}, where H has "
            f"the condition number {_condition(data):.1e}. Raise the damping, for example to "
            "damping=jpfq.damping.MeanDiagonal(0.05), calibrate with more rows than inputs, or take jpfq.GPFQ(), which "
            "factors none."
        ),
    ),
    Failure(
        lambda xp, info, gram: info.zero_steps != 0,
        lambda info, recipe, name, data: (
            f"{recipe.scale} gives a step of zero under weights of {name} that are not all zero "
            f"({int(info.zero_steps)} steps): take a scale that sees them, such as jpfq.scale.AbsMax() or "
            "jpfq.scale.MinMSE()."
        ),
    ),
    Failure(
        lambda xp, info, gram: ~xp.isfinite(info.square_error),
        lambda info, recipe, name, data: f"The quantized outputs of {name} overflow: scale its inputs down.",
    ),
)


def raise_on(info: Info, recipe: Recipe, name: str, data: Gram | Rows) -> None:
    """Raises the first failure of a solve; a no-op while traced. `data` have a leading axis."""
    if is_traced(info.zero_steps):
        return
    for failure, happened in zip(FAILURES, np.asarray(failures(info, data)), strict=True):
        if happened:
            raise ValueError(failure.message(info, recipe, name, data))


def failures(info: Info, data: Gram | Rows) -> jax.Array:
    """True for each of `FAILURES` that happened (failures,), or (failures, lanes) where there are lanes."""
    return _failures(info, None if isinstance(data, Rows) else data)  # rows have a power of 2, and do not overflow


@numpy_or_jit()
def _failures(info, gram):
    xp = namespace(info.square_error)
    return xp.stack(xp.broadcast_arrays(*(failure.happened(xp, info, gram) for failure in FAILURES)))


def _condition(data) -> float:
    """The largest condition number of H over the matrices, dead coordinates left out."""
    grams = jax.vmap(Rows.gram)(data) if isinstance(data, Rows) else data
    worst = 1.0
    for H in np.asarray(_whole(grams.H), np.float64):
        live = np.diagonal(H) > 0
        values = np.linalg.eigvalsh(H[live][:, live])
        worst = max(worst, np.inf if values.size and values[0] <= 0 else values[-1] / values[0] if values.size else 1.0)
    return float(worst)


def _whole(x):
    """An array that this host can read, also where parts of it lie on others."""
    readable = x.is_fully_addressable or x.is_fully_replicated
    return x if readable else jax.device_put(x, NamedSharding(x.sharding.mesh, P()))

"""Grids that are fitted to the weights of each kernel of a model."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ..calibrate.batches import shapes_of
from ..matrix.explicit_mesh import context
from ..model.adapters import adapt
from ..model.mesh import on_auto_axes
from ..model.traced import find_kernels
from ..scalar import Grid, Per, PerChannel, PerGroup
from .rules import Rule


def fit_grids(
    fit: Callable[[np.ndarray], Grid], model: Any, batch: Any, state: dict[str, Any], group: int | None, pattern: str
) -> dict[str, Grid]:
    """The grid of each kernel, by path.

    Args:
        fit: makes a grid of weights (weights,) over the largest magnitudes among those that share a step.
        model, batch: the model, and an input of it or its shapes.
        state: "variables", "params" and "kwargs" as in `quantize`.
        group: inputs that share a step; None for all of a neuron.
        pattern: of the kernels that are meant.

    Raises:
        ValueError: no kernel is meant, or one has too few weights for the grid.
    """
    functional = on_auto_axes(adapt(model, state["variables"], state["params"], state["kwargs"]))
    per: Per = PerChannel() if group is None else PerGroup(group)
    meant = Rule(pattern, skip=True)
    weights: dict[str, list[np.ndarray]] = {}
    with context(functional.leaves):
        for site in find_kernels(functional, shapes_of(batch)).sites:
            if meant.matches(site.path):
                weights.setdefault(site.path, []).extend(_over_radius(site.matrices(functional.leaves[site.leaf]), per))
    if not weights:
        raise ValueError(f"{pattern!r} matches none of the kernels that can be quantized.")
    grids = {}
    for path, found in weights.items():
        try:
            grids[path] = fit(np.concatenate(found))
        except ValueError as error:
            raise ValueError(f"{path}: {error} Leave it out by pattern=.., or take fewer levels.") from error
    return grids


def _over_radius(matrices, per) -> list[np.ndarray]:
    """The weights of matrices (B, in, out) over the largest magnitudes among those that share a step."""
    found = []
    for W in np.asarray(matrices):
        groups = np.asarray((PerChannel() if per.misfit(*W.shape) else per).split(W))
        radius = np.abs(groups).max(1, keepdims=True)
        found.append((groups / np.where(radius > 0, radius, 1)).ravel())
    return found

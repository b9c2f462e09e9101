"""Folds a BatchNorm into the kernel before it: its factors multiply the kernel, and only a shift remains."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from ..calibrate.batches import read_batches
from ..calibrate.stream import Stream
from ..matrix.arrays import at_least_float32
from ..matrix.explicit_mesh import context
from ..model.adapters import adapt
from ..model.affine import Affine, value
from ..model.functional import check_values
from ..model.mesh import like, on_auto_axes
from ..model.program import trace
from ..model.sites import find_sites


def fold_batchnorm(
    model: Any, batch: Any, *, variables: Any = None, params: Any = None, kwargs: dict | None = None
) -> Any:
    """Moves the factors of BatchNorms into the kernels before them.

    Each neuron of a kernel, and a bias or mean between it and the factor, is multiplied by its factor. The scale of the
    BatchNorm is divided by it, so that the factor becomes 1. Outputs are unchanged up to rounding, and so is the structure
    of the parameters. A BatchNorm is not folded if it has no scale, if its input is used elsewhere too, or if several
    products share the kernel.

    Args:
        model, variables, params, kwargs: the same as for `jpfq.quantize`.
        batch: one batch, for its shape.

    Returns:
        New variables of a Linen module, a new NNX model, or new params of a function.

    Raises:
        ValueError: there is nothing to fold.

    Examples:
        >>> net = nn.Sequential([nn.Dense(8), nn.BatchNorm(use_running_average=True)])
        >>> folded = jpfq.fold_batchnorm(net, X, variables=net.init(key, X))
    """
    given = adapt(model, variables, params, kwargs)
    check_values(zip(given.paths, given.leaves, strict=True), "fold_batchnorm")
    with context(given.leaves):
        leaves = _leaves(on_auto_axes(given), batch)
    rebuilt = given.rebuild([like(new, old) for new, old in zip(leaves, given.leaves, strict=True)])
    return rebuilt.get("model", rebuilt.get("variables", rebuilt["params"]))


def _leaves(functional, batch):
    """The leaves of the folded model."""
    group = read_batches([batch])[0]
    program = trace(functional.fn, functional.paths, functional.leaves, group.example)
    read = Stream(program, functional.leaves, [], [], []).value
    affine = Affine(program)
    changes: dict = {}
    for site in (site for site in find_sites(program)[0] if not site.shares):  # uses may have different factors
        for leaf, chain, change in _folded(affine, site, functional.trainable, read):
            old = changes.get(leaf, at_least_float32(jnp.asarray(functional.leaves[leaf])))
            changes[leaf] = old + chain.scatter(change.astype(old.dtype), old.shape, scaled=True)
    if not changes:
        raise ValueError(
            "There is no BatchNorm to fold: none with a trainable scale directly follows a kernel that can be quantized."
        )
    return [changes[i].astype(leaf.dtype) if i in changes else leaf for i, leaf in enumerate(functional.leaves)]


def _folded(affine: Affine, site, trainable, read: Callable) -> list[tuple]:
    """(parameter, chain, change of its view) for each parameter that folding changes at one site; empty if none."""
    steps = affine.steps(site)
    end = next((i for i, step in enumerate(steps) if step.name in ("mul", "div") and step.per_neuron), None)
    if end is None or any(step.name in ("mul", "div", "transpose") for step in steps[:end]):
        return []
    last = steps[end]
    scale = _scale(affine, last, trainable)
    shifts = [o for step in steps[:end] if step.per_neuron and (o := affine.parameter(step.operand)) is not None]
    if scale is None or len(shifts) < end or any(affine.uses[leaf] > 1 for leaf, _ in (scale, *shifts)):
        return []
    factor = at_least_float32(value(last.operand, read))
    factor = last.expand(1 / factor if last.name == "div" else factor)
    factor = jnp.where((factor != 0) & jnp.isfinite(factor), factor, 1)
    W = site.layout.matrices(site.chain(read(affine.program.params[site.leaf])))
    B, _, out = W.shape
    new = W * factor.reshape(B, 1, out).astype(W.dtype)
    found = [(site.leaf, site.chain, site.layout.operand(new - W))]
    for step, (leaf, chain) in zip(steps[:end], shifts, strict=True):
        old = chain(read(affine.program.params[leaf]))
        found.append((leaf, chain, old * (step.collapse(factor) - 1).astype(old.dtype)))
    leaf, chain = scale
    old = chain(read(affine.program.params[leaf]))
    by = last.collapse(factor).reshape(old.shape).astype(old.dtype)
    found.append((leaf, chain, old * ((by if last.name == "div" else 1 / by) - 1)))
    return found


def _scale(affine: Affine, step, trainable):
    """The trainable parameter that a factor is proportional to: one operand of the product that computes it."""
    origin = affine.parameter(step.operand)
    if origin is not None:
        return origin if trainable[origin[0]] else None
    eqn = affine.producers.get(step.operand)
    while eqn is not None and eqn.primitive.name in ("reshape", "broadcast_in_dim", "convert_element_type", "squeeze"):
        eqn = affine.producers.get(eqn.invars[0])
    if eqn is None or eqn.primitive.name != "mul":
        return None
    origins = [origin for v in eqn.invars if (origin := affine.parameter(v)) is not None and trainable[origin[0]]]
    return origins[0] if len(origins) == 1 and step.operand.aval.size == eqn.outvars[0].aval.size else None

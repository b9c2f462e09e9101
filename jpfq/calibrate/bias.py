"""Bias correction: the mean error of a layer's output is subtracted from the bias that follows it.

In the recursion the bias is a last coordinate whose input is always 1 and whose weight is not rounded: if the inputs are
centred, the other coordinates leave the mean error, which the bias cancels exactly. Between the product and the bias there
may be factors and shifts for each neuron, as in a BatchNorm.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..matrix.arrays import matmul
from ..matrix.lanes import over_lanes
from ..model.affine import Affine, Step, value
from ..model.program import Program
from ..model.sites import Chain, Site
from ..scalar.exponent import reduced


@dataclasses.dataclass(frozen=True, eq=False)
class Bias:
    """The bias that takes the mean error of a site."""

    leaf: int  # index of the parameter
    path: str
    chain: Chain  # from the parameter to what is added
    ndim: int  # of the product
    steps: tuple[Step, ...]  # after the product, the bias last

    @property
    def operand(self) -> Any:
        """The variable that is broadcast over the rows and added."""
        return self.steps[-1].operand

    def change(self, site: Site, error: jax.Array, read: Callable) -> jax.Array:
        """The change of the operand that cancels a mean error (B, out) of the product. `read` returns fixed values."""
        x = -site.layout.at_outputs(error, self.ndim)
        for step in self.steps:
            if step.name == "transpose":
                x = x.transpose(step.order)
            elif step.name in ("mul", "div"):
                factor = step.expand(value(step.operand, read)).astype(x.dtype)
                x = x * factor if step.name == "mul" else x / factor
        return self.steps[-1].collapse(x if self.steps[-1].name == "add" else -x)


def find_biases(program: Program, sites: list[Site], trainable: list[bool]) -> dict[int, Bias]:
    """The bias of each site that has its own, by the index of the product."""
    affine = Affine(program)
    found = {site.index: bias for site in sites if (bias := _bias(affine, site, trainable)) is not None}
    by_index = {site.index: site for site in sites}
    found = {i: bias for i, bias in found.items() if all(_same(bias, found.get(j)) for j in by_index[i].shares)}
    claims = collections.Counter(bias.leaf for bias in found.values())
    sizes = collections.Counter()
    for i, bias in found.items():
        sizes[bias.leaf] += bias.operand.aval.size if i == by_index[i].first else 0
    own = lambda leaf: affine.uses[leaf] == claims[leaf] and sizes[leaf] <= program.params[leaf].aval.size
    return {index: bias for index, bias in found.items() if own(bias.leaf)}


@functools.partial(jax.jit, static_argnames="laned")
def mean_error(means, W, q, exponent, laned):
    """The mean error of each neuron (B, out), and the energy of its mean over all rows, in the unit of `Info`.

    `laned`: whether the means, and whether q have lanes.
    """

    def one(W, means, q, exponent):
        mean_X, mean_Xq, rows = means
        mean = lambda x, W: matmul(x[:, None], W)[:, 0]
        exact = mean(mean_X, W)
        return mean(mean_Xq, q) - exact, jnp.sum(rows[:, None] * reduced(exact, exponent) ** 2)

    return over_lanes(one, (W, means, q, exponent), (False, *laned, laned[1]))


def _same(bias, other):
    """True if two products with one matrix also have the same bias, after the same steps."""
    by = lambda bias: [(step.name, step.order, step.operand) for step in bias.steps]
    return other is not None and (bias.leaf, bias.chain, by(bias)) == (other.leaf, other.chain, by(other))


def _bias(affine, site, trainable):
    steps = affine.steps(site)
    for i, step in enumerate(steps):
        origin = affine.parameter(step.operand) if step.name in ("add", "sub") and step.per_neuron else None
        if origin is not None and trainable[origin[0]]:
            leaf, chain = origin
            ndim = affine.program.equations[site.index].outvars[0].aval.ndim
            return Bias(leaf, affine.program.paths[leaf], chain, ndim, tuple(steps[: i + 1]))
    return None

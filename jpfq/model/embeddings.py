"""Embeddings: parameters of which a model reads rows, at integers that are data; a product with all rows may use them, too.

A row is treated as a neuron: the table is a matrix (in, out) of features by rows, the weight of that product, x E^T.
"""

import dataclasses
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..matrix.arrays import at_least_float32
from ..matrix.layout import DotLayout
from .program import Program
from .sites import CASTS, Chain, Finder, Lookup, Site

KEPT = CASTS | {"copy", "copy_p", "stop_gradient", "sharding_constraint", "device_put", "optimization_barrier"}


@dataclasses.dataclass(frozen=True, eq=False)
class Embedding:
    """A parameter whose rows are looked up, and how it is a matrix of features by rows."""

    path: str
    leaf: int  # index of the parameter
    layout: DotLayout  # of the parameter
    lookups: tuple[Lookup, ...]
    products: tuple[Site, ...]  # with all rows, if it is tied
    chain: Chain = dataclasses.field(default_factory=Chain)  # the parameter itself is the operand of `layout`

    @property
    def reason(self) -> str:
        """The reason why it is left, unless a rule names it."""
        kind = "tied: an embedding that a product uses too" if self.products else "an embedding"
        return f"{kind}; add Rule({re.escape(self.path)!r}, bits=8)"

    @property
    def operands(self) -> set:
        """The variables by which the program reads it."""
        return {lookup.table for lookup in self.lookups} | {site.weight for site in self.products}

    def values(self, leaf: jax.Array) -> Iterator[tuple[Any, jax.Array]]:
        """Each of these variables with its value, from the parameter."""
        chains = {lookup.table: lookup.chain for lookup in self.lookups}
        chains |= {site.weight: site.chain for site in self.products}
        return ((variable, chain(leaf)) for variable, chain in chains.items())

    def matrices(self, leaf: jax.Array) -> jax.Array:
        """The parameter as a matrix (1, features, rows), in float32 or wider."""
        return at_least_float32(self.layout.matrices(jnp.asarray(leaf)))


def find_all(program: Program) -> tuple[list[Site], dict[str, str], list[Embedding]]:
    """The sites of a program, the reason for each kernel that is none of them, by path, and the embeddings among those."""
    finder = Finder(program)
    sites, reasons = finder.finish()
    found = [_embedding(finder, leaf) for leaf in finder.lookups]
    embeddings = [embedding for embedding in found if embedding is not None]
    return sites, reasons | {embedding.path: embedding.reason for embedding in embeddings}, embeddings


def _embedding(finder: Finder, leaf: int) -> Embedding | None:
    """The embedding that a parameter is, if all its uses read the same rows."""
    variable, lookups = finder.program.params[leaf], finder.lookups[leaf]
    shape, dtype = variable.aval.shape, variable.aval.dtype
    known = [lookup for lookup in lookups if lookup is not None]
    other = finder.uses[leaf] != {"gather"} or leaf in finder.refused or len(known) < len(lookups)
    if other or len(shape) < 2 or not jnp.issubdtype(dtype, jnp.floating):
        return None
    orders = [_axes(lookup.chain, len(shape)) for lookup in known]
    axes = {None if order is None else order[lookup.axis] for order, lookup in zip(orders, known, strict=True)}
    if len(axes) > 1 or None in axes:
        return None
    (axis,) = axes
    features = tuple(i for i in range(len(shape)) if i != axis)
    products = tuple(site for site in finder.sites if site.leaf == leaf)
    if any(not _reads_rows(site, features) for site in products):
        return None
    layout = DotLayout(shape, features, (), tuple(range(1, len(shape))), (), False)
    return Embedding(finder.program.paths[leaf], leaf, layout, tuple(known), products)


def _axes(chain: Chain, ndim: int) -> tuple[int, ...] | None:
    """The axis of the parameter for each axis of the operand; None if the chain does more than to cast and transpose."""
    order: Sequence[int] = range(ndim)
    for eqn, _ in chain.steps:
        if eqn.primitive.name == "transpose":
            order = [order[i] for i in eqn.params["permutation"]]
        elif eqn.primitive.name not in KEPT or not jnp.issubdtype(eqn.outvars[0].aval.dtype, jnp.floating):
            return None
    return tuple(order)


def _reads_rows(site: Site, features: tuple[int, ...]) -> bool:
    """True if a product contracts the features of a table, in their order, with every row."""
    layout = site.layout
    if not isinstance(layout, DotLayout) or layout.batch:
        return False
    order = _axes(site.chain, len(layout.shape))
    return order is not None and tuple(order[i] for i in layout.contract) == features

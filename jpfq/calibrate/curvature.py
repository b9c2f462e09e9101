"""Curvature: the influence of each layer's output on the outputs of the network, by backward passes in float."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp

from ..matrix.arrays import at_least_float32
from ..model.affine import rows_of
from ..model.compat import bind
from ..model.program import Program, evaluate
from ..model.sites import Site
from ..scalar.grid import Number
from ..scalar.predicates import is_count, may_be
from ..scalar.pytree import register_dataclass
from .row_weights import of_outputs


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Coupling:
    """Neurons of a layer compensate for each other's errors, where the network's outputs do not tell them apart.

    Blocks of neurons are quantized one after the other. The target of each block compensates for the errors of the blocks
    before it, as far as the network's outputs are concerned; derivatives of the float network on the calibration data say
    how far. This raises the error of the layer's own output and lowers that of the network's, for language models most. It
    takes one backward pass per draw and batch, and a matrix (out, out) for each layer. matrix/coupling.py has the
    mathematics and its sources.

    Args:
        of: the loss that counts. "logits": the likelihood, for a classifier or language model with categories on the last
            axis. "outputs": the square error of any outputs.
        block: neurons per block. Smaller blocks give better codes and take longer.
        samples: random draws per batch.
        damping: added to the curvature's diagonal, as a share of its mean.

    Examples:
        >>> rule = jpfq.Rule(".*", bits=4, coupling=jpfq.Coupling(of="logits"))
    """

    of: Literal["logits", "outputs"] = dataclasses.field(default="outputs", metadata={"static": True})
    block: int = dataclasses.field(default=16, metadata={"static": True})
    samples: int = dataclasses.field(default=4, metadata={"static": True})
    damping: Number = 0.003

    @property
    def measured(self) -> tuple[str, int]:
        """The kind and number of draws. Sites that agree in both are measured together."""
        return self.of, self.samples

    def __post_init__(self):
        if self.of not in ("logits", "outputs"):
            raise ValueError(f"Coupling: of is 'logits' or 'outputs'; got {self.of!r}.")
        for name in ("block", "samples"):
            if not is_count(value := getattr(self, name)):
                raise ValueError(f"Coupling: {name} is an integer of at least 1; got {value!r}.")
        if not may_be(self.damping, lambda x: x > 0):
            raise ValueError(f"Coupling: damping is a positive number; got {self.damping!r}.")


def derivatives(program: Program, leaves, batch, sites: Sequence[Site], cotangents: Callable) -> dict[int, jax.Array]:
    """The derivatives of <outputs, cotangents(outputs)> by the output of each product (rows, B, out), by its index.

    Args:
        cotangents: maps the floating outputs to their cotangents.
    """

    def forward(shifts):
        shifted = lambda index, out: [out[0] + shifts[index]] if index in shifts else out
        outputs = evaluate(program, leaves, batch, lambda index, eqn, values: shifted(index, bind(eqn, values)))
        return [y for y in outputs if jnp.issubdtype(jnp.result_type(y), jnp.floating)]

    avals = {site.index: program.equations[site.index].outvars[0].aval for site in sites}
    outputs, back = jax.vjp(forward, {index: jnp.zeros(a.shape, a.dtype) for index, a in avals.items()})
    (found,) = back(cotangents(outputs))
    return {site.index: _by_rows(site, at_least_float32(found[site.index])) for site in sites}


def signs(key: jax.Array, outputs: list[jax.Array]) -> list[jax.Array]:
    """Random signs as cotangents: the expected square of the derivative is then a sum over all outputs."""
    keys = jax.random.split(key, len(outputs))
    return [jax.random.rademacher(k, y.shape, y.dtype) for k, y in zip(keys, outputs, strict=True)]


def labels(key: jax.Array, outputs: list[jax.Array]) -> list[jax.Array]:
    """The derivatives of -log p of random labels, drawn from the distribution that the outputs are the logits of."""

    def surprise(key, y):
        drawn = jax.nn.one_hot(jax.random.categorical(key, y), y.shape[-1], dtype=y.dtype)
        return jax.nn.softmax(y) - drawn

    return [surprise(k, y) for k, y in zip(jax.random.split(key, len(outputs)), outputs, strict=True)]


def _by_rows(site, g):
    B, _, out = site.layout.dims
    rows = sorted(rows_of(site.layout, g.ndim))
    return jnp.moveaxis(g, rows, range(len(rows))).reshape(-1, B, out)


def curvatures(
    program: Program,
    leaves,
    batches: Sequence,
    weights: Sequence,
    sites: dict[int, Site],
    couplings: dict,
    key: jax.Array,
) -> dict[int, jax.Array]:
    """The curvature F (B, out, out) of sites, by their index, summed over batches and draws.

    Args:
        weights: of the rows of each batch, by leaf, or None.
        couplings: by the same indices.
    """
    total: dict = {}
    counted = of_outputs(program, leaves, batches, weights)
    for of, samples in sorted({c.measured for c in couplings.values()}):
        chosen = {i: sites[i] for i, c in couplings.items() if c.measured == (of, samples)}
        draw = labels if of == "logits" else signs

        @jax.jit
        def squares(leaves, batch, weight, key, chosen=chosen, draw=draw, samples=samples):
            def one(key):
                weighted = lambda outputs: weigh(draw(key, outputs), weight)
                found = derivatives(program, leaves, batch, list(chosen.values()), weighted)
                square = lambda g: jnp.einsum("rbo,rbp->bop", g, g, precision="highest")
                return {i: square(found[site.index]) for i, site in chosen.items()}

            keys = jax.random.split(key, samples)
            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(one, keys[0]))
            return jax.lax.scan(lambda total, key: (jax.tree.map(jnp.add, total, one(key)), None), zeros, keys)[0]

        for index, (batch, weight) in enumerate(zip(batches, counted, strict=True)):
            found = squares(list(leaves), list(batch), weight, jax.random.fold_in(key, index))
            total |= {i: F if i not in total else total[i] + F for i, F in found.items()}
    return total


def weigh(cotangents: list[jax.Array], weights: list | None) -> list[jax.Array]:
    """Multiplies the cotangents of the floating outputs by the square roots of these outputs' weights."""
    if weights is None:
        return cotangents
    times = lambda c, w: c if w is None else jnp.where(w > 0, c * jnp.sqrt(w).astype(c.dtype), 0)
    return [times(c, w) for c, w in zip(cotangents, weights, strict=True)]

"""How good a quantized network is: its score, and how far its outputs are from those of the float network."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..matrix.automatic import automatic, runs_anywhere
from ..matrix.gram import at_least_float32
from ..network import Quantized, Weighted
from ..network.apply import run
from ..network.mesh import on_auto_axes
from .compare import Subject


@runs_anywhere
def evaluate(subject: Subject, quantized: Quantized) -> dict[str, Any]:
    """Figures of a quantized network of a subject.

    float_score, score: what `evaluate` says of the float network and of the quantized weights; None where nobody scores. It
        is given parameters or a model, so that it does not see inputs of layers being rounded.
    weights_error: relative error of the outputs on the batches, as `Quantized.output_error`, with quantized weights alone;
        None where no output is of floating numbers.
    output_error: likewise with the inputs of layers rounded too, as `quantized.apply` does; the same where there are none.
    """
    functional = on_auto_axes(subject.functional)
    outputs = jax.jit(functools.partial(run, dataclasses.replace(functional, leaves=())))
    weights, whole = 0.0, 0.0
    leaves, new, inputs = functional.leaves, quantized._functional.leaves, quantized.inputs
    for batch in subject.batches:
        batch = jax.tree.map(automatic, batch.batch if isinstance(batch, Weighted) else batch)
        exact, made = outputs(leaves, {}, batch), outputs(new, {}, batch)
        weights += _squares(exact, made)
        whole += _squares(exact, outputs(new, inputs, batch)) if inputs else _squares(exact, made)
    return {
        "float_score": subject.score(),
        "score": subject.score(quantized),
        "weights_error": _relative(weights),
        "output_error": _relative(whole),
        "inputs_rounded": len(quantized.inputs),
    }


def _squares(exact, made):
    """Square error and energy (outputs, 2) of the outputs that are floating numbers."""
    pairs = zip(jax.tree.leaves(exact), jax.tree.leaves(made), strict=True)
    pairs = [(a, b) for a, b in pairs if jnp.issubdtype(a.dtype, jnp.floating)]
    found = [[jnp.sum((x - y) ** 2), jnp.sum(x**2)] for x, y in (map(at_least_float32, pair) for pair in pairs)]
    return np.asarray(found, float).reshape(-1, 2)


def _relative(squares):
    """The largest relative error."""
    energetic = squares[squares[:, 1] > 0]
    return float(np.sqrt(energetic[:, 0] / energetic[:, 1]).max()) if len(energetic) else None

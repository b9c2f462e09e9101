"""How good a quantized network is: its score, and how far its outputs are from those of the float network."""

import dataclasses
import functools
import operator
from typing import Any

import jax

from ..matrix.automatic import automatic, context
from ..network import Quantized, Weighted
from ..network.apply import run
from ..network.outputs import Comparison, OutputError
from .compare import Subject


def evaluate(subject: Subject, quantized: Quantized) -> dict[str, Any]:
    """Figures of a quantized network of a subject.

    float_score, score: what `evaluate` says of the float network and of the quantized weights; None where nobody scores. It
        is given parameters or a model, so that it does not see inputs of layers being rounded.
    weights_error: relative error of the outputs on the batches, as `Quantized.output_error`, with quantized weights alone;
        None where there is none, and nan where outputs are unmatched.
    output_error: likewise with the inputs of layers rounded too, as `quantized.apply` does; the same where there are none.
    weights_unmatched, output_unmatched: how many outputs are NaN or infinite in one of the networks only.
    """
    functional = subject.functional
    outputs = jax.jit(functools.partial(run, dataclasses.replace(functional, leaves=())))
    weights, whole = [], []
    with context():
        inputs = jax.tree.map(automatic, quantized.inputs)
        leaves, new = (tuple(map(automatic, x)) for x in (functional.leaves, quantized._functional.leaves))
        for batch in subject.batches:
            batch = jax.tree.map(automatic, batch.batch if isinstance(batch, Weighted) else batch)
            exact, made = outputs(leaves, {}, batch), outputs(new, {}, batch)
            weights.append(_compared(exact, made))
            whole.append(_compared(exact, outputs(new, inputs, batch)) if inputs else weights[-1])
    weights, whole = (functools.reduce(operator.add, parts).error.whole for parts in (weights, whole))
    return {
        "float_score": subject.score(),
        "score": subject.score(quantized),
        "weights_error": _figure(weights),
        "output_error": _figure(whole),
        "weights_unmatched": weights.unmatched,
        "output_unmatched": whole.unmatched,
        "inputs_rounded": len(quantized.inputs),
    }


def _compared(exact, made) -> Comparison:
    return Comparison.of(jax.tree.leaves(exact), jax.tree.leaves(made))


def _figure(outputs: OutputError) -> float | None:
    """The error of all outputs; None where there is none to tell."""
    return outputs.figure if outputs.unmatched or outputs.error == outputs.error else None

"""Evaluates a quantized network: its score, and the error of its outputs against those of the float network."""

import dataclasses
import functools
import operator
from typing import Any

import jax

from ..calibrate.batches import Weighted, read_batches
from ..calibrate.output_error import Comparison, OutputError
from ..calibrate.row_weights import RowWeights
from ..matrix.explicit_mesh import automatic, runs_anywhere
from ..model.mesh import on_auto_axes
from ..model.program import trace
from ..network.apply import run
from ..network.quantized import Quantized
from .compare import Subject


@runs_anywhere
def evaluate(subject: Subject, quantized: Quantized) -> dict[str, Any]:
    """Metrics of a quantized network.

    float_score, score: the scores of the float network and of the quantized weights; None without `evaluate`. It takes
        parameters or a model, so that quantized activations do not affect it.
    weights_error: relative error of the outputs on the batches, as in `Quantized.output_error`, with quantized weights
        alone; None if there is nothing to compare, and nan if outputs are unmatched.
    output_error: the same with quantized activations too, as in `quantized.apply`.
    weights_unmatched, output_unmatched: the number of outputs that are NaN or infinite in one of the networks only.
    inputs_rounded: the number of kernels with quantized inputs.
    """
    functional = on_auto_axes(subject.functional)
    outputs = jax.jit(functools.partial(run, dataclasses.replace(functional, leaves=())))
    weights, whole = [], []
    leaves, new, inputs = functional.leaves, quantized._functional.leaves, quantized.inputs
    for batch in subject.batches:
        counted = None
        if isinstance(batch, Weighted):
            batch, counted = _counted(functional, batch)
        batch = jax.tree.map(automatic, batch)
        exact, made = outputs(leaves, {}, batch), outputs(new, {}, batch)
        weights.append(_compared(exact, made, counted))
        whole.append(_compared(exact, outputs(new, inputs, batch), counted) if inputs else weights[-1])
    weights, whole = (functools.reduce(operator.add, parts).error.overall for parts in (weights, whole))
    return {
        "float_score": subject.score(),
        "score": subject.score(quantized),
        "weights_error": _error(weights),
        "output_error": _error(whole),
        "weights_unmatched": weights.unmatched,
        "output_unmatched": whole.unmatched,
        "inputs_rounded": len(quantized.inputs.keys() & quantized.tensors.keys()),
    }


def _counted(functional, weighted):
    """The batch without its weights, and the weights of each output; None if all count."""
    (group,) = read_batches([weighted])
    if group.weights[0] is None:
        return group.example, None
    program = trace(functional.fn, functional.paths, functional.leaves, group.example)
    followed = RowWeights(program, program.outputs)(functional.leaves, group.leaves[0], group.weights[0])
    return group.example, [followed.of_output(v) for v in program.outputs]


def _compared(exact, made, counted) -> Comparison:
    return Comparison.of(jax.tree.leaves(exact), jax.tree.leaves(made), (), counted)


def _error(outputs: OutputError) -> float | None:
    """The error of all outputs; None if there is nothing to compare."""
    return outputs.error_or_nan if outputs.unmatched or outputs.error == outputs.error else None

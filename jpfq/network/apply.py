"""Runs the quantized network: with its stored weights, rounding the inputs of layers."""

from typing import Any

import jax

from ..calibrate.activation import ActivationQuantizer
from ..model.compat import bind
from ..model.functional import Functional
from ..model.operands import rounded_operands
from ..model.program import evaluate, trace
from ..model.sites import find_sites


def run(functional: Functional, leaves, inputs: dict[str, list[ActivationQuantizer]], batch: Any) -> Any:
    """The model's outputs for a batch, with the inputs of the kernels, and the operands, in `inputs` rounded.

    Pure, and meant to be compiled: the model is traced for the shapes of the batch.
    """
    program = trace(functional.fn, functional.paths, leaves, batch)
    kernels = find_sites(program)[0]
    sites = [site for site in kernels if site.path in inputs]
    rounded = {site.index: (site.data, inputs[site.path][site.use]) for site in sites}
    operands = rounded_operands(functional, program, kernels, inputs)

    def visit(index, eqn, values):
        if index in rounded:
            data, rounding = rounded[index]
            values = [rounding(x) if v is data else x for v, x in zip(eqn.invars, values, strict=True)]
        if operands:
            values = [operands[index, i](x) if (index, i) in operands else x for i, x in enumerate(values)]
        return bind(eqn, values)

    return program.tree.unflatten(evaluate(program, leaves, jax.tree.leaves(batch), visit))

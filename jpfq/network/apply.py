"""The quantized network at work: weights as they are stored, inputs of layers rounded on the way."""

import collections
from typing import Any

import jax

from .activation import Rounded
from .compat import bind, is_literal
from .functional import Functional
from .program import trace
from .sites import find_sites


def run(functional: Functional, leaves, inputs: dict[str, list[Rounded]], batch: Any) -> Any:
    """The model's outputs for a batch, with the inputs of the kernels in `inputs` rounded.

    Pure, and to be compiled: the model is traced for the shapes of the batch.
    """
    program = trace(functional.fn, functional.paths, leaves, batch)
    uses: collections.Counter = collections.Counter()
    rounded = {}
    for site in sorted(find_sites(program)[0], key=lambda site: site.index):
        if site.path in inputs:
            rounded[site.index] = site.data, inputs[site.path][uses[site.path]]
            uses[site.path] += 1
    env = dict(program.constants) | dict(zip(program.params, leaves, strict=True))
    env.update(zip(program.inputs, jax.tree.leaves(batch), strict=True))
    for index, eqn in enumerate(program.equations):
        data, rounding = rounded.get(index, (None, None))
        values = [v.val if is_literal(v) else rounding(env[v]) if v is data else env[v] for v in eqn.invars]
        env.update(zip(eqn.outvars, bind(eqn, values), strict=True))
        for v in [v for v in eqn.invars if not is_literal(v) and program.last_use[v] == index]:
            env.pop(v, None)
    return program.tree.unflatten([v.val if is_literal(v) else env[v] for v in program.outputs])

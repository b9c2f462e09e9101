"""A model as a Program: one flat list of equations over its parameters and one batch.

The model is traced once. Evaluating the trace a second time under `jax.make_jaxpr` inlines calls (jit, remat, custom
derivatives), unrolls scans over stacked layers, merges equal equations and drops dead ones. The result contains every matrix
product of the model as an equation; sites.py finds those with weights.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .canonical import by_code, canonical, segment
from .compat import PRODUCTS, bind, call_body, inner_jaxprs, is_literal, opened, scan_arity
from .randomness import check_random_keys

UNROLL = 1024  # the longest stack of layers that is unrolled


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """Flat equations from parameters and inputs to outputs.

    A variable or equation is *fixed* if it depends on parameters and constants alone, not on data.
    """

    equations: tuple
    paths: tuple[str, ...]  # of the parameters
    params: tuple  # their variables, one per path
    inputs: tuple  # variables of the leaves of a batch
    outputs: tuple  # variables or literals
    constants: dict  # variable -> value
    tree: Any  # structure of the outputs
    fixed: frozenset  # variables
    broadcasts: dict  # fixed variables that only broadcast another for use with data -> their equation; never stored
    last_use: dict  # variable -> index of the last equation that reads it; len(equations) for outputs

    def is_fixed(self, eqn) -> bool:
        """True if an equation depends on parameters and constants alone."""
        return all(is_literal(v) or v in self.fixed for v in eqn.invars)

    def reordered(self, order: Sequence[int]) -> "Program":
        """The same program with its equations in another valid order."""
        equations = tuple(self.equations[i] for i in order)
        last_use = _last_use(equations, self.outputs, self.broadcasts)
        return dataclasses.replace(self, equations=equations, last_use=last_use)


def trace(fn: Callable, paths: Sequence[str], params: Sequence, batch: Any) -> Program:
    """The program of `fn(params, batch)`.

    Args:
        fn: a function of a list of parameter leaves and a batch.
        paths: a name for each leaf.
        params: the leaves, or their `jax.ShapeDtypeStruct`s.
        batch: a pytree of arrays or their `jax.ShapeDtypeStruct`s.
    """
    leaves, batch_tree = jax.tree.flatten(batch)
    tree: list = []

    def flat(params, leaves):
        out, structure = jax.tree.flatten(fn(params, jax.tree.unflatten(batch_tree, leaves)))
        tree.append(structure)
        return out

    closed = jax.make_jaxpr(flat)(list(params), leaves)

    def inlined(params, leaves):
        fixed = [True] * len(params) + [False] * len(leaves)
        return _Inliner().run(closed, [*params, *leaves], fixed)[0]

    jaxpr, constants = opened(jax.make_jaxpr(inlined)(list(params), leaves))
    equations = _live(jaxpr)
    keys = {v: path for v, path in zip(jaxpr.invars, paths) if _may_seed(v.aval.dtype)}
    check_random_keys(equations, keys, jaxpr.invars[len(paths) :])
    variables = dict(zip(jaxpr.constvars, constants, strict=True))
    parameters, inputs = tuple(jaxpr.invars[: len(paths)]), tuple(jaxpr.invars[len(paths) :])
    fixed = {*parameters, *variables}
    for eqn in equations:
        if all(is_literal(v) or v in fixed for v in eqn.invars):
            fixed.update(eqn.outvars)
    broadcasts = _broadcasts(equations, fixed, jaxpr.outvars)
    return Program(
        tuple(equations),
        tuple(paths),
        parameters,
        inputs,
        tuple(jaxpr.outvars),
        variables,
        tree[0],
        frozenset(fixed),
        broadcasts,
        _last_use(equations, jaxpr.outvars, broadcasts),
    )


def trace_twice(fn: Callable, paths: Sequence[str], params: Sequence, batch: Any) -> Program:
    """`trace`, which raises if a second trace gives another program.

    A `pure_callback` of a function that is created anew each time, such as a lambda, counts as the same if its code and its
    captured values are the same.
    """
    program = trace(fn, paths, params, batch)
    again = trace(lambda *args: fn(*args), paths, params, batch)  # a new function object, as JAX caches traces
    if form(program) != form(again) and by_code(form(program)) != by_code(form(again)):
        raise ValueError(
            "Tracing the model twice gives two different programs, so the float and the quantized network would differ. It "
            "may draw random numbers outside of JAX, or keep state in Python. Make it a function of its parameters and "
            "inputs alone."
        )
    return program


def form(program: Program) -> Any:
    """A hashable key, equal for programs that compute the same."""
    inputs = [*program.constants, *program.params, *program.inputs]
    outputs = [v for v in program.outputs if not is_literal(v)]
    written = [np.asarray(v.val) if is_literal(v) else None for v in program.outputs]
    return segment(list(program.equations), inputs, outputs), canonical([*program.constants.values(), written])


def evaluate(program: Program, leaves: Sequence, inputs: Sequence, visit: Callable | None = None) -> list:
    """Evaluates a program, freeing each value after its last use. Pure, and meant to be compiled.

    Args:
        leaves: the parameters.
        inputs: the leaves of a batch.
        visit: computes the outputs of an equation from (index, equation, values of its operands); None evaluates it as is.
    """
    env = dict(program.constants) | dict(zip(program.params, leaves, strict=True))
    env.update(zip(program.inputs, inputs, strict=True))
    read = lambda v: v.val if is_literal(v) else env[v] if v in env else env[v.source]  # a tap reads its source
    for index, eqn in enumerate(program.equations):
        values = [read(v) for v in eqn.invars]
        out = bind(eqn, values) if visit is None else visit(index, eqn, values)
        env.update(zip(eqn.outvars, out, strict=True))
        for v in [v for v in eqn.invars if not is_literal(v) and program.last_use[v] == index]:
            env.pop(v, None)
    return [read(v) for v in program.outputs]


def has_product(jaxpr: Any) -> bool:
    """True if a jaxpr holds a matrix product, at any depth."""
    equations = opened(jaxpr)[0].eqns
    return any(e.primitive.name in PRODUCTS or any(map(has_product, inner_jaxprs(e))) for e in equations)


class _Inliner:
    """Evaluates a jaxpr under an outer trace, descending into calls and stacks of layers, and equal equations only once."""

    def __init__(self):
        self.seen: dict = {}  # equation and identity of its inputs -> (outputs, inputs kept alive)

    def run(self, body: Any, args: list, fixed: list[bool]) -> tuple[list, list[bool]]:
        """The outputs of a jaxpr, and whether each depends on fixed arguments alone."""
        jaxpr, constants = opened(body)
        env = dict(zip(jaxpr.constvars, constants, strict=True)) | dict(zip(jaxpr.invars, args, strict=True))
        known = set(jaxpr.constvars) | {v for v, f in zip(jaxpr.invars, fixed, strict=True) if f}
        read = lambda v: v.val if is_literal(v) else env[v]
        is_fixed = lambda v: is_literal(v) or v in known
        for eqn in jaxpr.eqns:
            values, flags = [read(v) for v in eqn.invars], [is_fixed(v) for v in eqn.invars]
            called = call_body(eqn)
            if called is not None:
                out, flags = self.run(called, values, flags)
            elif eqn.primitive.name == "scan" and _stacks_layers(eqn, flags):
                out, flags = self.unroll(eqn, values, flags)
            else:
                out, flags = self.once(eqn, values), [all(flags)] * len(eqn.outvars)
            env.update(zip(eqn.outvars, out, strict=True))
            known.update(v for v, f in zip(eqn.outvars, flags, strict=True) if f)
        return [read(v) for v in jaxpr.outvars], [is_fixed(v) for v in jaxpr.outvars]

    def once(self, eqn, values):
        """The outputs of an equation, or those of an equal one evaluated before."""
        if eqn.effects:
            return bind(eqn, values)
        identity = tuple(id(v) if isinstance(v, jax.Array) else canonical(v) for v in values)
        key = (canonical(eqn), identity)
        if key not in self.seen:
            self.seen[key] = bind(eqn, values), values
        return self.seen[key][0]

    def unroll(self, eqn, values, fixed):
        """The outputs of a scan, evaluated one layer after the other."""
        constants, carries = scan_arity(eqn)
        length, backwards = eqn.params["length"], eqn.params["reverse"]
        first = constants + carries
        state, flags, stacked = values[constants:first], fixed[constants:first], []
        for i in reversed(range(length)) if backwards else range(length):
            slices = [_entry(x, i) for x in values[first:]]
            arguments = [*values[:constants], *state, *slices]
            out, out_flags = self.run(eqn.params["jaxpr"], arguments, [*fixed[:constants], *flags, *fixed[first:]])
            state, flags = out[:carries], [a and b for a, b in zip(flags, out_flags[:carries], strict=True)]
            stacked.append(out[carries:])
        if backwards:
            stacked.reverse()
        stack = lambda column: lax.concatenate([lax.expand_dims(y, (0,)) for y in column], 0)
        outputs = [*state, *map(stack, zip(*stacked, strict=True))]
        return outputs, flags + [False] * (len(outputs) - carries)


def _stacks_layers(eqn, fixed):
    """True if a scan runs over parameters, and so is a stack of layers rather than a loop over time."""
    constants, carries = scan_arity(eqn)
    return any(fixed[constants + carries :]) and eqn.params["length"] <= UNROLL and has_product(eqn.params["jaxpr"])


def _entry(x, i):
    """x[i], with the index as data, so that all entries of a stack share one compiled slice."""
    start = (np.int32(i), *[np.int32(0)] * (x.ndim - 1))
    return lax.squeeze(lax.dynamic_slice(x, start, (1, *x.shape[1:])), (0,))


def _live(jaxpr):
    """The equations that outputs or effects depend on."""
    needed = {v for v in jaxpr.outvars if not is_literal(v)}
    live = []
    for eqn in reversed(jaxpr.eqns):
        if eqn.effects or any(v in needed for v in eqn.outvars):
            live.append(eqn)
            needed.update(v for v in eqn.invars if not is_literal(v))
    return live[::-1]


def _broadcasts(equations, fixed, outputs):
    """The fixed variables that are broadcast only for use with data, such as a bias over all rows; in order."""
    found = {}
    for eqn in equations:
        repeats = eqn.primitive.name == "broadcast_in_dim" and len(eqn.invars) == 1
        if repeats and eqn.outvars[0] in fixed and eqn.outvars[0].aval.size > eqn.invars[0].aval.size:
            found[eqn.outvars[0]] = eqn
    for v in outputs:
        if not is_literal(v):
            found.pop(v, None)
    for eqn in reversed(equations):
        if all(v in fixed and v not in found for v in eqn.outvars):
            for v in eqn.invars:
                if not is_literal(v):
                    found.pop(v, None)
    return found


def _last_use(equations, outputs, broadcasts):
    """By variable, the index of the last equation that reads it or a broadcast of it."""
    last_use: dict = {}
    for index, eqn in enumerate(equations):
        last_use.update((v, index) for v in eqn.invars if not is_literal(v))
    last_use.update((v, len(equations)) for v in outputs if not is_literal(v))
    for v, eqn in reversed(broadcasts.items()):
        source = eqn.invars[0]
        if not is_literal(source) and v in last_use:
            last_use[source] = max(last_use[source], last_use[v])
    return last_use


def _may_seed(dtype):
    """True if values of this dtype may be random keys or their counters."""
    return jnp.issubdtype(dtype, jax.dtypes.prng_key) or jnp.issubdtype(dtype, jnp.unsignedinteger)

"""Bias correction: the mean error of a layer's output, moved into the bias that follows.

It is the last coordinate of the recursion, an input that is always 1, whose weight is not rounded: with the inputs centred,
what the other coordinates leave is the mean, and the bias takes it exactly. Between product and bias there may be what a
BatchNorm does, factors and shifts for each neuron.
"""

import collections
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from .compat import is_literal
from .program import Program
from .sites import Chain, Site, is_step


@dataclasses.dataclass(frozen=True, eq=False)
class Bias:
    """Where the mean error of a site can go."""

    leaf: int  # index of the parameter
    path: str
    operand: Any  # the variable that is broadcast and added
    chain: Chain  # from the parameter to it
    axes: tuple[int, ...]  # of the sum, along which the operand lies
    ndim: int  # of the product
    steps: tuple  # what happens to the product before: ("transpose", order), ("mul" or "div", factor)
    sign: int  # -1 where it is subtracted

    def change(self, layout, error: jax.Array, read) -> jax.Array:
        """What to add to the operand against a mean error (B, out) of the product's output."""
        x = -self.sign * layout.at_outputs(error, self.ndim)
        for name, detail in self.steps:
            if name == "transpose":
                x = x.transpose(detail)
            else:
                factor = detail(read).astype(x.dtype)
                x = x * factor if name == "mul" else x / factor
        return x.reshape([x.shape[a] for a in self.axes])


def find_biases(program: Program, sites: list[Site], trainable: list[bool]) -> dict[int, Bias]:
    """The bias of each site that has one of its own, by the index of its product."""
    finder = _Finder(program, trainable)
    found = {site.index: bias for site in sites if (bias := finder.follow(site)) is not None}
    claims = collections.Counter(bias.leaf for bias in found.values())
    sizes = collections.Counter()
    for bias in found.values():
        sizes[bias.leaf] += bias.operand.aval.size
    own = lambda leaf: finder.uses[leaf] == claims[leaf] and sizes[leaf] <= program.params[leaf].aval.size
    return {index: bias for index, bias in found.items() if own(bias.leaf)}


class _Finder:
    def __init__(self, program, trainable):
        self.program, self.trainable = program, trainable
        self.origin: dict = {v: (leaf, Chain()) for leaf, v in enumerate(program.params)}
        self.uses = collections.Counter()  # leaf -> how many equations use it, views aside
        self.consumers = collections.defaultdict(list)
        for eqn in program.equations:
            inputs = [v for v in eqn.invars if not is_literal(v)]
            for v in inputs:
                self.consumers[v].append(eqn)
            views = [v for v in inputs if v in self.origin]
            if views and is_step(eqn):
                leaf, chain = self.origin[eqn.invars[0]]
                steps = ((*chain.steps, (eqn, position)) for position in range(len(eqn.outvars)))
                self.origin.update((out, (leaf, Chain(s))) for out, s in zip(eqn.outvars, steps, strict=True))
            elif views and eqn.outvars[0] in program.broadcasts:
                self.origin[eqn.outvars[0]] = self.origin[views[0]]
            else:
                self.uses.update(self.origin[v][0] for v in views)
        self.outputs = {v for v in program.outputs if not is_literal(v)}
        self.uses.update(self.origin[v][0] for v in self.outputs if v in self.origin)

    def follow(self, site) -> Bias | None:
        """From the product on, as long as each neuron's values are only moved and multiplied."""
        v = self.program.equations[site.index].outvars[0]
        ndim, steps = v.aval.ndim, []
        rows = _rows(site.layout, ndim)  # axes along which all values of a neuron lie
        while len(self.consumers[v]) == 1 and v not in self.outputs:
            (eqn,) = self.consumers[v]
            name = eqn.primitive.name
            if name == "transpose":
                order = tuple(eqn.params["permutation"])
                steps.append(("transpose", order))
                rows = {order.index(a) for a in rows}
            elif name in ("add", "sub", "mul", "div"):
                if not (eqn.invars[0] is v or (name in ("add", "mul") and eqn.invars[1] is v)):
                    return None
                other = eqn.invars[1] if eqn.invars[0] is v else eqn.invars[0]
                operand, axes = self.per_neuron(other, rows)
                if operand is None:
                    return None
                if name in ("mul", "div"):
                    steps.append((name, _Factor(operand, axes, v.aval.ndim)))
                elif self.is_bias(operand, axes, rows, v):
                    leaf, chain = self.origin[operand]
                    path, sign = self.program.paths[leaf], 1 if name == "add" else -1
                    return Bias(leaf, path, operand, chain, axes, ndim, tuple(steps), sign)
            elif name != "convert_element_type":
                return None
            v = eqn.outvars[0]
        return None

    def per_neuron(self, v, rows):
        """What is broadcast over the rows to make a fixed operand, and the axes it lies along; None for anything else."""
        if is_literal(v):
            return (v, ()) if v.aval.ndim == 0 else (None, ())
        if v not in self.program.broadcasts:
            return (v, ()) if v in self.program.fixed and v.aval.ndim == 0 else (None, ())
        eqn = self.program.broadcasts[v]
        operand, axes = eqn.invars[0], tuple(eqn.params["broadcast_dimensions"])
        if any(a in rows and size > 1 for a, size in zip(axes, operand.aval.shape, strict=True)):
            return None, ()
        return operand, axes

    def is_bias(self, operand, axes, rows, v):
        """Whether an operand is a trainable parameter with a number for each neuron."""
        if is_literal(operand) or operand not in self.origin or not self.trainable[self.origin[operand][0]]:
            return False
        neurons = [size for a, size in enumerate(v.aval.shape) if a not in rows]
        return [size for a, size in zip(axes, operand.aval.shape, strict=True) if a not in rows] == neurons


@dataclasses.dataclass(frozen=True)
class _Factor:
    """A fixed operand, to be read and laid along its axes."""

    variable: Any
    axes: tuple[int, ...]
    ndim: int

    def __call__(self, read):
        value = jnp.asarray(self.variable.val) if is_literal(self.variable) else read(self.variable)
        return jnp.expand_dims(value, [a for a in range(self.ndim) if a not in self.axes])


def _rows(layout, ndim):
    """The axes of a product that do not tell neurons apart."""
    shape = jax.eval_shape(
        lambda v: layout.at_outputs(v, ndim), jax.ShapeDtypeStruct(layout.dims[::2], jnp.float32)
    ).shape
    return {a for a, size in enumerate(shape) if size == 1}

"""The affine steps after a product: biases and BatchNorms, which multiply and shift the values of each neuron."""

import collections
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..matrix.layout import Layout
from .compat import is_literal
from .program import Program
from .sites import Chain, Site, is_step


class Step(NamedTuple):
    """One equation after a product."""

    name: str  # "transpose", "add", "sub", "mul" or "div"
    order: tuple[int, ...]  # of a transpose
    operand: Any  # a variable or a literal, before it is broadcast over the rows
    axes: tuple[int, ...]  # the axes of the operand among those of the values
    shape: tuple[int, ...]  # of the values
    rows: frozenset[int]  # axes along which all values belong to one neuron

    @property
    def per_neuron(self) -> bool:
        """True if the operand has one value per neuron."""
        if is_literal(self.operand):
            return False
        size = lambda axes, shape: [n for a, n in zip(axes, shape, strict=True) if a not in self.rows]
        return size(self.axes, self.operand.aval.shape) == size(range(len(self.shape)), self.shape)

    def expand(self, value: jax.Array) -> jax.Array:
        """A value of the operand, with axes of size 1 so that it broadcasts over the product."""
        return jnp.expand_dims(value, [a for a in range(len(self.shape)) if a not in self.axes])

    def collapse(self, x: jax.Array) -> jax.Array:
        """The inverse of `expand`."""
        return x.reshape([x.shape[a] for a in self.axes])


class Affine:
    """The steps after every product of a program, and the parameters they use."""

    def __init__(self, program: Program):
        self.program = program
        self.origin: dict = {v: (leaf, Chain()) for leaf, v in enumerate(program.params)}
        self.uses = collections.Counter()  # leaf -> number of equations that use it, other than views
        self.producers: dict = {}  # fixed variable -> its equation
        self.consumers = collections.defaultdict(list)
        for eqn in program.equations:
            inputs = [v for v in eqn.invars if not is_literal(v)]
            for v in inputs:
                self.consumers[v].append(eqn)
            if program.is_fixed(eqn):
                self.producers.update((v, eqn) for v in eqn.outvars)
            views = [v for v in inputs if v in self.origin]
            if views and is_step(eqn):
                leaf, chain = self.origin[views[0]]
                steps = ((*chain.steps, (eqn, position)) for position in range(len(eqn.outvars)))
                self.origin.update((out, (leaf, Chain(s))) for out, s in zip(eqn.outvars, steps, strict=True))
            elif views and eqn.outvars[0] in program.broadcasts:
                self.origin[eqn.outvars[0]] = self.origin[views[0]]
            else:
                self.uses.update(self.origin[v][0] for v in views)
        self.outputs = {v for v in program.outputs if not is_literal(v)}
        self.uses.update(self.origin[v][0] for v in self.outputs if v in self.origin)

    def parameter(self, v: Any) -> tuple[int, Chain] | None:
        """The parameter that a variable is a view of, and the chain from it; None for anything else."""
        return None if is_literal(v) else self.origin.get(v)

    def steps(self, site: Site) -> list[Step]:
        """The steps after a site's product, in order."""
        v = self.program.equations[site.index].outvars[0]
        rows, steps = rows_of(site.layout, v.aval.ndim), []
        while len(self.consumers[v]) == 1 and v not in self.outputs:
            (eqn,) = self.consumers[v]
            name = eqn.primitive.name
            if name == "transpose":
                order = tuple(eqn.params["permutation"])
                steps.append(Step(name, order, None, (), v.aval.shape, rows))
                rows = frozenset(order.index(a) for a in rows)
            elif name in ("add", "sub", "mul", "div") and (eqn.invars[0] is v or name in ("add", "mul")):
                other = self._over_rows(eqn.invars[1] if eqn.invars[0] is v else eqn.invars[0], rows, v.aval.ndim)
                if other is None:
                    break
                steps.append(Step(name, (), *other, v.aval.shape, rows))
            elif name != "convert_element_type":
                break
            v = eqn.outvars[0]
        return steps

    def _over_rows(self, v, rows, ndim):
        """The value that is broadcast over the rows to a fixed operand, and its axes; None if there is no such value."""
        if is_literal(v) or v in self.program.fixed:
            if v.aval.ndim == 0:
                return v, ()
            if v.aval.ndim == ndim and all(v.aval.shape[a] == 1 for a in rows):
                return v, tuple(range(ndim))
            if not is_literal(v) and v in self.program.broadcasts:
                eqn = self.program.broadcasts[v]
                operand, axes = eqn.invars[0], tuple(eqn.params["broadcast_dimensions"])
                if not any(a in rows and size > 1 for a, size in zip(axes, operand.aval.shape, strict=True)):
                    return operand, axes
        return None


def value(operand: Any, read) -> jax.Array:
    """The value of an operand; `read` returns that of a fixed variable."""
    return jnp.asarray(operand.val) if is_literal(operand) else read(operand)


def rows_of(layout: Layout, ndim: int) -> frozenset[int]:
    """The axes of a product along which all values belong to one neuron."""
    shape = jax.eval_shape(
        lambda v: layout.at_outputs(v, ndim), jax.ShapeDtypeStruct(layout.dims[::2], jnp.float32)
    ).shape
    return frozenset(a for a, size in enumerate(shape) if size == 1)

"""The graph of a program: one node for each equation on data, with the functions that are several equations recognised."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...calibrate.activation import ActivationQuantizer
from ...model.canonical import segment
from ...model.compat import bind, is_literal
from ...model.functional import Functional, from_function
from ...model.operands import rounded_operands
from ...model.program import Program
from ...model.sites import find_sites
from .lowering import lowered
from .nodes import AFFINE, MULTIPLIES, Affine, Apply, Larger, Node, Round, Softmax
from .relaxations import LOGISTIC, NAMED, TANH, Kink

SINGLE = {"tanh": TANH, "logistic": LOGISTIC}
COMPARED = {"ge", "gt", "lt", "le"}
LONGEST = 24  # equations of a function that is recognised
KNOWN = (
    "It knows dense and convolution layers, sums, products with parameters, BatchNorm in inference, ReLU, leaky ReLU, "
    "clips, tanh, sigmoid, GELU, SiLU, ELU, softplus, average and max pooling, and softmax"
)


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """Nodes in order, from the inputs to the outputs."""

    program: Program
    nodes: tuple[Node, ...]
    outputs: tuple  # variables of the nodes; those of the program's outputs
    roundings: tuple[str, ...]  # paths of the kernels whose inputs are rounded, by the index of the quantizer


def graph_of(functional: Functional, inputs: dict[str, list[ActivationQuantizer]], batch: Any) -> tuple[Graph, list]:
    """The graph of a model for a batch of these shapes, and its quantizers of inputs.

    Raises:
        ValueError: an equation that no bounds are known for.
    """
    program = lowered(functional, batch)
    kernels = find_sites(program)[0]
    if rounded_operands(functional, program, kernels, inputs):
        raise ValueError(
            "verify: products of data with data are rounded (products=, cache=), which it has no bounds for."
        )
    sites = {site.index: site for site in kernels if site.path in inputs}
    for site in sites.values():
        if inputs[site.path][site.use].levels is None:
            settings = inputs[site.path][site.use].settings
            raise ValueError(
                f"verify: the inputs of {site.path} are rounded with steps taken while the network runs ({settings}). Their "
                "bounds are known for steps that calibration fixes: per='tensor' or 'channel'."
            )
    builder = _Builder(program, sites)
    for index, eqn in enumerate(program.equations):
        if not program.is_fixed(eqn):
            builder.visit(index, eqn)
    graph = Graph(program, builder.needed(), program.outputs, tuple(site.path for site in sites.values()))
    return graph, [inputs[site.path][site.use] for site in sites.values()]


class _Builder:
    """Turns equations into nodes."""

    def __init__(self, program, sites):
        self.program, self.sites, self.nodes = program, sites, []
        self.producers = {v: (i, eqn) for i, eqn in enumerate(program.equations) for v in eqn.outvars}
        self.deferred: dict = {}  # variables without bounds of their own -> why; they may be parts of a known function
        self.available = set(program.inputs)

    def visit(self, index, eqn):
        data = [v for v in eqn.invars if self.is_data(v)]
        out, name = eqn.outvars[0], eqn.primitive.name
        node = self.single(eqn, data, out, name) or self.leaky(eqn, out, name) or self.named(index, eqn, out)
        if node is None:
            reason = next((self.deferred[v] for v in data if v in self.deferred), None) or _reason(eqn, data)
            self.deferred.update((v, reason) for v in eqn.outvars)
            return
        if index in self.sites:
            node = self.rounded(index, eqn, data[0], out)
        self.nodes.append(node)
        self.available.add(out)

    def is_data(self, v):
        return not is_literal(v) and v not in self.program.fixed

    def single(self, eqn, data, out, name):
        if any(v not in self.available for v in data) or not _floats(out) or not all(map(_floats, data)):
            return None
        if name in ("max", "min"):
            if len(data) == 1:
                other = next(v for v in eqn.invars if v is not data[0])
                if is_literal(other) or other in self.program.constants or self.constant(other):
                    return Apply(Kink(*((0.0, 1.0) if name == "max" else (1.0, 0.0)), other), tuple(data), out)
            elif name == "max" and data[0] is not data[1]:
                return Larger(Kink(0.0, 1.0), tuple(data), out)
            return None
        if name in SINGLE:
            return Apply(SINGLE[name], tuple(data), out)
        if name not in AFFINE or len(eqn.outvars) != 1:
            return None
        if name in MULTIPLIES and (
            len(eqn.invars) != 2 or len(data) != 1 or (name == "div" and eqn.invars[0] is not data[0])
        ):
            return None
        if name in ("select_n", "dynamic_slice", "gather") and self.is_data(eqn.invars[0 if name == "select_n" else 1]):
            return None
        return Affine(eqn, tuple(dict.fromkeys(data)), out)

    def constant(self, v):
        """True if a fixed variable depends on no parameter, so that it is the same in both networks."""
        if v not in self.producers:
            return v in self.program.constants
        return all(is_literal(u) or self.constant(u) for u in self.producers[v][1].invars)

    def leaky(self, eqn, out, name):
        """where(x >= 0, b x, a x)."""
        if name != "select_n" or len(eqn.invars) != 3 or not self.is_data(eqn.invars[0]):
            return None
        compared = self.producers.get(eqn.invars[0], (0, None))[1]
        if compared is None or compared.primitive.name not in COMPARED or not _is_zero(compared.invars[1]):
            return None
        x = compared.invars[0]
        slopes = [self.slope(v, x) for v in eqn.invars[1:]]  # where the comparison is false, and where it is true
        left, right = slopes if compared.primitive.name in ("ge", "gt") else slopes[::-1]
        if x not in self.available or left is None or right is None:
            return None
        return Apply(Kink(left, right), (x,), out)

    def slope(self, v, x):
        """The number that x is multiplied by to give v; None if it is not a multiple."""
        if v is x:
            return 1.0
        if not self.is_data(v):
            return 0.0 if _is_zero(v) or (v in self.producers and _is_zero(self.producers[v][1].invars[0])) else None
        eqn = self.producers.get(v, (0, None))[1]
        if eqn is None or eqn.primitive.name != "mul" or x not in eqn.invars:
            return None
        other = next((u for u in eqn.invars if is_literal(u) and np.ndim(u.val) == 0), None)
        return None if other is None else float(other.val)

    def named(self, index, eqn, out):
        """A function of several equations, which are those of a known function."""
        if not _floats(out):
            return None
        for names, x, equations in self.parts(index, out):
            for name in names:
                if segment(equations, [x], [out]) == _known(name, x.aval.shape, str(x.aval.dtype)):
                    if name.startswith("softmax"):
                        return Softmax(int(name.split()[1]), (x,), out)
                    smooth = dataclasses.replace(NAMED[name], function=_Evaluated(tuple(equations), x, out))
                    return Apply(smooth, (x,), out)
        return None

    def parts(self, index, out):
        """The equations before one, down to each earlier variable of the same shape that all of them start from."""
        names = {
            n: _length(n, out.aval.shape, str(out.aval.dtype))
            for n in (*NAMED, *(f"softmax {i}" for i in range(out.aval.ndim)))
        }
        found: dict[int, Any] = {index: self.program.equations[index]}
        queue = list(self.program.equations[index].invars)
        starts = []
        while queue:
            v = queue.pop()
            if is_literal(v) or v not in self.producers:
                starts += [v] if not is_literal(v) else []
                continue
            i, eqn = self.producers[v]
            if self.is_data(v):
                starts.append(v)
            if i not in found and index - i <= LONGEST:
                found[i] = eqn
                queue += eqn.invars
        for x in dict.fromkeys(starts):
            if self.is_data(x) and x in self.available and x.aval.shape == out.aval.shape and _floats(x):
                equations = self.between(index, x)
                if equations is not None:
                    yield [n for n, count in names.items() if count == len(equations)], x, equations

    def between(self, index, x):
        """The equations that compute the output of one from x alone; None if they read anything else."""
        found, queue = {index: self.program.equations[index]}, [*self.program.equations[index].invars]
        while queue:
            v = queue.pop()
            if v is x or is_literal(v):
                continue
            if v not in self.producers:
                return None
            i, eqn = self.producers[v]
            if i not in found:
                found[i] = eqn
                queue += eqn.invars
            if len(found) > LONGEST:
                return None
        return [found[i] for i in sorted(found)]

    def rounded(self, index, eqn, x, out):
        """The product with its input rounded before."""
        count = sum(isinstance(n, Round) for n in self.nodes)
        tap = _Tap(x)
        self.nodes.append(Round(count, (x,), tap))
        return Affine(eqn.replace(invars=[tap if v is x else v for v in eqn.invars]), (tap,), out)

    def needed(self):
        """The nodes that the outputs depend on; raises where one cannot be computed."""
        for v in self.program.outputs:
            if is_literal(v) or v in self.program.fixed:
                raise ValueError("verify: an output of the model does not depend on its inputs. Return those that do.")
            if v in self.deferred:
                raise ValueError(f"verify: {self.deferred[v]}. {KNOWN}.")
        wanted, kept = set(self.program.outputs), []
        for node in reversed(self.nodes):
            if node.output in wanted:
                kept.append(node)
                wanted.update(node.inputs)
        return tuple(kept[::-1])


class _Tap:
    """The variable of a rounded input."""

    def __init__(self, source):
        self.source, self.aval = source, source.aval


@dataclasses.dataclass(frozen=True, eq=False)
class _Evaluated:
    """The equations of a function, in float64."""

    equations: tuple
    x: Any
    out: Any

    def __call__(self, value):
        env = {self.x: value}
        shape = self.x.aval.shape
        like = lambda v: jnp.asarray(v.val, jnp.float64) if _floats(v) else jnp.asarray(v.val)
        for eqn in self.equations:
            values = [like(v) if is_literal(v) else env[v] for v in eqn.invars]
            if eqn.primitive.name == "broadcast_in_dim":
                env[eqn.outvars[0]] = jnp.broadcast_to(values[0], shape)
                continue
            values = [jnp.broadcast_to(v, value.shape) if v.ndim == 0 else v for v in values]
            env.update(zip(eqn.outvars, bind(eqn, values), strict=True))
        return env[self.out]


@functools.cache
def _traced(name, shape, dtype):
    if name.startswith("softmax"):
        axis = int(name.split()[1])
        f: Callable = lambda x: jax.nn.softmax(x, axis)
    else:
        f = NAMED[name].function
    program = lowered(from_function(lambda params, x: f(x), {}, {}), jax.ShapeDtypeStruct(shape, dtype))
    return list(program.equations), list(program.inputs), list(program.outputs)


def _known(name, shape, dtype):
    return segment(*_traced(name, shape, dtype))


def _length(name, shape, dtype):
    return len(_traced(name, shape, dtype)[0])


def _reason(eqn, data):
    name = eqn.primitive.name
    shapes = " and ".join(str(v.aval) for v in data)
    if name == "convert_element_type" and data:
        return f"it has no bounds for a cast from {data[0].aval.dtype} to {eqn.outvars[0].aval.dtype}"
    if name in MULTIPLIES and len(data) > 1:
        return f"it has no bounds for {name} of data with data ({shapes})"
    return f"it has no bounds for the equation {name} of {shapes}"


def _floats(v):
    return jnp.issubdtype(v.aval.dtype, jnp.floating) and v.aval.dtype.itemsize >= 4


def _is_zero(v):
    return is_literal(v) and np.ndim(v.val) == 0 and float(v.val) == 0

"""Ranges forward, linear bounds backward (CROWN, arXiv 1811.00866, for both networks and their difference at once)."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ...model.compat import bind, is_literal
from ...model.program import form
from .graph import Graph
from .interval import Interval, Pair, Triple, U, gamma, most
from .nodes import Affine, Apply, Fixed, Softmax, wide
from .relaxations import Kink

CACHE = 16  # compiled networks; the least recently used is evicted
ROWS = 256  # bounds that are computed together
OPTIONS = {"xla_backend_optimization_level": 0}  # thousands of small equations: they take longer to compile than to run


class Compiled(NamedTuple):
    """A graph, equal to any other that computes the same."""

    graph: Graph

    def _key(self):
        return form(self.graph.program), self.graph.roundings

    def __hash__(self):
        return hash(self._key())

    def __eq__(self, other):
        return isinstance(other, Compiled) and self._key() == other._key()


class Found(NamedTuple):
    """The ranges of each output, and bounds of margins (classes,) in the two networks, if there are logits."""

    outputs: list[Triple]
    margins: Any = None


@functools.lru_cache(maxsize=CACHE)
def compiled(key: Compiled, linear: bool, margins: bool) -> Callable:
    """`bounds_of`, compiled."""
    run = functools.partial(bounds_of, key.graph, linear, margins)
    return jax.jit(run, static_argnums=5, compiler_options=OPTIONS)


def bounds_of(
    graph: Graph, linear: bool, margins: bool, f_leaves, q_leaves, quantizers, lower, upper, together
) -> Found:
    """The bounds of all boxes.

    Args:
        f_leaves, q_leaves: the parameters of both networks.
        quantizers: those of the rounded inputs.
        lower, upper: the leaves of a batch, with one more axis in front, for boxes: (boxes, 1, ..).
        together: boxes that are bounded at a time.
    """
    fixed = Fixed(_fixed(graph.program, f_leaves), _fixed(graph.program, q_leaves))
    fixed.q.update((i, quantizer.at) for i, quantizer in enumerate(quantizers))
    first = lower[0].reshape(-1)[0]
    apart = _Apart(first < first + 1 + jnp.abs(first))
    one = lambda box: _Engine(graph, fixed, linear, apart).found(box[0], box[1], margins)
    return _mapped(one, (lower, upper), together)


def _fixed(program, leaves):
    """The values of all fixed variables, each in its own type."""
    env = dict(program.constants) | dict(zip(program.params, leaves, strict=True))
    for eqn in program.equations:
        if program.is_fixed(eqn):
            values = [v.val if is_literal(v) else env[v] for v in eqn.invars]
            env.update(zip(eqn.outvars, bind(eqn, values), strict=True))
    return env


class _Apart(NamedTuple):
    """Calls a function in a computation of its own.

    Each end of a range is read several times. Where XLA fuses layers into one loop it computes each of them anew for every
    reader, so that the time would double with every layer. It does not fuse across a branch.
    """

    always: jax.Array  # (), true of all finite data, which the compiler does not know; NaN follows where it is false

    def __call__(self, f: Callable, *args: Any) -> Any:
        shapes = jax.eval_shape(f, *args)
        return lax.cond(
            self.always, f, lambda *args: jax.tree.map(lambda x: jnp.full(x.shape, jnp.nan, x.dtype), shapes), *args
        )


class _Engine:
    """The bounds of one box."""

    def __init__(self, graph: Graph, fixed: Fixed, linear: bool, apart: _Apart):
        self.graph, self.fixed, self.linear, self.apart = graph, fixed, linear, apart
        self.nodes = [_placed(node, fixed.f) for node in graph.nodes]
        self.values: dict = {}  # variable -> Triple
        self.lines: dict = {}  # output of a node that relaxes -> its lines

    def found(self, lower, upper, margins) -> Found:
        """The bounds of all outputs."""
        zero = lambda x: Interval(jnp.zeros_like(x), jnp.zeros_like(x))
        for v, lo, hi in zip(self.graph.program.inputs, lower, upper, strict=True):
            self.values[v] = Triple(Interval(lo, hi), Interval(lo, hi), zero(lo))
        passed = 0
        for i, node in enumerate(self.nodes):
            x = [self.values[v] for v in node.inputs]
            if self.linear and node.relaxes and not isinstance(node, Softmax):
                self.relax(i, node, x, refined=passed > 0)
                x = [self.values[v] for v in node.inputs]
            passed += node.relaxes
            self.values[node.output] = self.apart(lambda x, node=node: node.forward(x, self.fixed), x)
            if isinstance(node, Affine) and self.linear:
                self.lines[node.output] = node.lines(x, self.fixed)
        outputs = list(dict.fromkeys(self.graph.outputs))
        if self.linear:
            for v in outputs:
                self.values[v] = self.refined({v: 1}, self.values[v], len(self.nodes))
        found = Found([self.values[v] for v in self.graph.outputs])
        return found._replace(margins=self.margins(outputs[0])) if margins else found

    def relax(self, i, node, x, refined):
        """Sets the lines of a node, after bounding what it is applied to from the inputs on."""
        if hasattr(node, "argument"):
            argument = node.argument(x)
            if refined:
                signs = dict(zip(node.inputs, node.targets(), strict=True))
                argument = self.refined(signs, argument, i)
                if len(signs) == 1:
                    self.values[node.inputs[0]] = argument
        else:
            argument = x[0]
        self.lines[node.output] = node.lines(argument, self.fixed)

    def refined(self, signs, argument, end) -> Triple:
        """The ranges of a signed sum of variables, met with their linear bounds."""
        shape = argument.f.lo.shape
        size = argument.f.lo.size

        def ends(row):
            unit = jnp.zeros(size).at[row % size].set(1.0).reshape(shape)
            kind, sign = row // size % 3, jnp.where(row < 3 * size, 1.0, -1.0)
            return sign * self.upper({v: _pair(kind, sign * s * unit) for v, s in signs.items()}, end)

        found = _mapped(ends, jnp.arange(6 * size), ROWS).reshape(2, 3, *shape)
        return argument.meet(Triple(*(Interval(found[1, i], found[0, i]) for i in range(3))))

    def upper(self, targets: dict, end: int) -> jax.Array:
        """An upper bound of the sum of F f + Q q over the targets, by the nodes before `end`."""
        pairs, terms = dict(targets), []
        for node in reversed(self.nodes[:end]):
            if node.output not in pairs:
                continue
            out = pairs.pop(node.output)
            x = [self.values[v] for v in node.inputs]
            lines: Any = self.lines.get(node.output)
            found, more = node.backward(out, x, self.values[node.output], self.fixed, lines)
            terms += more
            for v, pair in zip(node.inputs, found, strict=True):
                if v in pairs:
                    pair = pairs[v].plus(pair)
                    terms.append(4 * U * pair.magnitude * self.values[v].largest)
                pairs[v] = pair
        for v, pair in pairs.items():
            box = self.values[v].f  # the input of both networks
            terms.append(most(pair.f + pair.q, *box) + 4 * U * pair.magnitude * box.largest)
        whole = jnp.concatenate([x.reshape(-1) for x in terms])
        return jnp.sum(whole) + 8 * gamma(whole.size) * jnp.sum(jnp.abs(whole))

    def margins(self, v) -> tuple[jax.Array, Interval, Interval]:
        """The class of the largest float logit, and ranges (classes,) of its margins over all: in f and in q."""
        own = self.values[v]
        f, q, d = (jax.tree.map(lambda x: x.reshape(-1), side) for side in own)
        classes = f.lo.size
        label = jnp.argmax(f.lo + f.hi)
        pick = lambda side: Interval(side.lo[label] - side.hi, side.hi[label] - side.lo).wider(4 * U * side.largest)
        f, q, d = pick(f), pick(q), pick(d)
        if self.linear:
            eye = jnp.eye(classes)

            def least(kind, j):
                row = (eye[label] - eye[j]).reshape(own.f.lo.shape)
                return -self.upper({v: _pair(kind, -row)}, len(self.nodes))

            each = jax.vmap(lambda kind: jax.vmap(lambda j: least(kind, j))(jnp.arange(classes)))
            found = each(jnp.arange(3))
            f, q, d = (Interval(jnp.maximum(side.lo, low), side.hi) for side, low in zip((f, q, d), found))
        return label, f, q.meet(f.plus(d))


def _mapped(f, xs, together):
    """f over the first axis, so many at a time; the last ones are repeated to fill up."""
    count = len(jax.tree.leaves(xs)[0])
    together = min(together, count)
    chunks = -(-count // together)
    place = jnp.minimum(jnp.arange(chunks * together), count - 1).reshape(chunks, together)
    parts = jax.tree.map(lambda x: x[place], xs)
    found = jax.vmap(f)(jax.tree.map(lambda x: x[0], parts)) if chunks == 1 else lax.map(jax.vmap(f), parts)
    return found if chunks == 1 else jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:])[:count], found)


def _pair(kind, row):
    """The coefficients of f (0), of q (1), or of q - f (2)."""
    of = lambda *numbers: jnp.array(numbers, jnp.float64)[kind]
    return Pair(of(1, 0, -1) * row, of(0, 1, 1) * row, of(0, 1, 0))


def _placed(node, values):
    """A node with the place of its kink as an array."""
    if not isinstance(node, Apply) or not isinstance(node.activation, Kink):
        return node
    at = node.activation.at
    at = wide(at.val if is_literal(at) else at if isinstance(at, float) else values[at])
    return dataclasses.replace(node, activation=dataclasses.replace(node.activation, at=at))

"""Nodes: what bounds do at each equation. Forward they map ranges to ranges, backward coefficients to coefficients.

Backward, an upper bound of the sum of F f + Q q over the outputs of a node becomes one over its inputs, plus a number.
Affine equations are transposed, each network with its own weights. A function phi of one number is bounded by lines: of
(F + Q) phi(f), and of Q (phi(q) - phi(f)), so that a small difference stays small.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ...model.compat import is_literal
from .interval import Interval, Pair, Triple, U, about, gamma, most
from .lowering import IDENTITIES
from .relaxations import Activation, Relaxed, difference, relaxed

MULTIPLIES = {"dot_general", "conv_general_dilated", "mul", "div"}
AFFINE = MULTIPLIES | {
    "add", "sub", "add_any", "neg", "reshape", "transpose", "squeeze", "expand_dims", "slice", "pad", "concatenate",
    "broadcast_in_dim", "rev", "reduce_sum", "reduce_window_sum", "cumsum", "select_n", "dynamic_slice", "gather",
    "convert_element_type",
} | IDENTITIES  # fmt: skip


class Fixed(NamedTuple):
    """The values of what depends on parameters alone, by variable, in the float and in the quantized network."""

    f: dict
    q: dict


def wide(x: Any) -> jax.Array:
    """A floating value in float64; others unchanged."""
    x = jnp.asarray(x)
    return x.astype(jnp.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x


@dataclasses.dataclass(frozen=True, eq=False)
class Affine:
    """An equation that is affine in its data."""

    eqn: Any
    inputs: tuple  # variables of the data
    output: Any
    relaxes = False

    @property
    def multiplies(self) -> bool:
        """True if it is a product of data with something fixed."""
        return self.eqn.primitive.name in MULTIPLIES

    @property
    def terms(self) -> int:
        """At most so many numbers are summed, in the product or in its transpose."""
        return max(self.output.aval.size, *(v.aval.size for v in self.inputs))

    def fixed(self, values: dict) -> list:
        """The operands that are no data, and None for those that are."""
        data, found = set(self.inputs), []
        for i, v in enumerate(self.eqn.invars):
            if is_literal(v):
                found.append(wide(v.val))
            else:
                found.append(None if v in data else wide(values[v]))
            if self.eqn.primitive.name == "div" and i == 1 and found[i] is not None:
                found[i] = 1 / found[i]
        return found

    def run(self, data: list, fixed: list, absolute: bool = False) -> jax.Array:
        """The equation in float64. Absolute: with all signs positive."""
        of = dict(zip(self.inputs, data, strict=True))
        values = [of[v] if w is None else w for v, w in zip(self.eqn.invars, fixed, strict=True)]
        name, p = self.eqn.primitive.name, dict(self.eqn.params)
        if name in IDENTITIES or name == "convert_element_type" or (name == "neg" and absolute):
            return values[0]
        if name in ("mul", "div"):
            return values[0] * values[1]
        if name in ("add", "sub", "add_any"):
            return values[0] - values[1] if name == "sub" and not absolute else values[0] + values[1]
        if name in ("dot_general", "conv_general_dilated"):
            p |= {"preferred_element_type": jnp.dtype("float64"), "precision": lax.Precision.HIGHEST}
        return self.eqn.primitive.bind(*values, **self.eqn.primitive.get_bind_params(p))

    def _magnitude(self, x, fixed):
        return self.run([v.largest for v in x], [_each(jnp.abs, w) for w in fixed], True)

    def range(self, x: list[Interval], values: dict) -> Interval:
        """The range of the output in one network."""
        fixed = self.fixed(values)
        signless = [_each(jnp.abs if self.multiplies else jnp.zeros_like, w) for w in fixed]
        middle = self.run([v.middle for v in x], fixed)
        radius = self.run([v.radius for v in x], signless, True)
        return about(middle, radius, 4 * gamma(self.terms) * self._magnitude(x, fixed))

    def forward(self, x: list[Triple], fixed: Fixed) -> Triple:
        """The ranges of the output."""
        f, q = self.range([v.f for v in x], fixed.f), self.range([v.q for v in x], fixed.q)
        a, b = self.fixed(fixed.f), self.fixed(fixed.q)
        both = [jnp.abs(v) + jnp.abs(w) if _floats(w) else w for v, w in zip(a, b, strict=True)]
        error = 8 * gamma(self.terms) * self.run([v.f.largest + v.q.largest for v in x], both, True)
        change = [_minus(w, v) for w, v in zip(b, a, strict=True)]
        if not self.multiplies:
            signless = [_each(jnp.zeros_like, w) for w in a]
            middle = self.run([v.d.middle for v in x], change)
            d = about(middle, self.run([v.d.radius for v in x], signless, True), error)
            return Triple(f, q, d).tightened()
        off = [_each(jnp.abs, w) for w in change]
        sides = []
        for weight, other in ((b, [v.f for v in x]), (a, [v.q for v in x])):  # B d + (B - A) f, and A d + (B - A) q
            middle = self.run([v.d.middle for v in x], weight) + self.run([v.middle for v in other], change)
            spread = self.run([v.d.radius for v in x], [_each(jnp.abs, w) for w in weight], True)
            sides.append(about(middle, spread + self.run([v.radius for v in other], off, True), error))
        return Triple(f, q, sides[0].meet(sides[1])).tightened()

    def lines(self, x: list[Triple], fixed: Fixed) -> tuple:
        """The rounding errors of either network, for `backward`."""
        nets = zip(("f", "q"), fixed, strict=True)
        return tuple(
            4 * gamma(self.terms) * self._magnitude([getattr(v, net) for v in x], self.fixed(values))
            for net, values in nets
        )

    def backward(self, out: Pair, x: list[Triple], y: Triple, fixed: Fixed, lines: Any) -> tuple[list[Pair], list]:
        """The coefficients of the inputs, and the terms that are added."""
        pulled, terms = [], []
        for c, values, error in zip(out[:2], fixed, lines, strict=True):
            operands = self.fixed(values)
            zeros = [jnp.zeros(v.aval.shape, jnp.float64) for v in self.inputs]
            at_zero, back = jax.vjp(lambda *data, operands=operands: self.run(list(data), operands), *zeros)
            pulled.append(back(c))
            adds = not self.multiplies and any(w is not None for w in operands)
            terms.append(jnp.abs(c) * error + (c * at_zero if adds else 0))
        return [out.with_(f, q) for f, q in zip(*pulled, strict=True)], terms


@dataclasses.dataclass(frozen=True, eq=False)
class Apply:
    """A function of one number, of each entry."""

    activation: Activation
    inputs: tuple
    output: Any
    relaxes = True

    def argument(self, x: list[Triple]) -> Triple:
        """The ranges of what the function is applied to."""
        return x[0]

    def targets(self) -> list[int]:
        """The signs of the inputs in the argument."""
        return [1]

    def forward(self, x: list[Triple], fixed: Fixed) -> Triple:
        """The ranges of the output."""
        f, q = self.activation.range(x[0].f), self.activation.range(x[0].q)
        return Triple(f, q, difference(self.activation, x[0])).tightened()

    def lines(self, argument: Triple, fixed: Fixed) -> Relaxed:
        """The lines for `backward`."""
        return relaxed(self.activation, argument)

    def backward(self, out: Pair, x: list[Triple], y: Triple, fixed: Fixed, lines: Relaxed) -> tuple[list[Pair], list]:
        """The coefficients of the input, and the terms that are added."""
        pair, terms = _along(out, lines, x[0].largest + y.largest)
        return [pair], terms


@dataclasses.dataclass(frozen=True, eq=False)
class Larger:
    """The larger of two numbers: max(a, b) = b + max(a - b, 0)."""

    activation: Activation  # ReLU
    inputs: tuple
    output: Any
    relaxes = True

    def argument(self, x: list[Triple]) -> Triple:
        """The ranges of a - b."""
        a, b = x
        return Triple(*(p.minus(q) for p, q in zip(a, b, strict=True))).tightened()

    def targets(self) -> list[int]:
        """The signs of the inputs in the argument."""
        return [1, -1]

    def forward(self, x: list[Triple], fixed: Fixed) -> Triple:
        """The ranges of the output."""
        most = [Interval(jnp.maximum(a.lo, b.lo), jnp.maximum(a.hi, b.hi)) for a, b in zip(*x, strict=True)]
        a, b = (v.d for v in x)
        return Triple(most[0], most[1], a.hull(b)).tightened()

    def lines(self, argument: Triple, fixed: Fixed) -> Relaxed:
        """The lines for `backward`."""
        return relaxed(self.activation, argument)

    def backward(self, out: Pair, x: list[Triple], y: Triple, fixed: Fixed, lines: Relaxed) -> tuple[list[Pair], list]:
        """The coefficients of both inputs, and the terms that are added."""
        size = x[0].largest + x[1].largest
        pair, terms = _along(out, lines, 2 * size)
        other = out.with_(out.f - pair.f, out.q - pair.q)
        return [pair, other], [*terms, 8 * U * out.magnitude * size]


@dataclasses.dataclass(frozen=True, eq=False)
class Round:
    """The input of a layer: rounded to its grid in the quantized network, unchanged in the float one."""

    quantizer: int  # its index
    inputs: tuple
    output: Any
    relaxes = True

    def errors(self, x: Interval, levels: Any) -> Interval:
        """The error of rounding: half a gap within the grid, and the distance to its end beyond."""
        first, last = (levels.decode(levels.encode(v)) for v in x)
        half = levels.gap / 2
        low, high = levels.at(levels.lo if levels.table is None else levels.table[0]), levels.radius
        error = Interval(jnp.minimum(-half, high - x.hi), jnp.maximum(half, low - x.lo))
        return error.meet(Interval(first - x.hi, last - x.lo)).wider(
            16 * U * (x.largest + jnp.abs(low) + jnp.abs(high))
        )

    def forward(self, x: list[Triple], fixed: Fixed) -> Triple:
        """The ranges of the output."""
        levels = fixed.q[self.quantizer](x[0].q.lo)
        error = self.errors(x[0].q, levels)
        ends = Interval(*(levels.decode(levels.encode(v)) for v in x[0].q))
        q = x[0].q.plus(error).meet(ends.wider(16 * U * ends.largest))
        return Triple(x[0].f, q, x[0].d.plus(error)).tightened()

    def lines(self, argument: Triple, fixed: Fixed) -> Interval:
        """The lines for `backward`."""
        return self.errors(argument.q, fixed.q[self.quantizer](argument.q.lo))

    def backward(self, out: Pair, x: list[Triple], y: Triple, fixed: Fixed, lines: Interval) -> tuple[list[Pair], list]:
        """The coefficients of the input, and the terms that are added."""
        return [out], [most(out.q, lines.lo, lines.hi)]


@dataclasses.dataclass(frozen=True, eq=False)
class Softmax:
    """Softmax along an axis, bounded by its range: of p exp(t) / sum p exp(t), with t of which only the range is known."""

    axis: int
    inputs: tuple
    output: Any
    relaxes = True

    def _range(self, x: Interval) -> Interval:
        """Each is largest where its own logit is largest, and the others are smallest."""
        ends = []
        for own, other in ((x.lo, x.hi), (x.hi, x.lo)):
            total = jax.nn.logsumexp(jnp.where(self._eye(own), own[..., None, :], other[..., None, :]), axis=-1)
            ends.append(jnp.exp(own - total))
        return Interval(*ends).wider(2.0**-36 * (1 + ends[1]))

    def _eye(self, x):
        return jnp.eye(x.shape[-1], dtype=bool)

    def forward(self, x: list[Triple], fixed: Fixed) -> Triple:
        """The ranges of the output."""
        last = lambda v: jnp.moveaxis(v, self.axis, -1)
        back = lambda v: jnp.moveaxis(v, -1, self.axis)
        t = jax.tree.map(last, x[0])
        f, q = self._range(t.f), self._range(t.q)
        low, high = t.d.lo - t.d.hi.max(-1, keepdims=True), t.d.hi - t.d.lo.min(-1, keepdims=True)
        least, most = jnp.expm1(low), jnp.expm1(high)  # of q / f - 1
        ends = [jnp.minimum(f.lo * least, f.hi * least), jnp.maximum(f.lo * most, f.hi * most)]
        d = Interval(*ends).wider(2.0**-36 * (1 + jnp.abs(ends[0]) + jnp.abs(ends[1])))
        return jax.tree.map(back, Triple(f, q, d).tightened())

    def backward(self, out: Pair, x: list[Triple], y: Triple, fixed: Fixed, lines: Any) -> tuple[list[Pair], list]:
        """No coefficients: the range of the output alone."""
        base, other = _split(out)
        own = jax.tree.map(lambda f, q: jnp.where(out.alone > 0, q, f), y.f, y.q)
        zero = jnp.zeros(self.inputs[0].aval.shape, jnp.float64)
        return [out.with_(zero, zero)], [most(base, *own), most(other, *y.d), 8 * U * out.magnitude * y.largest]


Node = Affine | Apply | Larger | Round | Softmax


def _split(out: Pair):
    """The coefficients of one network's value, and of the difference."""
    return out.f + out.q, (1 - out.alone) * out.q


def _along(out: Pair, lines: Relaxed, size) -> tuple[Pair, list]:
    """The coefficients of the argument of a function, from those of its value."""
    base, other = _split(out)
    own = jax.tree.map(lambda f, q: jnp.where(out.alone > 0, q, f), lines.f, lines.q)
    slopes = lines.f.slope, lines.q.slope, lines.d.f, lines.d.q
    total = lambda tree: sum(jnp.abs(leaf) for leaf in jax.tree.leaves(tree))
    spread = size * total(slopes) + total([part.shift for part in lines])
    a, d = _side(base, own.slope), lines.d
    pair = out.with_((1 - out.alone) * (a + _side(other, d.f)), jnp.where(out.alone > 0, a, _side(other, d.q)))
    return pair, [_side(base, own.shift) + _side(other, d.shift) + 16 * U * out.magnitude * spread]


def _side(c, ends):
    """A coefficient times what bounds its value from above."""
    return c * jnp.where(c > 0, ends[1], ends[0])


def _each(f, w):
    """`f` of a floating operand; others, such as a predicate, unchanged."""
    return f(w) if _floats(w) else w


def _minus(b, a):
    return b - a if _floats(b) else b


def _floats(w):
    return w is not None and jnp.issubdtype(w.dtype, jnp.floating)

"""Functions of one number, and linear bounds of their increments.

Everything follows from one question: for a in [a.lo, a.hi] and t in [t.lo, t.hi], between which lines in t does

    phi(a + t) - phi(a)

lie? With a = f and t = d it is the difference of the two networks after the function; for ReLU the cases of QEBVerif (arXiv
2212.02781, §4) follow. With a fixed and t = x - a it is the function itself.

For a convex function the increment grows with a where t >= 0 and falls where t < 0, so its extremes are at the ends of a.
For others, it lies between the least and the largest slope times t. Either way the extremes are piecewise linear in t, and
the best line of a given slope touches them at a breakpoint.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .interval import Interval, Triple, U

ELEMENTARY = 2.0**-40  # what exp, tanh and the like may be off by, relative to 1 + |x|


class Lines(NamedTuple):
    """Linear bounds: slope[0] x + shift[0] <= y <= slope[1] x + shift[1]."""

    slope: tuple[jax.Array, jax.Array]
    shift: tuple[jax.Array, jax.Array]


class Planes(NamedTuple):
    """Linear bounds of both: f[0] f + q[0] q + shift[0] <= y <= f[1] f + q[1] q + shift[1]."""

    f: tuple[jax.Array, jax.Array]
    q: tuple[jax.Array, jax.Array]
    shift: tuple[jax.Array, jax.Array]


class Relaxed(NamedTuple):
    """Lines of phi(f) in f and of phi(q) in q, and planes of phi(q) - phi(f)."""

    f: Lines
    q: Lines
    d: Planes


@dataclasses.dataclass(frozen=True)
class Kink:
    """Two half-lines that meet at `at`, with these slopes: ReLU is Kink(0, 1), min(x, 6) is Kink(1, 0, 6)."""

    left: float
    right: float
    at: Any = 0.0

    def __call__(self, x: jax.Array) -> jax.Array:
        """The value."""
        x = x - self.at
        return self.at + self.left * jnp.minimum(x, 0) + self.right * jnp.maximum(x, 0)

    def error(self, x: jax.Array) -> jax.Array:
        """A bound of the rounding error of the value of numbers up to x in magnitude."""
        return 8 * U * (1 + abs(self.left) + abs(self.right)) * (x + jnp.abs(self.at))

    def range(self, x: Interval) -> Interval:
        """All values."""
        values = self(_stack(x, self.at))
        return Interval(values.min(0), values.max(0)).wider(self.error(x.largest))

    def increments(self, a: Interval, t: Interval, hull: Interval) -> tuple[Callable, Callable, jax.Array]:
        """The least and the largest increment for each t, and the breakpoints of both."""
        near = lambda t: self(a.lo + t) - self(a.lo)
        far = lambda t: self(a.hi + t) - self(a.hi)
        upper = lambda t: jnp.where(t >= 0, far(t), near(t))
        lower = lambda t: jnp.where(t >= 0, near(t), far(t))
        if self.right < self.left:
            upper, lower = lower, upper
        return lower, upper, _stack(t, 0.0, self.at - a.lo, self.at - a.hi)

    def own(self, x: Interval) -> Lines:
        """Lines of the function: the chord on one side, and on the other the half-line that covers more (CROWN)."""
        points = _stack(x, self.at)
        values = self(points)
        slope = _chord(values, x)
        more = jnp.where(x.hi - self.at > self.at - x.lo, self.right, self.left)
        slopes = (more, slope) if self.right >= self.left else (slope, more)
        return _touching(slopes, points, (values, values), self.error(x.largest))


@dataclasses.dataclass(frozen=True)
class Smooth:
    """A smooth function with the places where its slope turns, and where it turns itself."""

    name: str
    function: Callable
    slope_turns: tuple[float, ...] = ()
    turns: tuple[float, ...] = ()

    def __call__(self, x: jax.Array) -> jax.Array:
        """The value."""
        return self.function(x)

    def error(self, x: jax.Array) -> jax.Array:
        """A bound of the error of the value, for numbers up to x in magnitude."""
        return ELEMENTARY * (1 + x)

    def _over(self, x: Interval, f: Callable, turns) -> Interval:
        values = f(_stack(x, *turns))
        return Interval(values.min(0), values.max(0)).wider(self.error(x.largest))

    def range(self, x: Interval) -> Interval:
        """All values."""
        return self._over(x, self.function, self.turns)

    def slopes(self, x: Interval) -> Interval:
        """All slopes."""
        slope = lambda p: jax.jvp(self.function, (p,), (jnp.ones_like(p),))[1]
        return self._over(x, slope, self.slope_turns)

    def increments(self, a: Interval, t: Interval, hull: Interval) -> tuple[Callable, Callable, jax.Array]:
        """The least and the largest increment for each t, and the breakpoints of both."""
        slopes = self.slopes(hull)
        upper = lambda t: jnp.maximum(slopes.lo * t, slopes.hi * t)
        lower = lambda t: jnp.minimum(slopes.lo * t, slopes.hi * t)
        return lower, upper, _stack(t, 0.0)

    def own(self, x: Interval) -> Lines:
        """Lines of the function, from the increments about the middle."""
        a = Interval(x.middle, x.middle)
        lines = _lines(self, a, x.minus(a), x)
        shift = self(x.middle)
        error = self.error(x.largest)
        return Lines(
            lines.slope,
            tuple(  # pyright: ignore[reportArgumentType]
                b
                + shift
                - s * x.middle
                + sign * (error + 8 * U * (jnp.abs(b) + jnp.abs(s) * x.largest + jnp.abs(shift)))
                for s, b, sign in zip(*lines, (-1, 1), strict=True)
            ),
        )


Activation = Kink | Smooth
ROOT = math.sqrt(2)
TANH = Smooth("tanh", jnp.tanh, (0.0,))
LOGISTIC = Smooth("logistic", jax.nn.sigmoid, (0.0,))
NAMED = {  # those that are more than one primitive; turning points to ten digits, where slopes are flat
    "gelu": Smooth("gelu", jax.nn.gelu, (-1.4061021, 1.4061021), (-0.7524614220,)),
    "exact gelu": Smooth("exact gelu", lambda x: jax.nn.gelu(x, approximate=False), (-ROOT, ROOT), (-0.7517915247,)),
    "silu": Smooth("silu", jax.nn.silu, (-2.3993572805, 2.3993572805), (-1.2784645427,)),
    "softplus": Smooth("softplus", jax.nn.softplus),
    "elu": Smooth("elu", jax.nn.elu),
}


def difference(activation: Activation, x: Triple) -> Interval:
    """All values of phi(q) - phi(f)."""
    lower, upper, points = activation.increments(x.f, x.d, x.f.hull(x.q))
    return Interval(lower(points).min(0), upper(points).max(0)).wider(2 * activation.error(2 * x.largest))


def relaxed(activation: Activation, x: Triple) -> Relaxed:
    """The lines of a function of x in both networks.

    The difference is bounded by those of its increment in d, or by those of the two values apart, which are narrower where
    the difference is larger than the ranges: for each entry and side by what may be off by less.
    """
    f, q = activation.own(x.f), activation.own(x.q)
    lower, upper, points = activation.increments(x.f, x.d, x.f.hull(x.q))
    d = _lines(activation, x.f, x.d, x.f.hull(x.q))
    at = lambda line, side, p: line.slope[side] * p + line.shift[side]
    gaps = {name: _gaps(activation, line, getattr(x, name)) for name, line in (("f", f), ("q", q))}
    apart = gaps["q"][0] + gaps["f"][1], gaps["q"][1] + gaps["f"][0]
    together = jnp.max(upper(points) - at(d, 0, points), 0), jnp.max(at(d, 1, points) - lower(points), 0)
    sides = []
    for side in (0, 1):
        pick = lambda a, b, side=side: jnp.where(apart[side] < together[side], a, b)
        error = 8 * U * (jnp.abs(q.shift[side]) + jnp.abs(f.shift[1 - side]))
        shift = q.shift[side] - f.shift[1 - side] + (2 * side - 1) * error
        slopes = pick(-f.slope[1 - side], -d.slope[side]), pick(q.slope[side], d.slope[side])
        sides.append((*slopes, pick(shift, d.shift[side])))
    return Relaxed(f, q, Planes(*zip(*sides, strict=True)))


def _gaps(activation, line, x):
    """The largest distance of the lines from a function, below and above."""
    points = _stack(x, x.middle, getattr(activation, "at", 0.0))
    values = activation(points)
    return tuple(
        jnp.max(sign * (line.slope[side] * points + line.shift[side] - values), 0) for side, sign in ((0, -1), (1, 1))
    )


def _lines(activation, a, t, hull) -> Lines:
    """The lines of the increments: chords of their extremes."""
    lower, upper, points = activation.increments(a, t, hull)
    values = lower(points), upper(points)
    slopes = tuple(_chord(side, t) for side in values)
    return _touching(slopes, points, values, 2 * activation.error(hull.largest + t.largest))


def _stack(x, *inner):
    """The ends of an interval, and other places clipped to it, along a first axis."""
    return jnp.stack([x.lo, x.hi, *(jnp.clip(place, x.lo, x.hi) for place in inner)])


def _chord(values, t):
    """The slope of the chord over an interval; 0 where it is so narrow that roundings reign."""
    width = t.hi - t.lo
    wide = width > 1e-9 * (1e-9 + t.largest)
    return jnp.where(wide, (values[1] - values[0]) / jnp.where(wide, width, 1), 0)


def _touching(slopes, points, values, error) -> Lines:
    """Lines of given slopes that touch the values at one of the breakpoints."""
    ends = []
    for slope, own, extreme, sign in zip(slopes, values, (jnp.min, jnp.max), (-1, 1), strict=True):
        along = slope * points
        slack = error + 8 * U * jnp.max(jnp.abs(own) + jnp.abs(along), 0)
        ends.append(extreme(own - along, 0) + sign * slack)
    return Lines(tuple(slope + 0 * ends[0] for slope in slopes), tuple(ends))  # pyright: ignore[reportArgumentType]

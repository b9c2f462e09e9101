"""Intervals in float64, rounded outward, for the float network f, the quantized network q, and the difference d = q - f.

The standard model of floating point: an operation is off by at most a share U of its result, so a sum of k terms by at most
gamma(k) times the sum of their magnitudes, in whatever order. Every rule adds such an error to what it computes.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

U = 2.0**-53
TINY = 1e-290  # beyond what underflows


def gamma(terms: int) -> float:
    """A bound of the relative error of a sum of so many products."""
    return 1.01 * (terms + 16) * U


class Interval(NamedTuple):
    """All numbers from lo to hi."""

    lo: jax.Array
    hi: jax.Array

    @property
    def middle(self) -> jax.Array:
        """The middle, rounded."""
        return self.lo / 2 + self.hi / 2

    @property
    def radius(self) -> jax.Array:
        """The least radius about the rounded middle that covers the interval, up to roundings which `largest` covers."""
        return jnp.maximum(self.hi - self.middle, self.middle - self.lo)

    @property
    def largest(self) -> jax.Array:
        """The largest magnitude."""
        return jnp.maximum(jnp.abs(self.lo), jnp.abs(self.hi))

    def wider(self, error: jax.Array) -> "Interval":
        """The interval widened by an error, and by the roundings of doing so."""
        error = error * (1 + 8 * U) + 2 * U * self.largest + TINY
        return Interval(self.lo - error, self.hi + error)

    def plus(self, other: "Interval") -> "Interval":
        """All sums."""
        return Interval(self.lo + other.lo, self.hi + other.hi).wider(0 * self.lo)

    def minus(self, other: "Interval") -> "Interval":
        """All differences."""
        return Interval(self.lo - other.hi, self.hi - other.lo).wider(0 * self.lo)

    def meet(self, other: "Interval") -> "Interval":
        """The intersection."""
        return Interval(jnp.maximum(self.lo, other.lo), jnp.minimum(self.hi, other.hi))

    def hull(self, other: "Interval") -> "Interval":
        """The smallest interval that holds both."""
        return Interval(jnp.minimum(self.lo, other.lo), jnp.maximum(self.hi, other.hi))


def about(middle: jax.Array, radius: jax.Array, error: jax.Array) -> Interval:
    """The interval of a middle and a radius, widened by an error."""
    return Interval(middle - radius, middle + radius).wider(error + 2 * U * radius)


class Triple(NamedTuple):
    """The ranges of one value of the program: in the float network, in the quantized one, and of their difference."""

    f: Interval
    q: Interval
    d: Interval

    def tightened(self) -> "Triple":
        """The same with each range met with what the two others say."""
        d = self.d.meet(self.q.minus(self.f))
        return Triple(self.f.meet(self.q.minus(d)), self.q.meet(self.f.plus(d)), d)

    def meet(self, other: "Triple") -> "Triple":
        """The intersection, tightened."""
        return Triple(*(a.meet(b) for a, b in zip(self, other, strict=True))).tightened()

    @property
    def largest(self) -> jax.Array:
        """The largest magnitude in the two networks."""
        return jnp.maximum(self.f.largest, self.q.largest)


class Pair(NamedTuple):
    """Coefficients F and Q of a value in the float network and in the quantized one.

    alone: 1 if the sum is of the quantized network alone, 0 if not. If so, F is 0, and functions are bounded as in that
        network.
    """

    f: jax.Array
    q: jax.Array
    alone: jax.Array

    def plus(self, other: "Pair") -> "Pair":
        """The sum."""
        return Pair(self.f + other.f, self.q + other.q, self.alone)

    def with_(self, f: jax.Array, q: jax.Array) -> "Pair":
        """The same with other coefficients."""
        return Pair(f, q, self.alone)

    @property
    def magnitude(self) -> jax.Array:
        """The sum of the magnitudes."""
        return jnp.abs(self.f) + jnp.abs(self.q)


def most(coefficient: jax.Array, lower: jax.Array, upper: jax.Array) -> jax.Array:
    """The largest values of coefficient * x over lower <= x <= upper."""
    return jnp.maximum(coefficient * lower, coefficient * upper)

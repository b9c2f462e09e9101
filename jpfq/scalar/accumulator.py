"""Accumulators: weights whose integer dot products fit P bits for every input there can be (AXE, arXiv 2409.17092).

Inputs are integer codes mu <= x <= nu with mu <= 0 <= nu, weights integer codes k. Over a tile of inputs the sum of k x is
largest where each x is nu or mu by the sign of k. With p the sum of the positive codes and g that of the negative ones,

    largest sum  nu p + mu g,     least sum  mu p + nu g,     both to lie within  +-(2^(P-1) - 1)

What is left of the two is the tile's room. `AXE` is a rounding that stays within it: at each coordinate the grid is narrowed
to the codes that fit the room, another rounding picks one of them, and the room shrinks by what that code may add. 0 always
fits. Since any input may be 0, no partial sum is larger, whatever the order of summation.

The tile of a coordinate is its original index // T. A zero point of the inputs folds into the bias: z sum k is a constant.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from .bounded import Bounded
from .grid import Number, is_number
from .integer_sums import MAX_WIDTH, SumSpec, as_int, width_of
from .predicates import is_count, may_be
from .pytree import register_dataclass
from .rounding import Rounding
from .scale import AbsMax, Based, MinError, Scale

Feedback = Literal["argument", "shrunk"]
_static = {"static": True}


class AXEInputs(NamedTuple):
    """The information that AXE gets about a coordinate."""

    tile: jax.Array
    after: jax.Array  # the tile of the next coordinate
    threshold: jax.Array | None  # in units of the weights; None where nothing is shrunk
    now: (
        tuple[jax.Array, jax.Array] | None
    )  # integer codes to be replaced, here and at the next coordinate; None for none
    then: Any  # the inputs of the rounding within


class AXEState(NamedTuple):
    """The carry of AXE, for one neuron.

    The limits are computed at the coordinate before, once its code is known: XLA computes a carried value once, and not
    again for each use; and it updates the rooms in place, because they are written before they are read.
    """

    above: jax.Array  # (tiles,) int32: what may still be added to the largest sum
    below: jax.Array  # (tiles,) likewise what may be taken from the least
    least: jax.Array  # the least code that fits, about 0
    most: jax.Array
    inner: Any  # the carry of the rounding within
    shift: jax.Array | None  # the amount fed back beyond the last value


@register_dataclass
@dataclasses.dataclass(frozen=True)
class AXE(Bounded):
    """Shrink by the tile's threshold, then round by `then` to a code that fits the tile's room.

    soft: whether arguments are shrunk by the threshold of the projection of their tile's weights, less their mean, on the
        l1 ball of radius (2^P - 2) / (nu - mu) in units of the step, chosen before the recursion.
    feedback: which error is passed on to later coordinates: the error of the argument, or of the shrunk and clipped one.
    """

    then: Rounding
    sums: SumSpec
    soft: bool = dataclasses.field(default=True, metadata=_static)
    feedback: Feedback = dataclasses.field(default="argument", metadata=_static)

    @property
    def random(self) -> bool:  # type: ignore[override]
        return self.then.random

    @property
    def sparse(self) -> bool:  # type: ignore[override]
        return self.then.sparse

    def check(self, recipe):
        super().check(recipe)
        if self._shifts and recipe.method.local:
            raise ValueError(
                f"feedback='shrunk' is about what OPTQ and its relatives pass on; {recipe.method} feeds back codes: "
                "without it."
            )

    def fitted(self, scale):
        return MinError(FitScale(AbsMax(), self.sums)) if scale.searches else FitScale(scale, self.sums)

    def init_all(self, W, order):
        n, out = W.shape
        room = jnp.broadcast_to(self.sums.capacity, (out, self.sums.tiles(n)))
        inner, inner_inputs = self.then.init_all(W, order)
        least, most = self.sums.limits(room[:, 0], room[:, 0], W.dtype)
        shift = jnp.zeros(out, W.dtype) if self._shifts else None
        carry = AXEState(room, room, least, most, started(self.then, inner, out), shift)
        tile = order // self.sums.size(n)
        theta = self._thresholds(W, order) if self.soft else None

        def inputs_of(levels):
            threshold = None if theta is None else theta(self.sums.step_of(levels, order))[tile]
            return AXEInputs(tile, _after(tile), threshold, None, inner_inputs(levels))

        return carry, inputs_of

    def constrain(self, codes, levels, order, rounding, carry, inputs):
        k = levels.integers(codes)
        above, below = (self.sums.capacity - x.T for x in self.sums.of_codes(k, order))
        tile, out = order // self.sums.size(codes.shape[0]), codes.shape[1]
        freed = self.sums.spent(k[0])
        least, most = self.sums.limits(above[:, tile[0]] + freed[0], below[:, tile[0]] + freed[1], codes.dtype)
        then = rounding.then if isinstance(rounding, AXE) else rounding
        start = AXEState(above, below, least, most, started(then, carry, out), None)
        own = AXEInputs(tile, _after(tile), None, (k, _after(k)), inputs)
        return dataclasses.replace(self, then=then, feedback="argument"), start, own

    def __call__(self, carry, a, context):
        levels, own = context.levels, context.inputs
        narrow = levels.within(carry.least, carry.most)
        meant = a if own.threshold is None else jnp.sign(a) * jnp.maximum(jnp.abs(a) - own.threshold, 0)
        inner, code = self.then(carry.inner, meant, context._replace(levels=narrow, inputs=own.then))
        least, most = levels.integer_step * carry.least, levels.integer_step * carry.most
        shift = a - jnp.clip(meant, least, most) if self._shifts else None

        up, down = self.sums.spent(levels.integers(code))
        if own.now is not None:
            up, down = (x - y for x, y in zip((up, down), self.sums.spent(own.now[0]), strict=True))
        above, below = _take(carry.above, own.tile, up), _take(carry.below, own.tile, down)
        left, right = (x.at[own.after].get(mode="promise_in_bounds") for x in (above, below))
        if own.now is not None:
            left, right = (x + y for x, y in zip((left, right), self.sums.spent(own.now[1]), strict=True))
        least, most = self.sums.limits(left, right, a.dtype)
        return AXEState(above, below, least, most, inner, shift), code

    def shift(self, carry):
        return carry.shift

    def error(self, levels):
        return levels.span

    @property
    def for_finish(self):
        then = self.then.for_finish
        return None if then is None else dataclasses.replace(self, then=then, feedback="argument")

    @property
    def _shifts(self):
        return self.feedback == "shrunk"

    def _thresholds(self, W, order) -> Callable[[jax.Array], jax.Array]:
        """The threshold of each tile (tiles, out) as a function of its step: that of the projection on an l1 ball.

        As in Brevitas, the zeros that pad the last tile count as weights.
        """
        tiles = self.sums.split(W, order)
        centred = jnp.abs(tiles - tiles.mean(1, keepdims=True))
        width = (as_int(self.sums.hi) - as_int(self.sums.lo)).astype(W.dtype)
        radius = 2 * self.sums.capacity.astype(W.dtype) / width
        return lambda step: _l1_threshold(centred, radius * step)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class ToZero(Bounded):
    """EP-init: the weights of each tile projected on the l1 ball that keeps sums within bounds, then rounded towards zero.

    Inputs of one sign bound positive and negative codes separately, and each part is projected by itself.
    """

    sums: SumSpec

    def check(self, recipe):
        super().check(recipe)
        if not recipe.method.memoryless:
            raise ValueError(
                f"EPInit bounds weights that are rounded as they are: method=jpfq.MSQ(), not {recipe.method}."
            )
        if recipe.finish is not None and recipe.finish.descends:
            raise ValueError(f"{recipe.finish} would break the bound that {self} keeps: take finish=Refit() or None.")

    def init_all(self, W, order):
        own = self.sums.split(W, order)
        parts = jnp.maximum(own, 0), jnp.maximum(-own, 0), jnp.abs(own)
        tile, positive = order // self.sums.size(W.shape[0]), W > 0
        capacity = self.sums.capacity.astype(W.dtype) * (1 - 1e-5)  # of the room for rounding errors in float32
        magnitude = jnp.maximum(as_int(self.sums.hi), -as_int(self.sums.lo)).astype(W.dtype)
        both = (as_int(self.sums.lo) < 0) & (as_int(self.sums.hi) > 0)

        def inputs_of(levels):
            radius = capacity / magnitude * self.sums.step_of(levels, order)
            up, down, whole = (_l1_threshold(part, radius)[tile] for part in parts)
            return jnp.where(both, whole, jnp.where(positive, up, down))

        return None, inputs_of

    def __call__(self, carry, a, context):
        levels = context.levels
        return carry, levels.toward_zero(jnp.sign(a) * jnp.maximum(jnp.abs(a) - context.inputs, 0))

    def error(self, levels):
        return levels.span

    @property
    def for_finish(self):
        return None


@register_dataclass
@dataclasses.dataclass(frozen=True)
class FitScale(Based):
    """The steps of `base`, enlarged where weights rounded to nearest would not fit the sums.

    They grow no further than to the largest weight of a neuron, whose code is then 1; where that does not fit, AXE sets
    weights to 0.
    """

    base: Scale
    sums: SumSpec

    def __call__(self, W, grid, importance=None):
        levels = self.base(W, grid, importance)
        tiles = self.sums.split(W, jnp.arange(W.shape[0]))
        up, down = jnp.maximum(tiles, 0).sum(1), jnp.maximum(-tiles, 0).sum(1)
        nu, mu = (x.astype(W.dtype) for x in (as_int(self.sums.hi), -as_int(self.sums.lo)))
        needed = jnp.maximum(nu * up + mu * down, mu * up + nu * down) / self.sums.capacity.astype(W.dtype)
        groups, shared = levels.step.shape
        over = lambda x: x.reshape(groups, -1, x.shape[1]).max(1)
        needed = over(needed) if groups > 1 else needed.max(0, keepdims=True)
        needed = jnp.minimum(needed, over(jnp.abs(W)))
        needed = needed.max(1, keepdims=True) if shared == 1 else needed
        needed = needed if levels.unit is None else needed / levels.unit
        return dataclasses.replace(levels, step=jnp.maximum(levels.step, needed))


class Constraint(abc.ABC):
    """A setting that bounds the sums of a layer."""

    bits: Number
    tile: int | None

    @abc.abstractmethod
    def around(self, rounding: Rounding, inputs: tuple[Number, Number]) -> Bounded:
        """The rounding that keeps the bound, for input codes from mu to nu."""

    def __str__(self):
        return f"{type(self).__name__}({self.bits}, {self.tile})"

    def sums(self, inputs: tuple[Number, Number]) -> SumSpec:
        """The sums it bounds; raises where no code but 0 would fit."""
        lo, hi = inputs
        if is_number(self.bits) and is_number(lo) and is_number(hi):
            least = width_of(int(max(hi, -lo)))
            if self.bits < least:
                raise ValueError(
                    f"{self} holds no product of a weight code 1 with inputs from {int(lo)} to {int(hi)}: every weight "
                    f"would be 0. That takes {least} bits at least; or quantize the activations to fewer bits."
                )
        return SumSpec(self.bits, lo, hi, self.tile)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Accumulator(Constraint):
    """AXE: sums of `bits` bits over tiles of `tile` inputs never overflow, whatever the inputs.

    Args:
        bits: P, of the signed integer that holds a sum, from 2 to 32.
        tile: T, how many inputs are summed; None sums all of them. The partial sums of a layer are added in a wider
            accumulator, whose width is in `Info`.
        soft: whether arguments are shrunk before they are rounded, so that later ones find room.
        feedback: what later codes make up for: all that rounding did to the "argument", or only what it did to the
            "shrunk" and clipped one, as in Brevitas (OPTQ and its relatives).

    Examples:
        >>> rule = jpfq.Rule(".*", bits=4, activation_bits=8, accumulator=jpfq.Accumulator(16, tile=16))
        >>> tensor, info = jpfq.solve(W, gram, bits=4, accumulator=jpfq.Accumulator(12), inputs=jpfq.Asymmetric(8))
        >>> info.reach.bits <= 12  # what the sums need
        True
    """

    bits: Number
    tile: int | None = dataclasses.field(default=None, metadata=_static)
    soft: bool = dataclasses.field(default=True, kw_only=True, metadata=_static)
    feedback: Feedback = dataclasses.field(default="argument", kw_only=True, metadata=_static)

    def __post_init__(self):
        _check(self)
        if self.feedback not in ("argument", "shrunk"):
            raise ValueError(f"Accumulator: feedback is 'argument' or 'shrunk'; got {self.feedback!r}.")

    def around(self, rounding, inputs):
        return AXE(rounding, self.sums(inputs), self.soft, self.feedback)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class EPInit(Constraint):
    """The bound kept by projecting weights on an l1 ball and rounding towards zero (A2Q+): what AXE is compared with.

    `bits` and `tile` are as for `Accumulator`.

    Examples:
        >>> rules = jpfq.paper.ep_init(bits=4, activation_bits=8, P=16, tile=16)
        >>> rules[0].accumulator
        EPInit(bits=16, tile=16)
    """

    bits: Number
    tile: int | None = dataclasses.field(default=None, metadata=_static)

    def __post_init__(self):
        _check(self)

    def around(self, rounding, inputs):
        return ToZero(self.sums(inputs))


def started(rounding: Rounding, carry: Any, out: int) -> Any:
    """The carries of all neurons: those given, or `init` for each."""
    if carry is not None:
        return carry
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (out, *jnp.shape(x))), rounding.init())


def _l1_threshold(x: jax.Array, radius: jax.Array) -> jax.Array:
    """theta >= 0 such that shrinking magnitudes x (tiles, T, out) by it leaves a sum of at most `radius` (tiles, out).

    Newton's method from 0: what lies above theta decides the next theta, which only grows and ends at the exact one
    (Michelot). A few passes over the weights take less time than sorting them.
    """

    def step(state):
        turn, theta, _ = state
        above = x > theta[:, None]
        count = jnp.maximum(above.sum(1), 1).astype(x.dtype)
        new = jnp.maximum((jnp.where(above, x, 0).sum(1) - radius) / count, theta)
        return turn + 1, new, jnp.any(new > theta)

    start = (jnp.int32(0), jnp.zeros_like(radius), jnp.array(True))
    return jax.lax.while_loop(lambda state: state[2] & (state[0] < x.shape[1]), step, start)[1]


def _take(x, at, spent):
    return x.at[at].add(-spent, mode="promise_in_bounds")


def _after(x):
    """At each coordinate the entry of the next one, 0 at the last."""
    return jnp.concatenate([x[1:], jnp.zeros_like(x[:1])])


def _check(guard):
    name, bits, tile = type(guard).__name__, guard.bits, guard.tile
    if not may_be(bits, lambda x: x in range(2, MAX_WIDTH + 1)):
        raise ValueError(f"{name} takes an integer number of bits from 2 to {MAX_WIDTH}; got {bits!r}.")
    if tile is not None and not is_count(tile):
        raise ValueError(f"{name}: tile is a positive number of inputs, or None for one sum over all; got {tile!r}.")

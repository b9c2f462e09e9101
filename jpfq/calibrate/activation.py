"""Activations: the inputs of layers, rounded to a grid while the network runs.

The quantized network continues with the rounded inputs, so that later layers correct for them. The float network is not
affected.
"""

import dataclasses
from collections.abc import Callable, Iterable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from ..matrix.arrays import at_least_float32
from ..matrix.lanes import over_lanes
from ..matrix.layout import Layout
from ..scalar import Asymmetric, Codes, Grid, ScaledGrid, register_dataclass
from ..scalar.ranges import Histogram, Max, MinMSE, Range

Per = Literal["tensor", "channel", "row"]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Activations:
    """The settings for quantizing the input of a layer.

    Args:
        grid: `Asymmetric(8)` stores unsigned integers with a zero point (0 after ReLU), `Integer(8)` signed ones.
        range: the rule that chooses the range of the grid: `jpfq.ranges.Max()`, `Percentile(p)`, `MinMSE()` or `KL()`. It
            sees the calibration data in the quantized network. The default is MinMSE, and Max for per="row".
        per: "tensor": one step for the whole input, fixed by calibration. "channel": one step for each channel of a
            depthwise convolution, group of a grouped one, or expert, which folds into the steps of the weights. "row": a
            step for each row (for a convolution, each sample), taken from the row while the network runs.

    Examples:
        >>> signed = jpfq.Activations(jpfq.Integer(8), jpfq.ranges.Percentile(0.999))
        >>> dynamic = jpfq.Activations(jpfq.Integer(8), per="row")
        >>> rules = [jpfq.Rule("head/.*", bits=8, activations=dynamic), jpfq.Rule(".*", bits=4, activations=signed)]
    """

    grid: Grid = dataclasses.field(default_factory=lambda: Asymmetric(8))
    range: Range | None = None
    per: Per = dataclasses.field(default="tensor", metadata={"static": True})

    def __post_init__(self):
        if self.per not in ("tensor", "channel", "row"):
            raise ValueError(f"Activations: per is 'tensor', 'channel' or 'row'; got {self.per!r}.")
        if isinstance(self.range, Range) and self.per == "row" and not isinstance(self.range, Max):
            raise ValueError(f"Activations: with per='row' the range of each row is its own Max(); got {self.range}.")
        for value, kind, example in ((self.grid, Grid, "Asymmetric(8)"), (self.range, Range, "ranges.MinMSE()")):
            if isinstance(value, (type, str, int, float)):
                raise ValueError(f"Activations takes a {kind.__name__}, such as jpfq.{example}; got {value!r}.")

    def check_layer(self, layout: Layout, path: str) -> None:
        """Raises if the layer cannot have steps per channel."""
        if self.per == "channel" and layout.dims[0] == 1:
            raise ValueError(
                f"{path} sums over all channels of its input, so steps per channel do not fold into its weights: use "
                "per='tensor' or 'row' (per='channel' is for depthwise and grouped convolutions and for experts)."
            )


@register_dataclass
@dataclasses.dataclass(frozen=True)
class ActivationQuantizer:
    """The quantizer of one layer's input. `levels` has steps and zero points (matrices,) or (1,); None for per="row"."""

    settings: Activations
    layout: Layout = dataclasses.field(metadata={"static": True})
    levels: ScaledGrid | None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Rounds an input to its levels, in its dtype. Derivatives pass straight through, except beyond the grid."""
        v = at_least_float32(x)
        return self.at(v).straight(v).astype(x.dtype)

    def at(self, v: jax.Array) -> ScaledGrid:
        """The levels of an input, in shapes that broadcast over it."""
        if self.levels is None:
            return self._of_rows(v)
        levels = self.levels
        spread = lambda y: self.layout.over_matrices(y, v.shape) if y.size > 1 else y.reshape((1,) * v.ndim)
        step, zero = spread(levels.step).astype(v.dtype), spread(levels.zero).astype(v.dtype)
        return jax.tree.map(lambda y: y.astype(v.dtype), levels).with_steps(step, zero)

    def _of_rows(self, x):
        axes, x = self.layout.row_axes(x.ndim), lax.stop_gradient(x)  # no derivative through the step
        return Max()(Histogram(x, x.min(axes, keepdims=True), x.max(axes, keepdims=True)), self.settings.grid)


def choose(
    settings: Activations, layout: Layout, batches: Callable[[], Iterable], laned: tuple[bool, bool] = (False, False)
) -> ActivationQuantizer:
    """Chooses the quantizer of an input from its calibration data.

    Args:
        batches: each call iterates over pairs of an input and the weights of its entries, or None.
        laned: whether the settings, and whether the inputs have lanes.
    """
    if settings.per == "row":
        return ActivationQuantizer(settings, layout, None)
    range_ = settings.range or MinMSE()
    split = settings.per == "channel"
    ends = [_ends(layout, split, x, weights, laned[1]) for x, weights in batches()]
    low, high = (pick(jnp.stack(end), 0) for pick, end in zip((jnp.min, jnp.max), zip(*ends, strict=True), strict=True))
    histogram = _empty(low, high, laned[1])
    if range_.needs_counts:
        for x, weights in batches():
            histogram = _add(layout, split, histogram, x, weights, laned[1])
    grid = settings.grid if laned[0] else Codes.of(settings.grid)  # one program for all grids
    return ActivationQuantizer(settings, layout, _levels(range_, histogram, grid, laned))


def round_by(quantizer: ActivationQuantizer, x: jax.Array, laned: tuple[bool, bool]) -> jax.Array:
    """`quantizer(x)`, where each of the two may have lanes."""
    return over_lanes(lambda quantizer, x: quantizer(x), (quantizer, x), laned)


@partial(jax.jit, static_argnames=("layout", "split", "laned"))
def _ends(layout, split, x, weights, laned):
    def one(x, weights):
        flat, share = _matrices(layout, split, x, weights)
        least, most = (flat, flat) if share is None else (jnp.where(share > 0, flat, v) for v in (jnp.inf, -jnp.inf))
        return least.min(1), most.max(1)

    return over_lanes(one, (x, weights), (laned, False))


@partial(jax.jit, static_argnames="laned")
def _empty(low, high, laned):
    low, high = (jnp.where(jnp.isfinite(x), x, 0) for x in (low, high))  # infinite if every row has weight 0
    return over_lanes(jax.vmap(Histogram.over), (low, high), (laned, laned))


@partial(jax.jit, static_argnames=("layout", "split", "laned"))
def _add(layout, split, histogram, x, weights, laned):
    one = lambda histogram, x, weights: jax.vmap(Histogram.add)(histogram, *_matrices(layout, split, x, weights))
    return over_lanes(one, (histogram, x, weights), (laned, laned, False))


@partial(jax.jit, static_argnames="laned")
def _levels(range_, histogram, grid, laned):
    def one(range_, histogram, grid):
        levels = jax.vmap(lambda one: range_(one, Codes.of(grid)))(histogram)
        step, zero = levels.step, levels.zero
        return jax.tree.map(lambda x: x[0], levels).with_steps(step, zero)  # all matrices have one grid

    return over_lanes(one, (range_, histogram, grid), (laned[0], laned[1], laned[0]))


def _matrices(layout, split, x, weights):
    """Entries and their weights as (matrices or 1, entries)."""
    flat = layout.by_matrix if split else lambda x: x.reshape(1, -1)
    if weights is not None:
        weights = flat(jnp.broadcast_to(weights, x.shape))
    return flat(at_least_float32(x)), weights

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
from jax.typing import DTypeLike

from ..matrix import Hadamard
from ..matrix.arrays import at_least_float32
from ..matrix.lanes import over_lanes
from ..matrix.layout import DotLayout, Layout
from ..scalar import Asymmetric, Codes, Grid, ScaledGrid, register_dataclass
from ..scalar.predicates import is_count
from ..scalar.ranges import Histogram, Max, MinMSE, Range
from ..scalar.scale import ends_of, lay
from ..scalar.step_types import StepStorage, StepType, UnderHalf, kernel_bits, step_type, unit_under

Per = Literal["tensor", "channel", "row", "group"]
_static = {"static": True}


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Activations:
    """The settings for quantizing the input of a layer.

    Args:
        grid: any grid that weights may have. `Asymmetric(8)` stores unsigned integers with a zero point (0 after ReLU),
            `Integer(8)` signed ones; `E4M3()` is FP8, `E2M1()` FP4.
        range: the rule that chooses the range of the grid: `jpfq.ranges.Max()`, `Percentile(p)`, `MinMSE()` or `KL()`. It
            sees the calibration data in the quantized network. The default is MinMSE, and Max for steps that are taken
            while the network runs.
        per: "tensor": one step for the whole input, fixed by calibration. "channel": one step for each channel of a
            depthwise convolution, group of a grouped one, or expert, which folds into the steps of the weights. "row": a
            step for each row (for a convolution, each sample), taken from the row while the network runs. "group": see
            `group`, which implies it.
        group: a step for each block of so many inputs of a product, taken from the block while the network runs; for a
            convolution, blocks of channels at each place. The last block may be shorter.
        step_dtype: the type that steps taken while the network runs are stored in, the same as for weights: float32 by
            default, `jnp.float8_e8m0fnu` for MX formats, `jnp.float8_e4m3fn` for NVFP4. The one float32 over steps of
            `float8_e4m3fn` is fixed by calibration; steps beyond it saturate.
        rotation: rotates the inputs of each product before rounding, and back after it. With the same rotation of the
            weights, `Rule(rotation=..)`, both factors of the product are rounded in rotated coordinates (QuaRot,
            arXiv 2404.00456). For matrix products, and steps taken while the network runs.

    Raises:
        ValueError: settings that do not go together; the message says which do.

    Examples:
        >>> signed = jpfq.Activations(jpfq.Integer(8), jpfq.ranges.Percentile(0.999))
        >>> dynamic = jpfq.Activations(jpfq.Integer(8), per="row")
        >>> rules = [jpfq.Rule("head/.*", bits=8, activations=dynamic), jpfq.Rule(".*", bits=4, activations=signed)]
        >>> fp8 = jpfq.Activations(jpfq.E4M3(), per="row")
        >>> mxfp4 = jpfq.Activations(jpfq.E2M1(), group=32, step_dtype=jnp.float8_e8m0fnu)
    """

    grid: Grid = dataclasses.field(default_factory=lambda: Asymmetric(8))
    range: Range | None = None
    per: Per = dataclasses.field(default="tensor", metadata=_static)
    group: int | None = dataclasses.field(default=None, kw_only=True, metadata=_static)
    step_dtype: DTypeLike | None = dataclasses.field(default=None, kw_only=True, metadata=_static)
    rotation: Hadamard | None = dataclasses.field(default=None, kw_only=True)

    def __post_init__(self):
        if self.group is not None and self.per == "tensor":
            object.__setattr__(self, "per", "group")
        object.__setattr__(self, "step_dtype", self.steps_as)
        if self.per not in ("tensor", "channel", "row", "group"):
            raise ValueError(f"Activations: per is 'tensor', 'channel', 'row' or 'group'; got {self.per!r}.")
        if (self.per == "group") != (self.group is not None) or not (self.group is None or is_count(self.group)):
            raise ValueError(
                "Activations: per='group' goes with group=.., a positive number of inputs that share a step; got "
                f"per={self.per!r} and group={self.group!r}."
            )
        if isinstance(self.range, Range) and self.dynamic and not isinstance(self.range, Max):
            raise ValueError(
                f"Activations: with per={self.per!r} the range of each {self.per} is its own Max(); got {self.range}."
            )
        for value, kind, example in ((self.grid, Grid, "Asymmetric(8)"), (self.range, Range, "ranges.MinMSE()")):
            if isinstance(value, (type, str, int, float)):
                raise ValueError(f"Activations takes a {kind.__name__}, such as jpfq.{example}; got {value!r}.")
        if isinstance(self.grid, Grid) and self.grid.offset:
            raise ValueError(
                f"Activations takes a grid with 0 among its levels; got {self.grid}, which is for weights."
            )
        if isinstance(self.steps_as, UnderHalf):
            raise ValueError(f"Activations: step_dtype={str(self.steps_as)!r} is for the steps of weights.")
        if isinstance(self.rotation, (type, str, int, float)):
            raise ValueError(f"Activations: rotation is a jpfq.Hadamard(); got {self.rotation!r}.")
        for name in ("step_dtype", "rotation"):
            if getattr(self, name) is not None and not self.dynamic:
                raise ValueError(
                    f"Activations: {name} goes with steps taken while the network runs, per='row' or group=..; got "
                    f"per={self.per!r}, whose steps calibration fixes."
                )

    @property
    def steps_as(self) -> StepType:
        """The type that steps are stored in; None for float32."""
        return step_type(self.step_dtype)

    @property
    def dynamic(self) -> bool:
        """True if steps are taken from the input while the network runs."""
        return self.per in ("row", "group")

    @property
    def needs_data(self) -> bool:
        """True if something about the steps is fixed by calibration."""
        return not self.dynamic or kernel_bits(self.steps_as) > 0

    def __str__(self):
        range_ = "" if self.range is None else f", {type(self.range).__name__}"
        rotated = "" if self.rotation is None else ", rotated"
        return f"{self.grid} per {self.where}{range_}{rotated}"

    @property
    def where(self) -> str:
        """A phrase for the numbers that share a step, and the type of the steps: "group of 32, float8_e8m0fnu"."""
        of = f" of {self.group}" if self.group is not None else ""
        return f"{self.per}{of}{'' if self.step_dtype is None else f', {self.step_dtype}'}"

    def check_layer(self, layout: Layout, path: str) -> None:
        """Raises if the layer cannot have such steps, or such a rotation."""
        if self.per == "channel" and layout.dims[0] == 1:
            raise ValueError(
                f"{path} sums over all channels of its input, so steps per channel do not fold into its weights: use "
                "per='tensor' or 'row' (per='channel' is for depthwise and grouped convolutions and for experts)."
            )
        if self.rotation is not None:
            if not isinstance(layout, DotLayout):
                raise ValueError(
                    f"{path} is a convolution, whose windows share inputs: {self.rotation} rotates those of matrix products."
                )
            self.rotation.refuse(layout.dims[1], path)

    def check_sums(self) -> None:
        """Raises if products with inputs rounded so are not sums of integers times one step."""
        if self.group is not None:
            raise ValueError(
                f"inputs have a step for each block of {self.group}, so the sums of their codes are not the layer's "
                "products: for integer sums take per='row' or 'tensor'."
            )
        if self.rotation is not None:
            raise ValueError(
                f"{self.rotation} rotates inputs back after rounding, so they are integer codes no longer: for integer sums "
                "take no rotation."
            )


@register_dataclass
@dataclasses.dataclass(frozen=True)
class ActivationQuantizer:
    """The quantizer of one layer's input.

    levels: steps and zero points (matrices,) or (1,); None where they are taken while the network runs.
    unit: what steps stored as `float8_e4m3fn` are multiplied by; None for other types.
    """

    settings: Activations
    layout: Layout = dataclasses.field(metadata=_static)
    levels: ScaledGrid | None
    unit: jax.Array | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Rounds an input to its levels, in its dtype. Derivatives pass straight through, except beyond the grid."""
        v = at_least_float32(x)
        group, rotation = self.settings.group, self.settings.rotation
        if group is None and rotation is None:
            return self.at(v).straight(v).astype(x.dtype)
        y = self._blocks(v)
        y = self._laid(y, (-1,)).straight(y)
        y = y.reshape(*y.shape[:-2], -1)[..., : self.layout.inputs_last(v).shape[-1]]
        y = y if rotation is None else rotation.unrotate_rows(y)
        return self.layout.inputs_back(y, x.shape).astype(x.dtype)

    def at(self, v: jax.Array) -> ScaledGrid:
        """The levels of an input, in shapes that broadcast over it."""
        if self.levels is None:
            return self._laid(v, self.layout.row_axes(v.ndim))
        levels = self.levels
        spread = lambda y: self.layout.over_matrices(y, v.shape) if y.size > 1 else y.reshape((1,) * v.ndim)
        step, zero = spread(levels.step).astype(v.dtype), spread(levels.zero).astype(v.dtype)
        return jax.tree.map(lambda y: y.astype(v.dtype), levels).with_steps(step, zero)

    def largest_step(self, x: jax.Array, weights: jax.Array | None) -> jax.Array:
        """The largest step of an input before it is stored, among the steps with a number of weight above 0."""
        v = at_least_float32(x)
        shares = None if weights is None else jnp.broadcast_to(weights, v.shape)
        if self.settings.group is None and self.settings.rotation is None:
            y, axes = v, self.layout.row_axes(v.ndim)
        else:
            y, axes = self._blocks(v), (-1,)
            shares = None if shares is None else _cut(self.layout.inputs_last(shares), self.settings.group)
        step = self._laid(y, axes, stored=False).step
        return step.max() if shares is None else jnp.where(shares.max(axes, keepdims=True) > 0, step, 0).max()

    def _blocks(self, v):
        """The input as (.., blocks, inputs that share a step), rotated."""
        y = self.layout.inputs_last(v)
        return _cut(y if self.settings.rotation is None else self.settings.rotation.rotate_rows(y), self.settings.group)

    def _laid(self, x, axes, stored=True):
        """Levels whose steps are taken from `x` over some axes."""
        x, grid = lax.stop_gradient(x), self.settings.grid  # no derivative through the step
        ends = ends_of(x.min(axes, keepdims=True), x.max(axes, keepdims=True), grid)
        return lay(*ends, grid, self._stored if stored and self.settings.step_dtype is not None else None)

    def _stored(self, step):
        dtype, reach = self.settings.steps_as, self.settings.grid.alphabet().reach
        if self.unit is None:
            store = StepStorage.over(step, dtype, reach, jnp.max)
        else:
            store = StepStorage(dtype, self.unit.astype(step.dtype))
        return jnp.where(jnp.isfinite(step), store(step), step)  # no number of another type stands for NaN


def choose(
    settings: Activations,
    layout: Layout,
    batches: Callable[[], Iterable],
    laned: tuple[bool, bool] = (False, False),
    lanes: int | None = None,
) -> ActivationQuantizer:
    """Chooses the quantizer of an input from its calibration data.

    Args:
        batches: each call iterates over pairs of an input and the weights of its entries, or None.
        laned: whether the settings, and whether the inputs have lanes.
        lanes: their number; None if there are none.
    """
    if settings.dynamic:
        quantizer = ActivationQuantizer(settings, layout, None)
        if not settings.needs_data:
            return quantizer
        largest = [_largest_step(quantizer, x, weights, laned, lanes) for x, weights in batches()]
        return dataclasses.replace(quantizer, unit=_unit(jnp.stack(largest)))
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


def round_by(
    quantizer: ActivationQuantizer, x: jax.Array, laned: tuple[bool, bool], lanes: int | None = None
) -> jax.Array:
    """`quantizer(x)`, where each of the two may have lanes, so many."""
    return over_lanes(lambda quantizer, x: quantizer(x), (quantizer, x), laned, lanes)


@partial(jax.jit, static_argnames=("laned", "lanes"))
def _largest_step(quantizer, x, weights, laned, lanes):
    one = lambda quantizer, x, weights: quantizer.largest_step(x, weights)
    return over_lanes(one, (quantizer, x, weights), (*laned, False), lanes)


@jax.jit
def _unit(largest):
    largest = largest.max(0)
    return jnp.where(jnp.isfinite(largest), unit_under(largest), jnp.nan)


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


def _cut(y, group):
    """The last axis in blocks, (.., blocks, group), filled up with zeros, which move no step; None: one block."""
    size = group or y.shape[-1]
    y = jnp.pad(y, [(0, 0)] * (y.ndim - 1) + [(0, -y.shape[-1] % size)])
    return y.reshape(*y.shape[:-1], -1, size)

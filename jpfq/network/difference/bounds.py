"""`verify` and `predicts_alike`: how far the quantized network can be from the float one, for every input of a box.

Certified is the difference of two functions of real numbers: the float and the quantized network, with weights, BatchNorm
factors and whatever else depends on parameters alone as the networks compute it, in its own type, and everything that
depends on data without any rounding but that of quantized inputs to their grids. What float32 adds when it evaluates either
network is not included; it is some 1e-6 of the outputs. The bounds themselves are computed in float64 and rounded outward by
the standard model of floating point (interval.py), with 2^-40 for the elementary functions.
"""

import dataclasses
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ...matrix.explicit_mesh import runs_anywhere
from ...model.adapters import adapt
from ...model.functional import check_values
from ...model.mesh import on_auto_axes
from ...scalar.checks import check_choice
from ...scalar.predicates import is_count
from ..quantized import Quantized
from ..table import table
from .engine import Compiled, compiled
from .graph import graph_of

Mode = Literal["interval", "linear"]


class Range(NamedTuple):
    """Lower and upper bounds, in the structure and the shapes of the model's outputs, in float64."""

    lower: Any
    upper: Any

    @property
    def width(self) -> Any:
        """The difference of both."""
        return jax.tree.map(lambda lo, hi: hi - lo, self.lower, self.upper)


@dataclasses.dataclass(frozen=True)
class Verified:
    """Certified bounds for every input of each box. Print it.

    difference: of the quantized network's outputs minus the float network's.
    float_outputs, quantized_outputs: of the outputs of each network alone.
    mode: how they were found, "interval" or "linear".

    Examples:
        >>> found = jpfq.verify(quantized, model, around=X[:2], radius=0.01, variables=variables)
        >>> inside = quantized.apply(X[:2]) - model.apply(variables, X[:2])
        >>> bool((found.lower <= inside).all()), bool((inside <= found.upper).all())
        (True, True)
    """

    difference: Range
    float_outputs: Range
    quantized_outputs: Range
    mode: Mode

    @property
    def lower(self) -> Any:
        """The lower bounds of the difference."""
        return self.difference.lower

    @property
    def upper(self) -> Any:
        """The upper bounds of the difference."""
        return self.difference.upper

    @property
    def largest(self) -> np.ndarray:
        """By box, the largest magnitude that the difference of any output can have."""
        ends = jax.tree.leaves((self.lower, self.upper))
        return np.max([np.abs(x).reshape(len(x), -1).max(1) for x in ends], axis=0)

    def __str__(self) -> str:
        rows = []
        for name in ("difference", "float_outputs", "quantized_outputs"):
            side = getattr(self, name)
            for lo, hi in zip(*map(jax.tree.leaves, side), strict=True):
                numbers = (lo.min(), hi.max(), (hi - lo).mean(), (hi - lo).max())
                rows.append((name.replace("_", " "), str(lo.shape), *(f"{x:.4g}" for x in numbers)))
        head = ("", "shape", "least", "largest", "mean width", "largest width")
        boxes = len(self.largest)
        return f"{table(head, rows)}\n\n{boxes} box{'es' if boxes > 1 else ''}, {self.mode} bounds, in real arithmetic."


def verify(
    quantized: Quantized,
    model: Any,
    box: tuple[Any, Any] | None = None,
    *,
    around: Any = None,
    radius: Any = None,
    variables: Any = None,
    params: Any = None,
    settings: "Bounding | None" = None,
) -> Verified:
    """Certified bounds of the quantized network's outputs minus the float network's, for all inputs of boxes.

    Ranges of both networks and of their difference go through the program of the model together, so that what both share
    cancels (the idea of QEBVerif, arXiv 2212.02781). Weights and inputs of layers are those of `quantized.apply`.

    Args:
        quantized: the result of `jpfq.quantize` or `jpfq.load`.
        model, variables, params: the float network, the same as for `jpfq.quantize`. If that took `kwargs`, give a function
            of the parameters and a batch that passes them on.
        box: (lower, upper): two batches in the structure of the calibration batches; each sample is a box of its own.
        around, radius: in place of `box` its centres, a batch, and how far each entry may lie from it: a number, or arrays
            that broadcast.
        settings: how to bound; None for `jpfq.Bounding()`.

    Returns:
        A `Verified`, whose bounds have the samples on the first axis.

    Raises:
        ValueError: the boxes are none, the result belongs to another network, or the model holds an equation that no bounds
            are known for: the message names it.

    Examples:
        >>> found = jpfq.verify(quantized, model, around=X[:2], radius=0.01, variables=variables)
        >>> found.lower.shape, bool((found.largest < 1).all())
        ((2, 8), True)
    """
    settings = _checked(settings)
    given = _given(quantized, model, variables, params)
    lower, upper = _box(box, around, radius)
    return _verify(quantized, given, lower, upper, settings)


def predicts_alike(
    quantized: Quantized,
    model: Any,
    x: Any,
    radius: Any = 0.0,
    *,
    variables: Any = None,
    params: Any = None,
    settings: "Bounding | None" = None,
) -> np.ndarray:
    """True for each sample around which both networks certainly predict one and the same class.

    That is: one class has the largest logit, in the float and in the quantized network, for every input of the box. It is
    sufficient for quantization not to change the class of any input there. False says nothing.

    Args:
        quantized, model, variables, params, settings: the same as for `verify`.
        x: a batch, the centres of the boxes.
        radius: how far each entry may lie from it: a number, or arrays that broadcast.

    Returns:
        Booleans (samples,).

    Raises:
        ValueError: the same as `verify`, or the outputs are not one array of logits (samples, classes).

    Examples:
        >>> jpfq.predicts_alike(quantized, model, X[:4], 1e-3, variables=variables).shape
        (4,)
    """
    settings = _checked(settings)
    given = _given(quantized, model, variables, params)
    lower, upper = _box(None, x, radius)
    return _alike(quantized, given, lower, upper, settings)


@dataclasses.dataclass(frozen=True)
class Bounding:
    """The way to bound.

    Args:
        mode: "linear", by functions of the inputs that are followed backward from every layer; or "interval", which is wider
            and takes the time of some ten evaluations of the network.
        together: boxes that are bounded at a time. More take more memory.

    Examples:
        >>> fast = jpfq.Bounding(mode="interval", together=64)
        >>> wide = jpfq.verify(quantized, model, around=X, radius=0.01, variables=variables, settings=fast)
    """

    mode: Mode = "linear"
    together: int = 1

    def __post_init__(self):
        check_choice("Bounding: mode", self.mode, ("linear", "interval"))
        if not is_count(self.together):
            raise ValueError(f"Bounding: together is a positive number of boxes; got {self.together!r}.")


@runs_anywhere
def _verify(quantized, given, lower, upper, settings):
    (outputs, _), tree = _run(quantized, given, lower, upper, settings, margins=False)
    whole = lambda x: x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
    end = lambda side, i: tree.unflatten([whole(np.asarray(getattr(x, side)[i])) for x in outputs])
    difference, exact, rounded = (Range(end(side, 0), end(side, 1)) for side in ("d", "f", "q"))
    return Verified(difference, exact, rounded, settings.mode)


@runs_anywhere
def _alike(quantized, given, lower, upper, settings):
    (_, margins), _ = _run(quantized, given, lower, upper, settings, margins=True)
    label, *sides = margins
    others = np.arange(np.shape(sides[0].lo)[1]) != np.asarray(label)[:, None]
    least = np.minimum(*(np.asarray(side.lo) for side in sides))
    return np.where(others, least, np.inf).min(1) > 0


def _run(quantized, given, lower, upper, settings, margins):
    """The bounds of all boxes, and the structure of the outputs."""
    given, quantized = on_auto_axes(given), quantized.on_auto_axes
    leaves, structure = jax.tree.flatten(lower)
    one = structure.unflatten([jax.ShapeDtypeStruct((1, *x.shape[1:]), _type(x)) for x in leaves])
    graph, quantizers = graph_of(given, quantized.inputs, one)
    shapes = [v.aval.shape for v in graph.outputs]
    if wrong := [s for s in shapes if s[:1] != (1,)]:
        raise ValueError(
            f"verify: an output of one sample has shape {wrong[0]}; its first axis is to be that of samples."
        )
    if margins and (len(shapes) != 1 or len(shapes[0]) != 2 or shapes[0][1] < 2):
        raise ValueError(f"predicts_alike takes logits, one output (samples, classes); the model returns {shapes}.")
    run = compiled(Compiled(graph), settings.mode == "linear", margins)
    boxes = [[np.asarray(x, np.float64)[:, None] for x in jax.tree.leaves(end)] for end in (lower, upper)]
    with jax.enable_x64(True):
        ends = [[jnp.asarray(x) for x in end] for end in boxes]
        found = run(
            given.leaves, quantized._functional.leaves, quantizers, *ends, min(settings.together, len(boxes[0][0]))
        )
        return jax.tree.map(np.asarray, found), graph.program.tree


def _type(x):
    return jnp.float32 if np.asarray(x).dtype.itemsize > 4 else np.asarray(x).dtype


def _checked(settings):
    settings = Bounding() if settings is None else settings
    if not isinstance(settings, Bounding):
        raise ValueError(f"settings takes a jpfq.Bounding, such as jpfq.Bounding(mode='interval'); got {settings!r}.")
    return settings


def _given(quantized, model, variables, params):
    """The float network, which the result is to belong to."""
    if not isinstance(quantized, Quantized):
        raise ValueError(f"verify takes the result of jpfq.quantize; got {type(quantized).__name__}.")
    given = adapt(model, variables, params, None)
    start = quantized._functional
    known = dict(zip(given.paths, given.leaves, strict=True))
    for path, shape in ((p, np.shape(x)) for p, x in zip(start.paths, start.leaves, strict=True)):
        if path not in known or np.shape(known[path]) != shape:
            had = f"has {np.shape(known[path])}" if path in known else "has none"
            raise ValueError(
                f"The result belongs to another network: its {path} is {shape}, and the float network {had}."
            )
    if len(given.paths) != len(start.paths):
        more = sorted(set(given.paths) - set(start.paths))
        raise ValueError(f"The result belongs to another network: it has no {more[0]}.")
    check_values(zip(given.paths, given.leaves, strict=True), "verify")
    return given


def _box(box, around, radius):
    """The ends of the boxes."""
    if (box is None) == (around is None):
        raise ValueError("verify takes box=(lower, upper), or around=x and radius=r: one of the two.")
    if box is not None:
        if radius is not None:
            raise ValueError("verify: radius goes with around; got box and radius.")
        if not isinstance(box, tuple) or len(box) != 2:
            raise ValueError(f"verify: box is a pair (lower, upper) of batches; got {type(box).__name__}.")
        lower, upper = box
        if jax.tree.structure(lower) != jax.tree.structure(upper):
            raise ValueError("verify: lower and upper differ in structure: give two batches of the same.")
    else:
        if radius is None:
            raise ValueError("verify: around=x takes a radius, such as radius=1 / 255.")
        _check_inputs(around, "around")
        leaves, structure = jax.tree.flatten(around)
        radii = jax.tree.leaves(radius)
        radii = radii if len(radii) == len(leaves) else radii * len(leaves)
        for r in radii:
            if not np.all(np.asarray(r) >= 0) or not np.all(np.isfinite(np.asarray(r, np.float64))):
                raise ValueError(f"verify: radius is a number of at least 0; got {np.min(np.asarray(r))}.")
        try:
            ends = [
                [
                    np.asarray(x, np.float64) + sign * np.broadcast_to(np.asarray(r, np.float64), np.shape(x))
                    for x, r in zip(leaves, radii, strict=True)
                ]
                for sign in (-1, 1)
            ]
        except ValueError as error:
            raise ValueError(f"verify: radius does not broadcast to the inputs: {error}") from error
        lower, upper = (structure.unflatten(end) for end in ends)
    for name, end in (("lower", lower), ("upper", upper)):
        _check_inputs(end, name)
    for lo, hi in zip(jax.tree.leaves(lower), jax.tree.leaves(upper), strict=True):
        lo, hi = np.asarray(lo), np.asarray(hi)
        if lo.shape != hi.shape:
            raise ValueError(f"verify: lower has shape {lo.shape} and upper {hi.shape}: give two batches of one shape.")
        if (lo > hi).any():
            at = tuple(map(int, np.argwhere(lo > hi)[0]))
            raise ValueError(f"verify: lower is above upper at {at}: {lo[at]} > {hi[at]}.")
    return lower, upper


def _check_inputs(batch, name):
    leaves = jax.tree.leaves(batch)
    if not leaves:
        raise ValueError(f"verify: {name} holds no arrays.")
    for x in map(np.asarray, leaves):
        if not np.issubdtype(x.dtype, np.floating) and x.dtype.name != "bfloat16":
            raise ValueError(
                f"verify: {name} holds {x.dtype}. Boxes are of floating inputs: integers, such as tokens, have no box. Give "
                "the embedded values, to a model that takes those."
            )
        if x.ndim < 1 or not len(x) or len(x) != len(np.asarray(leaves[0])):
            raise ValueError(
                f"verify: {name} holds an array of shape {x.shape}; the first axis is that of samples, of all."
            )
        if not np.isfinite(x.astype(np.float64)).all():
            raise ValueError(f"verify: {name} holds NaN or infinity.")

"""Plots of a quantized network on matplotlib axes, for notebooks and the report.

Every function draws on `ax`, or on the axes of a new figure if that is None, and returns the axes. Kernels are in the order
of the network, numbered from 1. Text and frames have the colours of the current matplotlib style. The colours of series are
safe for colour-blind readers, and visible on white and on black.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import jax.numpy as jnp
import numpy as np

from ..matrix import Info, QTensor
from ..matrix.explicit_mesh import anywhere
from ..network.certify import any_codes_bits
from ..network.quantized import Quantized

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, GRAY = "#0072b2", "#d55e00", "#009e73", "#8a8a8a"
NEEDED = "Plots need matplotlib: pip install 'jpfq[demo]'."
BARS = 64  # in a histogram of codes, at most
FEW = 33  # with at most so many levels, each has a tick and a separate bar
DENSE = 60  # with more kernels, lines and dots are finer
FINE = 64  # bins of float weights
PART = 2**24  # weights counted at a time


class Swept(Protocol):
    """The parts of a sweep that are plotted: the records of its settings, and the indices of those on the front."""

    @property
    def records(self) -> Sequence[dict[str, Any]]: ...

    @property
    def front(self) -> Sequence[int]: ...


@anywhere
def errors(quantized: Quantized, ax: "Axes | None" = None) -> "Axes":
    """Plots the relative errors of the kernels' outputs on the calibration data, in per cent.

    Also plots their floors: the errors that would remain on an infinitely fine grid, because the inputs come from kernels
    that are quantized themselves.

    Args:
        quantized: the result.
        ax: the axes to draw on; None for a new figure.

    Examples:
        >>> ax = jpfq.plot.errors(quantized)
    """
    ax = given_or_new(ax)
    found, floors = (100 * _of(quantized, f) for f in (lambda i: i.relative_error, lambda i: i.relative_floor))
    width = 1.4 if len(found) <= DENSE else 0.7
    ax.plot(_numbers(found), found, "o-", color=BLUE, label="error", markersize=_dot(found), linewidth=width)
    ax.plot(_numbers(floors), floors, color=GRAY, label="floor: error of the inputs", linewidth=width)
    return _finish(ax, "relative error, %", len(found))


@anywhere
def bits(quantized: Quantized, ax: "Axes | None" = None) -> "Axes":
    """Plots the stored bits per weight of the kernels, steps included, and the entropy of their codes.

    Args:
        quantized: the result.
        ax: the axes to draw on; None for a new figure.

    Examples:
        >>> ax = jpfq.plot.bits(quantized)
    """
    ax = given_or_new(ax)
    stored, entropy = [t.bits_per_weight for t in quantized.tensors.values()], _of(quantized, lambda i: i.entropy)
    _bars(ax, stored, color=BLUE, label="stored, steps included")
    ax.plot(_numbers(entropy), entropy, "o", color=ORANGE, label="entropy of the codes", markersize=_dot(entropy))
    return _finish(ax, "bits per weight", len(stored))


@anywhere
def sizes(quantized: Quantized, ax: "Axes | None" = None) -> "Axes":
    """Plots the sizes of the packed kernels beside their original sizes, in kB or MB.

    Args:
        quantized: the result.
        ax: the axes to draw on; None for a new figure.

    Examples:
        >>> ax = jpfq.plot.sizes(quantized)
    """
    ax = given_or_new(ax)
    tensors = quantized.tensors.values()
    before, after = (np.array([size(t) for t in tensors]) / 1e3 for size in (float_bytes, lambda t: t.nbytes))
    unit, scale = ("kB", 1) if before.max(initial=0) < 1e3 else ("MB", 1e-3)
    _bars(ax, before * scale, color=GRAY, alpha=0.4, label="as given")
    _bars(ax, after * scale, color=BLUE, label="quantized")
    return _finish(ax, unit, len(tensors))


@anywhere
def saturation(quantized: Quantized, ax: "Axes | None" = None) -> "Axes":
    """Plots the share of each kernel's weights that lie more than half a step beyond the grid, in per cent.

    Args:
        quantized: the result.
        ax: the axes to draw on; None for a new figure.

    Examples:
        >>> ax = jpfq.plot.saturation(quantized)
    """
    ax = given_or_new(ax)
    shares = 100 * _of(quantized, lambda i: i.saturation)
    _bars(ax, shares, color=ORANGE)
    return _finish(ax, "saturated, %", len(shares))


@anywhere
def accumulators(quantized: Quantized, ax: "Axes | None" = None) -> "Axes":
    """Plots the accumulator bits of kernels with bounded sums: requested, needed, and needed for any codes.

    Args:
        quantized: the result.
        ax: the axes to draw on; None for a new figure.

    Raises:
        ValueError: no kernel has bounded sums.

    Examples:
        >>> rule = jpfq.Rule(".*", bits=4, activation_bits=8, accumulator=jpfq.Accumulator(16, tile=64))
        >>> ax = jpfq.plot.accumulators(jpfq.quantize(model, batches, rule, variables=variables))
    """
    reaches = [(tensor, quantized.info[path].reach) for path, tensor in quantized.tensors.items()]
    found = [(i, tensor, reach) for i, (tensor, reach) in enumerate(reaches, 1) if reach is not None]
    if not found:
        raise ValueError(
            "No kernel has bounded sums: quantize with jpfq.Rule(.., accumulator=jpfq.Accumulator(16)). jpfq.certify "
            "computes the worst-case sums of any kernel with quantized inputs."
        )
    ax = given_or_new(ax)
    numbers = [i for i, *_ in found]
    marks = {
        "of any codes": ([any_codes_bits(tensor, reach)[1] for _, tensor, reach in found], "^", GRAY, 4),
        "asked for": ([int(reach.sums.bits) for *_, reach in found], "_", ORANGE, 9),
        "needed": ([reach.bits for *_, reach in found], "o", BLUE, 4),
    }
    for label, (widths, mark, color, size) in marks.items():
        ax.plot(numbers, widths, mark, color=color, label=label, markersize=size, markeredgewidth=1.5)
    _finish(ax, "bits of the accumulator", len(quantized.tensors)).locator_params("y", integer=True)
    shown = [width for widths, *_ in marks.values() for width in widths]
    ax.set_ylim(min(shown) - 1, max(shown) + 1)
    return ax


@anywhere
def histogram(tensor: QTensor, weights: Any = None, ax: "Axes | None" = None) -> "Axes":
    """Plots histograms of the codes of a kernel and of its float weights.

    The axis is in steps, so that all levels are at integers. Heights are the share of the weights per step, in per cent. If
    there are many levels, several share a bar. Float weights far beyond the grid are counted at its ends.

    Args:
        tensor: `quantized.tensors["head/kernel"]`, for example, or the result of `jpfq.solve`.
        weights: the kernel before quantization.
        ax: the axes to draw on; None for a new figure.

    Examples:
        >>> ax = jpfq.plot.histogram(quantized.tensors["head/kernel"], variables["params"]["head"]["kernel"])
    """
    positions = None if weights is None else _positions(tensor, weights)
    ax = given_or_new(ax)
    codes = np.asarray(tensor.codes).ravel()
    lo, hi = (int(x) for x in tensor.grid.alphabet()[:2])
    if hi - lo >= 4 * BARS:
        lo, hi = int(codes.min(initial=hi)), int(codes.max(initial=lo))
    levels = max(1, hi - lo + 1)
    run = -(-levels // BARS)  # codes in a bar
    bars = -(-levels // run)
    counts = _counts(codes, bars, lambda part: (part.astype(np.int64) - lo) // run)
    share = 100 / max(1, codes.size)
    width = 0.8 if levels <= FEW else run
    _bars(ax, counts * share / run, lo + run * np.arange(bars) + (run - 1) / 2, width, color=BLUE, label="codes")
    if positions is not None:
        margin = max(1, levels // 4)
        left = max(lo - 0.5 - margin, min(lo - 0.5, float(positions.min(initial=lo))))
        right = min(hi + 0.5 + margin, max(hi + 0.5, float(positions.max(initial=hi))))
        fine = (right - left) / FINE
        counts = _counts(positions, FINE, lambda part: np.clip((part - left) / fine, 0, FINE - 1).astype(np.int64))
        edges = np.linspace(left, right, FINE + 1)
        ax.stairs(counts * share / fine, edges, color=ORANGE, linewidth=1.2, label="float weights")
        ax.legend(**ABOVE)
    if levels <= FEW:
        ax.set_xticks(np.arange(lo, hi + 1), minor=True)
    ax.locator_params("x", integer=True, nbins=8)
    ax.set(xlabel="code", ylabel="% of weights", ylim=(0, None))
    return ax


def front(sweep: Swept, ax: "Axes | None" = None) -> "Axes":
    """Plots the losses of the settings of a sweep against bits per weight, and the front that no setting beats in both.

    Args:
        sweep: the result of `jpfq.sweep`.
        ax: the axes to draw on; None for a new figure.

    Examples:
        >>> ax = jpfq.plot.front(sweep)
    """
    ax = given_or_new(ax)
    point = lambda record: (record["bits_per_weight"], record["loss"])
    ax.plot(*_columns(map(point, sweep.records)), "o", color=GRAY, label="settings", markersize=4)
    best = _columns(point(sweep.records[i]) for i in sweep.front)
    ax.plot(*best, "o-", color=BLUE, label="front", markersize=5)
    ax.set(xlabel="bits per weight, as stored", ylabel="loss")
    ax.grid(alpha=0.3)
    ax.legend(**ABOVE)
    return ax


def float_bytes(tensor: QTensor) -> int:
    """Bytes of the kernel in its original dtype."""
    return tensor.codes.size * np.dtype(tensor.dtype).itemsize


ABOVE: dict[str, Any] = {
    "loc": "lower left",
    "bbox_to_anchor": (0, 1),
    "borderaxespad": 0.2,
    "ncols": 3,
    "frameon": False,
    "handlelength": 1.4,
    "columnspacing": 1.2,
}


def given_or_new(ax):
    """The given axes, or those of a new figure."""
    if ax is not None:
        if not hasattr(ax, "stairs"):
            raise ValueError(f"ax must be matplotlib axes, such as plt.subplots()[1]; got {ax!r}.")
        return ax
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ValueError(NEEDED) from error
    return plt.subplots(layout="constrained")[1]


def _finish(ax, label, count):
    """Labels the axis of kernels and the axis of values."""
    ax.set(xlabel="kernel, in the order of the network", ylabel=label, xlim=(0.4, max(count, 1) + 0.6), ylim=(0, None))
    ax.locator_params("x", integer=True)
    ax.grid(axis="y", alpha=0.3)
    if len(ax.get_legend_handles_labels()[0]) > 1:
        ax.legend(**ABOVE)
    return ax


def _bars(ax, heights: Sequence[float] | np.ndarray, centers=None, width=0.8, **style):
    """Bars as one shape, which keeps the SVG small."""
    centers = _numbers(heights) if centers is None else centers
    edges = np.stack([centers - width / 2, centers + width / 2], 1).ravel() if len(heights) else np.zeros(1)
    values = np.stack([heights, np.zeros(len(heights))], 1).ravel()[: max(0, len(edges) - 1)]
    ax.stairs(values, edges, fill=True, **style)


def _dot(values) -> float:
    """The size of a dot, smaller if there are many."""
    return 4 if len(values) <= DENSE else 1.6


def _of(quantized, metric: Callable[[Info], Any]) -> np.ndarray:
    return np.array([float(metric(quantized.info[path])) for path in quantized.tensors])


def _numbers(values) -> np.ndarray:
    return np.arange(1, len(values) + 1)


def _columns(points: Iterable[tuple[float, float]]) -> tuple[list[float], list[float]]:
    found = list(points)
    return [x for x, _ in found], [y for _, y in found]


def _counts(values: np.ndarray, bins: int, bin_of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Counts the values in each bin, a part at a time, since kernels may be large."""
    parts = np.array_split(values, values.size // PART + 1)
    return sum((np.bincount(bin_of(part), minlength=bins) for part in parts), np.zeros(bins, np.int64))


def _positions(tensor, weights) -> np.ndarray:
    """Float weights in units of the codes."""
    local = lambda x: jnp.asarray(np.asarray(x))  # on one device, wherever they are
    weights, tensor = local(weights), dataclasses.replace(tensor, step=local(tensor.step), zero=local(tensor.zero))
    if weights.shape != tensor.shape:
        raise ValueError(f"The weights must have the kernel's shape {tensor.shape}; got {weights.shape}.")
    found = np.asarray(tensor.levels.position(tensor.turned(weights))).ravel()
    if (levels := tensor.grid.table) is not None:  # codes are its indices: between two of them by the share of the way
        found = np.interp(found, levels, np.arange(len(levels)))
    if not np.isfinite(found).all():
        raise ValueError("The weights hold NaN or infinity, which have no place in a histogram: remove them.")
    return found

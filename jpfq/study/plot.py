"""`jpfq.plot`: plots of a quantized network (from report/result_plots.py), of a sweep, and of comparisons.

Functions draw on `ax`, or on the axes of a new figure if that is None. Those with a `path` write a file.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..report.result_plots import BLUE, GRAY, GREEN, NEEDED, ORANGE, Swept, given_or_new
from ..report.result_plots import accumulators as accumulators
from ..report.result_plots import bits as bits
from ..report.result_plots import errors as errors
from ..report.result_plots import front as front
from ..report.result_plots import histogram as histogram
from ..report.result_plots import saturation as saturation
from ..report.result_plots import sizes as sizes
from ..scalar import Grid
from .compare import Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = {"MSQ": ORANGE, "GPFQ": BLUE, "best": GREEN}


def scores(trials: Sequence[Trial], exact: float | None = None, ax: "Axes | None" = None) -> "Axes":
    """Plots the scores of one model against log2 of the number of levels, with a line per method and the float score."""
    ax = given_or_new(ax)
    scored = [trial for trial in trials if trial.score is not None]
    for method in dict.fromkeys(trial.method for trial in scored):
        points = sorted((t.grid.log2_levels, t.score) for t in scored if t.method == method)
        ax.plot(*zip(*points, strict=True), "o-", label=method, color=COLORS.get(method))
    if exact is not None:
        ax.axhline(exact, linestyle="--", color=GRAY, linewidth=1, label=f"float ({exact:.1f})")
    ticks = sorted({(t.grid.log2_levels, t.format or _label(t.grid)) for t in scored})
    ax.set_xticks([x for x, _ in ticks], [label for _, label in ticks])
    ax.set(xlabel="bits per weight: log2(levels)", ylabel="accuracy, %")
    ax.grid(alpha=0.3)
    ax.legend(loc="lower right", frameon=False)  # a corner that is usually empty, as more bits score higher
    return ax


def score_against_bits(trials: Sequence[Trial], floats: dict[str, float | None], path: Path) -> None:
    """Saves a figure with one panel for each model, drawn by `scores`."""
    names = list(dict.fromkeys(trial.subject for trial in trials))
    figure = _figure(5 * len(names))
    for ax, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        scores([trial for trial in trials if trial.subject == name], floats[name], ax).set_title(name)
    figure.savefig(path, dpi=150)


def loss_against_bits(sweep: Swept, path: Path) -> None:
    """Saves a figure of losses against bits per weight, drawn by `front`."""
    figure = _figure(6)
    front(sweep, figure.subplots())
    figure.savefig(path, dpi=150)


def _figure(width):
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError(NEEDED) from error
    return Figure(figsize=(width, 4), layout="constrained")


def _label(grid: Grid) -> str:
    bits = grid.log2_levels
    return f"{bits:.0f}" if bits == round(bits) else f"{bits:.2f}\n({grid.levels:.0f} levels)"

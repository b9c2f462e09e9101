"""Pictures, on matplotlib."""

from collections.abc import Sequence
from pathlib import Path

from ..scalar import Grid
from .compare import Trial

COLORS = {"MSQ": "#b0562f", "GPFQ": "#1f5fa8", "best": "#2a7d46"}


def score_against_bits(trials: Sequence[Trial], floats: dict[str, float | None], path: Path) -> None:
    """Saves one panel per model: score against log2 of the number of levels, a line per method, the float score dashed."""
    names = list(dict.fromkeys(trial.subject for trial in trials))
    figure = _figure(5 * len(names))
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        mine = [trial for trial in trials if trial.subject == name and trial.score is not None]
        for method in dict.fromkeys(trial.method for trial in mine):
            points = sorted((t.grid.log2_levels, t.score) for t in mine if t.method == method)
            axis.plot(*zip(*points, strict=True), "o-", label=method, color=COLORS.get(method))
        exact = floats[name]
        if exact is not None:
            axis.axhline(exact, linestyle="--", color="0.4", linewidth=1, label=f"float ({exact:.1f})")
        ticks = sorted({(t.grid.log2_levels, _label(t.grid)) for t in mine})
        axis.set_xticks([x for x, _ in ticks], [label for _, label in ticks])
        axis.set(title=name, xlabel="bits per weight: log2(levels)", ylabel="accuracy, %")
        axis.grid(alpha=0.25)
        axis.legend(loc="lower right", frameon=False)
    figure.savefig(path, dpi=150)


def loss_against_bits(records: Sequence[dict], front: Sequence[int], path: Path) -> None:
    """Saves the loss of every setting of a sweep against its bits per weight, and the front of those that none beats."""
    figure = _figure(6)
    axis = figure.subplots()
    point = lambda record: (record["bits_per_weight"], record["loss"])
    axis.plot(*zip(*map(point, records), strict=True), "o", color="0.6", label="settings")
    if front:
        axis.plot(*zip(*(point(records[i]) for i in front), strict=True), "o-", color=COLORS["GPFQ"], label="front")
    axis.set(xlabel="bits per weight, as stored", ylabel="loss")
    axis.grid(alpha=0.25)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=150)


def _figure(width):
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("Pictures need matplotlib: pip install 'jpfq[demo]'.") from error
    return Figure(figsize=(width, 4), layout="constrained")


def _label(grid: Grid) -> str:
    bits = grid.log2_levels
    return f"{bits:.0f}" if bits == round(bits) else f"{bits:.2f}\n({grid.levels:.0f} levels)"

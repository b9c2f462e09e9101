"""Pictures, on matplotlib."""

from collections.abc import Sequence
from pathlib import Path

from ..scalar import Grid
from .compare import Trial

COLORS = {"MSQ": "#b0562f", "GPFQ": "#1f5fa8", "best": "#2a7d46"}


def score_against_bits(trials: Sequence[Trial], floats: dict[str, float | None], path: Path) -> None:
    """Saves one panel per model: score against log2 of the number of levels, a line per method, the float score dashed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("Pictures need matplotlib: pip install 'jpfq[demo]'.") from error
    names = list(dict.fromkeys(trial.subject for trial in trials))
    figure = Figure(figsize=(5 * len(names), 4), layout="constrained")
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


def _label(grid: Grid) -> str:
    bits = grid.log2_levels
    return f"{bits:.0f}" if bits == round(bits) else f"{bits:.2f}\n({grid.levels:.0f} levels)"

"""The report: a quantized network on one page of HTML that needs nothing else, with pictures by matplotlib.

First the figures that matter, then pictures along the depth, the table of all kernels, and how their codes lie on their
levels; accumulators, inputs, and settings of a sweep where there are such; and what was left as it is, with the reasons.
"""

import importlib.metadata
import os
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from . import plot
from .activation import Rounded
from .functional import flatten
from .page import Cell, Markup, folded, joined, page, section, table, tag
from .picture import Pictures, check_matplotlib

if TYPE_CHECKING:
    from .quantize import Quantized

SHOWN = 12  # histograms to be seen at once
DRAWN = 120  # histograms at most
WIDE, SMALL = (5.4, 2.6), (3.0, 1.7)  # inches


def report(
    quantized: "Quantized",
    path: str | os.PathLike,
    *,
    params: Any = None,
    sweep: plot.Swept | None = None,
    title: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes the page: see `Quantized.report`."""
    path = Path(path)
    _check_path(path, overwrite)
    if title is not None and not isinstance(title, str):
        raise ValueError(f"title is a text; got {title!r}.")
    if sweep is not None and not (getattr(sweep, "records", None) and hasattr(sweep, "front")):
        raise ValueError(f"sweep is what jpfq.sweep returned; got {sweep!r}.")
    weights = {} if params is None else _weights(quantized, params)
    check_matplotlib()
    text = html(quantized, weights, sweep, title or "A quantized network")
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", suffix=".tmp", dir=path.parent) as folder:
        new = Path(folder) / path.name
        with open(new, "wb") as file:
            file.write(text.encode("utf-8", "xmlcharrefreplace"))
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    return path.absolute()


def html(quantized: "Quantized", weights: dict[str, Any], sweep: plot.Swept | None, title: str) -> str:
    """The page as text. `weights` are those before quantization, by path, where they are known."""
    draw = Pictures()
    parts = [tag("h1", title), _lead(quantized), _cards(quantized)]
    if quantized.tensors:
        parts += [_depth(quantized, draw), _kernels(quantized), _histograms(quantized, weights, draw)]
    if any(info.reach is not None for info in quantized.info.values()):
        parts.append(_accumulators(quantized, draw))
    if quantized.inputs or quantized.biases:
        parts.append(_inputs(quantized))
    if sweep is not None:
        parts.append(_sweep(sweep, draw))
    if quantized.skipped:
        parts.append(_skipped(quantized))
    return page(title, *parts, _footer(quantized))


def _lead(quantized):
    error = quantized.output_error
    trained = "The network was trained after quantization; figures of kernels are those of the quantization. "
    data = "Errors are relative, on the calibration data: between what the float and the quantized network have there."
    return tag("p", (trained if error != error else "") + data, class_="lead")


def _cards(quantized):
    """The figures that matter."""
    tensors = quantized.tensors.values()
    before, after = sum(map(plot.float_bytes, tensors)), quantized.nbytes
    everything = sum(leaf.nbytes for leaf in quantized._functional.leaves if isinstance(leaf, (jax.Array, np.ndarray)))
    error = quantized.output_error
    cards = [
        ("Kernels quantized", f"{len(tensors)}", f"{len(quantized.skipped)} left as they are"),
        ("Error of the outputs", "unknown" if error != error else _percent(error), "relative, on the calibration data"),
    ]
    if tensors:
        count = sum(tensor.codes.size for tensor in tensors)
        entropy = sum(float(quantized.info[p].entropy) * t.codes.size for p, t in quantized.tensors.items()) / count
        whole = f"the whole network {_ratio(everything - before + after, everything)} of its {_bytes(everything)}"
        cards[1:1] = [
            (
                "Bits per weight",
                f"{quantized.bits_per_weight:.2f}",
                f"steps included; entropy of the codes {entropy:.2f}",
            ),
            ("Size of the kernels", _bytes(after), f"{_ratio(after, before)} of {_bytes(before)}; {whole}"),
        ]
    return tag("div", *(tag("div", tag("span", a), tag("b", b), tag("span", c)) for a, b, c in cards), class_="cards")


def _depth(quantized, draw):
    pictures: list[tuple[Callable, str]] = [
        (
            plot.errors,
            "Errors of the kernels' outputs. The floor is what no grid would remove, however fine: it comes with the inputs, "
            "which kernels before have made.",
        ),
        (plot.bits, "Bits per weight. What lies between the bars and the dots, an entropy coder would save."),
        (plot.sizes, "Bytes of each kernel, before and after."),
        (
            plot.saturation,
            "Weights that wanted to go more than half a step beyond the grid. Where they are many, the grid is narrow.",
        ),
    ]
    made = [_figure(draw(partial(f, quantized), WIDE, words), words) for f, words in pictures]
    words = "Kernels are numbered in the order of the network, as in the table below."
    return section("Along the depth", tag("p", words, class_="lead"), tag("div", *made, class_="pictures"))


def _kernels(quantized):
    head = (
        "#",
        "kernel",
        "shape",
        "grid",
        "bits",
        "entropy",
        "error",
        "floor",
        "saturated",
        "zeros",
        "dead inputs",
        "bytes",
    )
    reach = any(info.reach is not None for info in quantized.info.values())
    worst = max(float(info.relative_error) for info in quantized.info.values()) or 1
    rows = []
    for number, (path, tensor) in enumerate(quantized.tensors.items(), 1):
        info = quantized.info[path]
        error = float(info.relative_error)
        row = [
            Cell(number, number),
            tag("span", path, class_="path"),
            Cell("×".join(map(str, tensor.shape)), tensor.codes.size),
            str(tensor.grid),
            _number(tensor.bits_per_weight),
            _number(info.entropy),
            Cell(_percent(error), error, error / worst),
            *(_share(x) for x in (info.relative_floor, info.saturation, info.sparsity)),
            Cell(f"{int(info.dead):,}", int(info.dead)),
            Cell(f"{tensor.nbytes:,}", tensor.nbytes),
        ]
        if reach:
            row.append("" if info.reach is None else f"{info.reach.bits} of {int(info.reach.sums.bits)} bits")
        rows.append(row)
    made = table([*head, *(["sums need"] if reach else [])], rows, words=4, class_="sorted")
    return section("Kernels", made)


def _histograms(quantized, weights, draw):
    """The kernels of largest error first; those beyond a number are not drawn."""
    numbered = list(enumerate(quantized.tensors.items(), 1))
    numbered.sort(key=lambda entry: -float(quantized.info[entry[1][0]].relative_error))
    made = []
    for number, (path, tensor) in numbered[:DRAWN]:
        error = _percent(float(quantized.info[path].relative_error))
        words = joined([tag("b", f"{number} · {path}"), Markup("<br>"), f"{tensor.grid}, error {error}"])
        picture = draw(partial(_histogram, tensor, weights.get(path)), SMALL, f"Codes of {path} over its levels")
        made.append(tag("figure", tag("figcaption", words), picture))
    before = (
        "the line is the float weights, in the same steps."
        if weights
        else "Pass params= for the float weights beside them."
    )
    lead = f"Shares of the weights on each level, kernels of the largest error first; {before}"
    if not weights:
        lead = f"Shares of the weights on each level, kernels of the largest error first. {before}"
    parts = [tag("p", lead, class_="lead"), tag("div", *made[:SHOWN], class_="pictures small")]
    if more := made[SHOWN:]:
        left = len(numbered) - DRAWN
        rest = f"The next {len(more)} kernels; jpfq.plot.histogram draws the other {left}"
        parts.append(
            folded(rest if left > 0 else f"The other {len(more)} kernels", tag("div", *more, class_="pictures small"))
        )
    return section("Weights on their levels", *parts)


def _histogram(tensor, weights, ax):
    plot.histogram(tensor, weights, ax)
    ax.set(xlabel="", ylabel="")
    if ax.get_legend() is not None:
        ax.get_legend().remove()


def _accumulators(quantized, draw):
    rows = []
    for number, (path, info) in enumerate(quantized.info.items(), 1):
        if (reach := info.reach) is not None:
            n = plot.inputs_of(quantized, path)
            widths = (int(reach.sums.bits), reach.sums.size(n), reach.bits)
            widths = (*widths, reach.types_bits(quantized.tensors[path].grid, n), reach.outer_bits)
            largest = int(np.max(np.asarray(reach.ends), initial=0))
            name = tag("span", path, class_="path")
            rows.append([number, name, *(Cell(x, x) for x in widths), Cell(f"{largest:,}", largest)])
    head = ("#", "sums of", "bits", "tile", "needed", "of any codes", "outer bits", "largest sum")
    words = "Widths of the signed integers that hold the sums of each kernel, whatever its inputs."
    picture = draw(partial(plot.accumulators, quantized), WIDE, words)
    lead = f"{words} Needed is what these codes take; of any codes, what all codes of the grid could."
    return section(
        "Accumulators",
        tag("p", lead, class_="lead"),
        tag("div", _figure(picture, ""), class_="pictures"),
        table(head, rows, words=2, class_="sorted"),
    )


def _inputs(quantized):
    parts = []
    if quantized.inputs:
        rows = []
        for path, uses in quantized.inputs.items():
            for number, rounded in enumerate(uses, 1):
                name = tag("span", path + (f", use {number}" if len(uses) > 1 else ""), class_="path")
                rows.append([name, str(rounded.settings.grid), rounded.settings.per, *_levels(rounded)])
        lead = "These kernels round their inputs while the network runs."
        parts += [
            tag("p", lead, class_="lead"),
            table(("inputs of", "grid", "a step per", "step", "from", "to"), rows, words=3, class_="sorted"),
        ]
    if quantized.biases:
        names = ", ".join(quantized.biases)
        parts.append(folded(f"{len(quantized.biases)} biases took the mean error of their layer", tag("p", names)))
    return section("Inputs and biases", *parts)


def _levels(rounded: Rounded):
    """Step and ends of the range that a layer's inputs are rounded to; over all channels where each has its own."""
    if rounded.levels is None:
        return ("taken from the row", "", "")
    levels = rounded.levels
    step = np.asarray(levels.step, np.float64)
    low, high = (
        step * (np.asarray(end, np.float64) - np.asarray(levels.zero, np.float64)) for end in (levels.lo, levels.hi)
    )
    shown = f"{step.min():.4g}" if step.min() == step.max() else f"{step.min():.4g} to {step.max():.4g}"
    return Cell(shown, float(step.min())), _number(low.min(), ".4g"), _number(high.max(), ".4g")


def _sweep(sweep, draw):
    records, front = sweep.records, set(sweep.front)
    figure = lambda x: Cell(f"{x:.5g}", x) if isinstance(x, float) else str(x)
    rows = [["★" if i in front else "", *map(figure, record.values())] for i, record in enumerate(records)]
    words = f"{len(records)} settings; no other beats those of the front in both loss and bits per weight."
    picture = draw(partial(plot.front, sweep), WIDE, words)
    return section(
        "Sweep",
        tag("p", words, class_="lead"),
        tag("div", _figure(picture, ""), class_="pictures"),
        folded("All settings", table(["front", *records[0]], rows, words=1, class_="sorted")),
    )


def _skipped(quantized):
    rows = [[tag("span", path, class_="path"), reason] for path, reason in quantized.skipped.items()]
    made = table(("left as it is", "because"), rows, words=2, class_="sorted")
    return section("Left as they are", folded(f"All {len(rows)}", made) if len(rows) > 24 else made)


def _footer(quantized):
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jpfq", "jax", "flax", "matplotlib"))
    peak = f"Peak of live activations while calibrating: {_bytes(quantized.peak_bytes)}."
    return tag("footer", tag("p", f"Written with {versions}. {peak}"))


def _figure(picture, words):
    return tag("figure", picture, tag("figcaption", words) if words else "")


def _weights(quantized, params):
    """The float weights of the quantized kernels by path."""
    paths, leaves, _ = flatten(params)
    given = dict(zip(paths, leaves, strict=True))
    for path, tensor in quantized.tensors.items():
        if path not in given:
            raise ValueError(
                f"params have no leaf {path!r}, which is quantized. They are to have the structure of quantized.params (of a "
                f"Linen module the collection 'params' alone); got {', '.join(paths[:8]) or 'no leaves'}."
            )
        if np.shape(given[path]) != tensor.shape:
            raise ValueError(f"params: {path} is of shape {tensor.shape}; got {np.shape(given[path])}.")
    return {path: given[path] for path in quantized.tensors}


def _check_path(path: Path, overwrite: bool):
    """Before the work, not after it."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file in it, such as {path / 'report.html'}.")
    if path.suffix not in (".html", ".htm"):
        raise ValueError(f"The report is an .html file; got {path.name!r}.")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"There is no folder {path.absolute().parent} for the report.")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} is there already: pass overwrite=True to replace it.")


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _share(value: Any) -> Cell:
    return Cell(_percent(float(value)), float(value))


def _number(value: Any, form: str = ".2f") -> Cell:
    return Cell(format(float(value), form), float(value))


def _ratio(part: float, whole: float) -> str:
    return f"{part / whole:.3f}"


def _bytes(count: int) -> str:
    """In the unit that leaves one to three digits before the point."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            break
        count /= 1000
    return f"{count} bytes" if unit == "bytes" else f"{count:.3g} {unit}" if count < 1000 else f"{count:,.0f} {unit}"

"""The HTML report of a quantized network: one self-contained file, with plots by matplotlib.

It begins with the main metrics, plots along the depth, a table of all kernels, and histograms of their codes. Accumulators,
inputs, and the settings of a sweep follow if there are any; then the kernels that were skipped, with the reasons.
"""

import importlib.metadata
import os
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..calibrate.activation import ActivationQuantizer
from ..calibrate.output_error import in_words
from ..model.functional import flatten
from ..network.certify import any_codes_bits
from ..network.quantized import Quantized
from ..network.size import in_bytes
from ..storage.files import hidden, writing
from . import result_plots as plots
from .html import Cell, Markup, breakable, document, folded, section, table, tag
from .svg import Frame, Plots, check_matplotlib

SHOWN = 12  # histograms that are visible at first
DRAWN = 200  # histograms at most
WIDE = Frame(346, 180, left=45, right=10, bottom=34, top=24)
SMALL = Frame(180, 108, left=28, right=6, bottom=18, top=6)


def report(
    quantized: Quantized,
    path: str | os.PathLike,
    *,
    params: Any = None,
    sweep: plots.Swept | None = None,
    title: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Writes the report: see `Quantized.report`."""
    path = Path(path)
    _check_path(path, overwrite)
    if title is not None and not isinstance(title, str):
        raise ValueError(f"title is a string; got {title!r}.")
    if sweep is not None and not (getattr(sweep, "records", None) and hasattr(sweep, "front")):
        raise ValueError(f"sweep is the result of jpfq.sweep; got {sweep!r}.")
    weights = {} if params is None else _weights(quantized, params)
    check_matplotlib()
    with writing(path), hidden(path.absolute().parent) as beside:
        text = html(quantized, weights, sweep, title or "A quantized network")
        new = beside / path.name
        with open(new, "wb") as file:
            file.write(text.encode("utf-8", "xmlcharrefreplace"))
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    return path.absolute()


def html(quantized: Quantized, weights: dict[str, Any], sweep: plots.Swept | None, title: str) -> str:
    """The report as text. `weights` has those before quantization by path, as far as they are known."""
    draw = Plots()
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
    return document(title, *parts, _footer(quantized))


def _lead(quantized):
    data = "Errors are relative errors of the quantized against the float network, on the calibration data."
    if quantized.output_error != quantized.output_error and quantized.outputs is None:
        data += " The network was trained afterwards; the metrics of its kernels are from before."
    return tag("p", data, class_="lead")


def _cards(quantized):
    """The main metrics."""
    tensors, error = quantized.tensors, quantized.output_error
    cards = [("Kernels quantized", f"{len(tensors):,}", f"{len(quantized.skipped):,} left as they are")]
    if tensors:
        sizes = {path: tensor.codes.size for path, tensor in tensors.items()}
        entropy = sum(sizes[path] * float(quantized.info[path].entropy) for path in tensors) / sum(sizes.values())
        before, after = sum(map(plots.float_bytes, tensors.values())), quantized.nbytes
        leaves = quantized._functional.leaves
        every = sum(leaf.nbytes for leaf in leaves if isinstance(leaf, (jax.Array, np.ndarray)))
        whole = f"the whole network {(every - before + after) / every:.3f} of {in_bytes(every)}"
        cards += [
            ("Bits per weight", f"{quantized.bits_per_weight:.2f}", f"steps included; entropy {entropy:.2f}"),
            ("Size of the kernels", in_bytes(after), f"{after / before:.3f} of the {in_bytes(before)} before; {whole}"),
        ]
    shown, words = f"{100 * error:.2f} %", "on the calibration data"
    if error != error:
        shown, _, words = in_words(error, quantized.outputs).replace("unknown since", "unknown, since").partition(", ")
    cards.append(("Error of the outputs", shown, words))
    return tag("div", *(tag("div", tag("span", a), tag("b", b), tag("span", c)) for a, b, c in cards), class_="cards")


def _depth(quantized, draw):
    """Plots of all kernels in order."""
    captions = {
        plots.errors: "Errors of the kernels' outputs. The floor is the error that remains on an arbitrarily fine grid: the "
        "inputs come from kernels that are quantized themselves.",
        plots.bits: "Bits per weight. An entropy coder would save the difference between the bars and the dots.",
        plots.sizes: "Size of each kernel, before and after.",
        plots.saturation: "Weights more than half a step beyond the grid. If they are many, the grid is too narrow.",
    }
    made = [_figure(draw(partial(f, quantized), WIDE, words), words) for f, words in captions.items()]
    lead = "Kernels are numbered in the order of the network, as in the table below."
    return section("Along the depth", tag("p", lead, class_="lead"), tag("div", *made, class_="pictures"))


def _kernels(quantized):
    """The table of all kernels."""
    shares = ("error, %", "floor, %", "saturated, %", "zeros, %")
    head = ["#", "kernel", "shape", "grid", "bits", "entropy", *shares, "dead inputs", "bytes"]
    bounded = any(info.reach is not None for info in quantized.info.values())
    worst = (
        max(
            (x for x in (float(info.relative_error) for info in quantized.info.values()) if x < float("inf")), default=0
        )
        or 1
    )
    rows = []
    for number, (path, tensor) in enumerate(quantized.tensors.items(), 1):
        info = quantized.info[path]
        error = float(info.relative_error)
        row = [
            Cell(number, number),
            breakable(path),
            Cell("x".join(map(str, tensor.shape)), tensor.codes.size),
            tensor.grid,
            _number(tensor.bits_per_weight),
            _number(info.entropy),
            Cell(f"{100 * error:.2f}", error, error / worst),
            *(_number(100 * x) for x in (info.relative_floor, info.saturation, info.sparsity)),
            _count(info.dead),
            _count(tensor.nbytes),
        ]
        if bounded:
            row.append("" if info.reach is None else f"{info.reach.bits} of {int(info.reach.sums.bits)}")
        rows.append(row)
    return section("Kernels", table([*head, "bits of sums"] if bounded else head, rows, words=4, class_="sorted"))


def _histograms(quantized, weights, draw):
    """Histograms of the codes, for the kernels of the largest errors first; at most `DRAWN` of them."""
    numbered = [(number, path) for number, path in enumerate(quantized.tensors, 1)]
    numbered.sort(key=lambda one: -float(quantized.info[one[1]].relative_error))
    made = []
    for number, path in numbered[:DRAWN]:
        tensor, error = quantized.tensors[path], float(quantized.info[path].relative_error)
        name, caption = tag("b", f"{number} · ", breakable(path)), f"{tensor.grid}, error {100 * error:.2f} %"
        svg = draw(partial(_histogram, tensor, weights.get(path)), SMALL, f"Codes of {path} over its levels")
        made.append(tag("figure", tag("figcaption", name, Markup("<br>"), caption), svg))
    lead = "Bars: shares of the weights on each level, in per cent."
    line = (
        " Line: the float weights in the same steps." if weights else " With params= the float weights are drawn too."
    )
    parts = [
        tag("p", lead + line + " Kernels of the largest error come first.", class_="lead"),
        tag("div", *made[:SHOWN], class_="pictures small"),
    ]
    if more := made[SHOWN:]:
        left = len(numbered) - len(made)
        title = f"The next {len(more)} kernels of {len(more) + left:,}" if left else f"The other {len(more)} kernels"
        parts.append(folded(title, tag("div", *more, class_="pictures small")))
    return section("Weights on their levels", *parts)


def _histogram(tensor, weights, ax):
    """Draws a histogram without labels and legend, which the report has once for all."""
    plots.histogram(tensor, weights, ax).set(xlabel="", ylabel="")
    ax.locator_params("x", nbins=6)
    ax.locator_params("y", nbins=4)
    if ax.get_legend() is not None:
        ax.get_legend().remove()


def _accumulators(quantized, draw):
    rows = []
    for number, (path, tensor) in enumerate(quantized.tensors.items(), 1):
        if (reach := quantized.info[path].reach) is not None:
            tile, most = any_codes_bits(tensor, reach)
            counts = (reach.sums.bits, tile, reach.bits, most, reach.outer_bits, reach.ends.max())
            rows.append([Cell(number, number), breakable(path), *map(_count, counts)])
    head = ("#", "sums of", "bits", "tile", "needed", "of any codes", "outer bits", "largest sum")
    words = "Widths of the signed integers that hold the sums of each kernel, whatever its inputs."
    return section(
        "Accumulators",
        tag("p", words, " Needed: for these codes. Of any codes: for any codes on the grid.", class_="lead"),
        tag("div", _figure(draw(partial(plots.accumulators, quantized), WIDE, words)), class_="pictures"),
        table(head, rows, words=2, class_="sorted"),
    )


def _inputs(quantized):
    parts = []
    if quantized.inputs:
        rows = []
        for number, path in enumerate(quantized.tensors, 1):
            uses = quantized.inputs.get(path, [])
            for use, quantizer in enumerate(uses, 1):
                name = path if len(uses) == 1 else f"{path}, use {use}"
                settings = quantizer.settings
                rows.append([Cell(number, number), breakable(name), settings.grid, settings.where, *_levels(quantizer)])
        for name in [name for name in quantized.inputs if name not in quantized.tensors]:
            settings = quantized.inputs[name][0].settings
            levels = _levels(quantized.inputs[name][0])
            rows.append([Cell("", 0), breakable(name), settings.grid, settings.where, *levels])
        head = ("#", "inputs of", "grid", "step per", "step", "from", "to")
        words = (
            "Inputs of these kernels, and operands of products without weights, are quantized while the network runs."
        )
        parts.append(tag("p", words, class_="lead"))
        parts.append(table(head, rows, words=4, class_="sorted"))
    if quantized.biases:
        title = f"{len(quantized.biases)} biases are corrected for the mean error of their layer"
        parts.append(folded(title, tag("p", ", ".join(quantized.biases))))
    return section("Inputs and biases", *parts)


def _levels(quantizer: ActivationQuantizer):
    """The step and the range of a quantizer; over all channels if each has its own."""
    if quantizer.levels is None:
        return (f"taken from the {quantizer.settings.per}", "", "")
    step, zero, lo, hi = (np.asarray(getattr(quantizer.levels, x), np.float64) for x in ("step", "zero", "lo", "hi"))
    shown = f"{step.min():.4g}" if step.min() == step.max() else f"{step.min():.4g} to {step.max():.4g}"
    ends = (step * (lo - zero)).min(), (step * (hi - zero)).max()
    return Cell(shown, float(step.min())), *(_number(x, ".4g") for x in ends)


def _sweep(sweep, draw):
    records, front = sweep.records, set(sweep.front)
    shown = lambda x: _number(x, ".5g") if isinstance(x, float) else x
    rows = [["*" if i in front else "", *map(shown, record.values())] for i, record in enumerate(records)]
    words = f"{len(records):,} settings. No setting beats those of the front in both loss and bits per weight."
    return section(
        "Sweep",
        tag("p", words, class_="lead"),
        tag("div", _figure(draw(partial(plots.front, sweep), WIDE, words)), class_="pictures"),
        folded("All settings", table(["front", *records[0]], rows, words=1, class_="sorted")),
    )


def _skipped(quantized):
    rows = [[breakable(path), reason] for path, reason in quantized.skipped.items()]
    made = table(("left as it is", "because"), rows, words=2, class_="sorted")
    return section("Left as they are", folded(f"All {len(rows):,}", made) if len(rows) > SHOWN else made)


def _footer(quantized):
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jpfq", "jax", "flax", "matplotlib"))
    peak = f"Peak of live activations while calibrating: {in_bytes(quantized.peak_bytes)}."
    return tag("footer", f"Written with {versions}. {peak}")


def _figure(svg, words=""):
    return tag("figure", svg, tag("figcaption", words) if words else "")


def _weights(quantized, params):
    """The float weights of the quantized kernels by path."""
    paths, leaves, _ = flatten(params)
    given = dict(zip(paths, leaves, strict=True))
    for path, tensor in quantized.tensors.items():
        if path not in given:
            raise ValueError(
                f"params have no leaf {path!r}, which is quantized. Give them in the structure of quantized.params (for a "
                f"Linen module the collection 'params' alone); got {', '.join(paths[:8]) or 'no leaves'}."
            )
        if np.shape(given[path]) != tensor.shape:
            raise ValueError(f"params: {path} must have shape {tensor.shape}; got {np.shape(given[path])}.")
    return given


def _check_path(path: Path, overwrite: bool):
    """Raises if the report cannot be written there, before any work is done."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file in it, such as {path / 'report.html'}.")
    if path.suffix not in (".html", ".htm"):
        raise ValueError(f"The report is an .html file; got {path.name!r}.")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"There is no folder {path.absolute().parent} for the report. Create it first.")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} is there already: pass overwrite=True to replace it.")


def _number(value: Any, form: str = ".2f") -> Cell:
    return Cell(format(float(value), form), float(value))


def _count(value: Any) -> Cell:
    return Cell(f"{int(value):,}", int(value))

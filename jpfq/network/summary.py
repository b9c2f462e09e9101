"""`summary`: a result as text. A table of its kernels, what was left and why, sizes and errors."""

import collections
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ..calibrate.output_error import OutputError, in_words
from ..model.sites import NO_KERNEL
from .certify import any_codes_bits
from .notes import inputs_notes, notes
from .size import parameters_of, sizes_in_words
from .table import table

if TYPE_CHECKING:
    from .quantized import Quantized

KINDS = {  # the last part of a path -> the word for one such parameter, and for several
    **dict.fromkeys(("bias", "b", "beta", "biases"), ("bias", "biases")),
    **dict.fromkeys(("scale", "gamma", "g", "scales"), ("norm scale", "norm scales")),
}
OTHER = "other parameter that no product uses", "other parameters that no product uses"


def summary(quantized: "Quantized") -> str:
    """The text of `Quantized.summary`."""
    rows = []
    for path, tensor in quantized.tensors.items():
        info = quantized.info[path]
        shares = [_share(float(x)) for x in (info.relative_error, info.saturation, info.sparsity)]
        shape = "x".join(map(str, tensor.shape))
        bits = (f"{tensor.bits_per_weight:.2f}", f"{float(info.entropy):.2f}")
        rows.append((path, shape, str(tensor.grid), *bits, *shares, str(int(info.dead))))
    head = ("kernel", "shape", "grid", "bits", "entropy", "error", "saturated", "zeros", "dead inputs")
    lines = [table(head, rows)] if rows else []
    if any(info.reach is not None for info in quantized.info.values()):
        lines.append(_accumulators(quantized))
    lines += [note for path, info in quantized.info.items() for note in notes(path, info)]
    rest = [path for path, _ in parameters_of(quantized._functional) if path not in quantized.tensors]
    lines += left(quantized.skipped, rest)
    if quantized.uses:
        shared = ", ".join(f"{path} ({count})" for path, count in quantized.uses.items())
        lines.append(f"Kernels used by several products, quantized on the inputs of all of them: {shared}.")
    if quantized.embeddings:
        tied = lambda count: f" (tied: also the weight of {count} product{'s' * (count > 1)})" if count else ""
        named = ", ".join(path + tied(count) for path, count in quantized.embeddings.items())
        lines.append(f"Embeddings quantized by rows, before all layers; their error is that of all rows: {named}.")
    lines += inputs_notes(quantized.inputs, quantized.tensors, quantized.biases)
    if quantized.learned is not None:
        lines.append(str(quantized.learned))
    sizes = sizes_in_words(quantized.bits_per_weight, quantized.nbytes, quantized.size)
    errors = errors_in_words(quantized.output_error, quantized.outputs, quantized.held_out)
    peak = f"Peak of live activations: {quantized.peak_bytes:,} bytes."
    lines.append(f"{len(quantized.tensors)} kernels quantized to {sizes}. {errors} {peak}")
    return "\n\n".join(lines)


def left(skipped: Mapping[str, str], rest: Iterable[str]) -> list[str]:
    """The kernels left in float: a table of kernels with the reason for each, and a line that counts biases and norms.

    Args:
        skipped: the reason, by path of each kernel.
        rest: paths of all parameters that are not quantized.
    """
    small = [path for path in rest if path not in skipped or (kind_of(path) and NO_KERNEL in skipped[path])]
    kernels = [(path, reason) for path, reason in skipped.items() if path not in small]
    lines = [table(("left as it is", "because"), kernels)] if kernels else []
    if small:
        lines.append(f"Also left: {counted(small)}.")
    return lines


def counted(paths: Iterable[str]) -> str:
    """The number of parameters of each kind, such as "24 biases and 13 norm scales"."""
    kinds = collections.Counter(kind_of(path) or OTHER for path in paths)
    phrases = [f"{count:,} {words[count > 1]}" for words, count in sorted(kinds.items())]
    return " and ".join([", ".join(phrases[:-1])] * (len(phrases) > 1) + phrases[-1:])


def kind_of(path: str) -> tuple[str, str] | None:
    """The words for a parameter that is no kernel, by the last part of its path; None for any other name."""
    return KINDS.get(path.rpartition("/")[2])


def errors_in_words(error: float, outputs: OutputError | None, held_out: OutputError | None) -> str:
    """A sentence about the error of the outputs, which says on which batches it was measured."""
    known = error == error or outputs is not None
    calibration = f"{in_words(error, outputs)}{' on the calibration batches' if known else ''}"
    other = "" if held_out is None else f", {in_words(held_out.error_or_nan, held_out)} on the batches held out"
    return f"Relative error of the outputs: {calibration}{other}."


def _share(x):
    return "unknown" if x != x else f"{x:.2%}"


def _accumulators(quantized):
    """A table of the kernels with bounded sums: the accumulator bits requested, needed, and needed for any codes."""
    rows = []
    for path, info in quantized.info.items():
        if (reach := info.reach) is not None:
            tile, most = any_codes_bits(quantized.tensors[path], reach)
            widths = (int(reach.sums.bits), tile, reach.bits, most, reach.outer_bits)
            rows.append((path, *map(str, widths), f"{int(reach.ends.max()):,}"))
    return table(("sums of", "bits", "tile", "needed", "of any codes", "outer bits", "largest sum"), rows)

"""The text about a quantized network: a table of its kernels, and sentences."""

from typing import TYPE_CHECKING

from ..calibrate.output_error import in_words
from .certify import any_codes_bits
from .notes import notes
from .table import table

if TYPE_CHECKING:
    from .quantized import Quantized


def summary(quantized: "Quantized") -> str:
    """A table of all kernels, and everything that is to be said of the result: see `Quantized.summary`."""
    rows = []
    for path, tensor in quantized.tensors.items():
        info = quantized.info[path]
        shares = [_share(float(x)) for x in (info.relative_error, info.saturation, info.sparsity)]
        shape = "x".join(map(str, tensor.shape))
        bits = (f"{tensor.bits_per_weight:.2f}", f"{float(info.entropy):.2f}")
        rows.append((path, shape, str(tensor.grid), *bits, *shares, str(int(info.dead))))
    head = ("kernel", "shape", "grid", "bits", "entropy", "error", "saturated", "zeros", "dead inputs")
    lines = [table(head, rows)]
    if any(info.reach is not None for info in quantized.info.values()):
        lines.append(_accumulators(quantized))
    lines += [note for path, info in quantized.info.items() for note in notes(path, info)]
    if quantized.skipped:
        lines.append(table(("left as it is", "because"), list(quantized.skipped.items())))
    if quantized.uses:
        shared = ", ".join(f"{path} ({count})" for path, count in quantized.uses.items())
        lines.append(f"Kernels used by several products, quantized on the inputs of all of them: {shared}.")
    if quantized.inputs or quantized.biases:
        lines.append(
            f"Inputs of {len(quantized.inputs)} kernels are quantized while the network runs; {len(quantized.biases)} "
            "biases are corrected for the mean error of their layer."
        )
    if quantized.learned is not None:
        lines.append(str(quantized.learned))
    lines.append(
        f"{len(quantized.tensors)} kernels quantized to {quantized.bits_per_weight:.2f} bits per weight "
        f"({quantized.nbytes:,} bytes); {len(quantized.skipped)} left as they are. Relative error of the outputs: "
        f"{in_words(quantized.output_error, quantized.outputs)}. "
        f"Peak of live activations: {quantized.peak_bytes:,} bytes."
    )
    return "\n\n".join(lines)


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

"""The contents of a saved result, kernel by kernel."""

import os
from typing import Any

import jax

from ..calibrate.output_error import in_words
from ..model.adapters import phrase_of
from ..network.table import table
from ..storage.leaves import SUFFIXES
from ..storage.save import made
from ..storage.store import read, seal


def inspect(folder: str | os.PathLike) -> dict[str, Any]:
    """Figures of a saved result, in terms of JSON.

    Bytes are those on disk: of a kernel its codes, steps and zero points; of the folder everything. `float_bytes` are those
    that all parameters and state would take as they were given.
    """
    document, arrays = read(folder)
    sizes = {name: x.nbytes for name, x in arrays.items()}
    quantized = made(document, arrays)
    kernels = []
    for path, tensor in quantized.tensors.items():
        size = sum(sizes.get(f"{path}{suffix}", 0) for suffix in SUFFIXES)
        kernels.append(
            {
                "kernel": path,
                "shape": list(tensor.shape),
                "grid": str(tensor.grid),
                "bits": 8 * size / max(1, tensor.codes.size),
                "error": _number(quantized.info[path].relative_error),
                "bytes": size,
            }
        )
    leaves = quantized._functional.leaves
    return {
        "model": document["model"],
        "versions": document["versions"],
        "kernels": kernels,
        "skipped": quantized.skipped,
        "output_error": _number(quantized.output_error),
        "output_error_in_words": in_words(quantized.output_error, quantized.outputs),
        "bytes": len(seal(document)) + document["arrays"]["bytes"],
        "float_bytes": sum(leaf.nbytes for leaf in leaves if isinstance(leaf, jax.Array)),
    }


def inspected(figures: dict[str, Any]) -> str:
    """The same as text."""
    share = lambda x: "" if x is None else f"{x:.2%}"
    rows = [
        (
            k["kernel"],
            "x".join(map(str, k["shape"])),
            k["grid"],
            f"{k['bits']:.2f}",
            share(k["error"]),
            f"{k['bytes']:,}",
        )
        for k in figures["kernels"]
    ]
    lines = [table(("kernel", "shape", "grid", "bits", "error", "bytes"), rows)]
    if figures["skipped"]:
        lines.append(table(("left as it is", "because"), list(figures["skipped"].items())))
    lines.append(
        f"Made of {phrase_of(figures['model'])} by jpfq {figures['versions'].get('jpfq')}. "
        f"{figures['bytes']:,} bytes on disk, everything included; as given {figures['float_bytes']:,}. "
        f"Relative error of the outputs: {figures['output_error_in_words']}."
    )
    return "\n\n".join(lines)


def _number(x):
    """As JSON has it, which knows no numbers that are not finite."""
    value = float(x)
    return value if abs(value) < float("inf") else None

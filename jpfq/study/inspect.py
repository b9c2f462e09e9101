"""Describes a saved result, kernel by kernel."""

import os
from typing import Any

import jax

from ..model.adapters import phrase_of
from ..network.size import parameters_of
from ..network.summary import errors_in_words, left
from ..network.table import table
from ..storage.leaves import SUFFIXES
from ..storage.save import made
from ..storage.store import read, seal


def inspect(folder: str | os.PathLike) -> dict[str, Any]:
    """The contents of a saved result as a JSON document.

    Bytes are those of the files: for a kernel its codes, steps and zero points, for the result everything. `float_bytes` is
    the size of all parameters and state before quantization.
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
        "left": [path for path, _ in parameters_of(quantized._functional) if path not in quantized.tensors],
        "output_error": _number(quantized.output_error),
        "held_out_error": None if quantized.held_out_error is None else _number(quantized.held_out_error),
        "output_error_in_words": errors_in_words(quantized.output_error, quantized.outputs, quantized.held_out),
        "bits_per_weight": quantized.bits_per_weight,
        "total_bits_per_weight": quantized.size.bits_per_weight,
        "bytes": len(seal(document)) + document["arrays"]["bytes"],
        "float_bytes": sum(leaf.nbytes for leaf in leaves if isinstance(leaf, jax.Array)),
    }


def as_text(contents: dict[str, Any]) -> str:
    """The same as a text with tables."""
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
        for k in contents["kernels"]
    ]
    lines = [table(("kernel", "shape", "grid", "bits", "error", "bytes"), rows)]
    lines += left(contents["skipped"], contents["left"])
    lines.append(
        f"Made from {phrase_of(contents['model'])} by jpfq {contents['versions'].get('jpfq')}. "
        f"{contents['bytes']:,} bytes in files, everything included; {contents['float_bytes']:,} before quantization. "
        f"{contents['bits_per_weight']:.2f} bits per weight of the kernels, {contents['total_bits_per_weight']:.2f} of the "
        f"whole model. {contents['output_error_in_words']}"
    )
    return "\n\n".join(lines)


def _number(x):
    """A number for JSON, which has none that are not finite; None for those."""
    value = float(x)
    return value if abs(value) < float("inf") else None

"""Results in GGUF, the files of llama.cpp: the float model's file with its matrices in the types of quants.py.

Everything else, tokenizer included, is that of the float model's file. Which parameter a tensor of the file is, is found by
value, whatever both are called: the quantized kernel that correlates with it, with rows in either of the two orders that
rotary positions have.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..storage.files import hidden, writing
from .match import mark, nearest
from .matrix import operands_left, products, values
from .quants import Blocks, blocks_of

MOSTLY = {"Q4_K": "MOSTLY_Q4_K_M", "Q4_1": "MOSTLY_Q4_1", "Q4_0": "MOSTLY_Q4_0", "Q6_K": "MOSTLY_Q6_K"}  # of a file
MISSING = "GGUF files take the package gguf: pip install 'jpfq[hub]'."


class _Matrix(NamedTuple):
    """A parameter as a matrix (out, in), or a vector."""

    path: str
    value: np.ndarray
    packed: Blocks | None


def gguf(
    quantized: Any,
    file: str | os.PathLike,
    *,
    like: str | os.PathLike | None = None,
    batch: Any = None,
    overwrite: bool = False,
) -> dict[str, str]:
    """Writes a GGUF file.

    Kernels of `jpfq.formats.q4_0`, `q4_1`, `q8_0`, `q4_k` and `q6_k` are held.

    Args:
        quantized: a result without quantized inputs, which the format does not have.
        file: to be written.
        like: the GGUF file of the float model.
        batch: an input, as for compressed-tensors.
        overwrite: whether to replace a file.

    Returns:
        By path, the reason for each quantized kernel that is written dequantized.

    Raises:
        ValueError: a quantized kernel is none of the file's tensors, or may be one of several; or the file exists.
    """
    try:
        import gguf as package
    except ImportError as error:
        raise ValueError(MISSING) from error
    file = Path(file)
    if file.exists() and not overwrite:
        raise ValueError(f"{file} exists: give another name, or overwrite=True.")
    if like is None:
        raise ValueError("GGUF files have the names and the settings of the float model's file: give it as like=.")
    if quantized.inputs.keys() & quantized.tensors.keys():
        raise ValueError("GGUF holds weights: llama.cpp rounds inputs its own way. Quantize without activations.")
    try:
        reader = package.GGUFReader(like)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ValueError(f"like={str(like)!r} is no GGUF file that can be read: {error}.") from error
    sites = {} if batch is None else products(quantized._functional, batch)
    left = operands_left(quantized)
    known = [_matrix(quantized, path, leaf, sites, left) for path, leaf in _leaves(quantized)]
    found = _matched(reader, package, known, (*quantized.tensors, *quantized.biases))
    kinds = package.GGMLQuantizationType
    content = package.GGUFWriter(None, _value(reader, "general.architecture"))
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
            content.add_key_value(
                key, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None
            )
    used = {match.packed.kind for match, _ in found.values() if match.packed}
    most = next((name for kind, name in MOSTLY.items() if kind in used), "MOSTLY_Q8_0")
    content.add_file_type(package.LlamaFileType[most])
    for tensor in reader.tensors:
        if tensor.name not in found:
            content.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            continue
        match, rows = found[tensor.name]
        if match.packed is None:
            content.add_tensor(tensor.name, np.ascontiguousarray(match.value[rows], np.float32))
        else:
            kind, data = match.packed
            content.add_tensor(tensor.name, data[rows], raw_dtype=kinds[kind])
    with writing(file):
        file.absolute().parent.mkdir(parents=True, exist_ok=True)
        with hidden(file.absolute().parent) as beside:
            content.write_header_to_file(beside / file.name)
            content.write_kv_data_to_file()
            content.write_tensors_to_file()
            content.close()
            (beside / file.name).replace(file)
    return left


def _leaves(quantized):
    functional = quantized._functional
    rows = zip(functional.paths, functional.leaves, functional.trainable, strict=True)
    return [(path, leaf) for path, leaf, ours in rows if ours and np.ndim(leaf) in (1, 2, 3)]


def _matrix(quantized, path, leaf, sites, left) -> _Matrix:
    tensor = quantized.tensors.get(path)
    if tensor is None:
        value = np.asarray(leaf, np.float32)
        return _Matrix(path, value.T if value.ndim == 2 and path.rpartition("/")[2] == "kernel" else value, None)
    site = sites.get(path)
    try:
        value = values(tensor, path, site)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    try:
        return _Matrix(path, value, blocks_of(tensor, path, site))
    except ValueError as error:
        left[path] = str(error)
        return _Matrix(path, value, None)


def _value(reader, key) -> Any:
    return reader.fields[key].contents() if key in reader.fields else None


def _matched(reader, package, known: list[_Matrix], changed: Sequence[str]) -> dict[str, tuple[_Matrix, Any]]:
    """By name of a tensor of the file, the parameter and the order of its rows; `changed` must be among them."""
    kind = _value(reader, "general.architecture")
    counts = (_value(reader, f"{kind}.attention.{name}") for name in ("head_count", "head_count_kv"))
    heads = {int(count) for count in counts if count is not None}
    marks = [(match, mark(match.value)) for match in known]
    found, taken = {}, {}
    for tensor in reader.tensors:
        value, candidates = package.quants.dequantize(tensor.data, tensor.tensor_type), []
        for match, own in marks:
            if match.value.shape == value.shape:
                orders = [slice(None), *_orders(len(value), heads)] if value.ndim == 2 else [slice(None)]
                candidates += [(own[rows], match.path, (match, rows)) for rows in orders]
        if best := nearest(tensor.name, mark(value), candidates, changed):
            found[tensor.name], taken[best.path] = best.how, tensor.name
    lost = [path for path in changed if path not in taken]
    if lost:
        raise ValueError(
            f"{lost[0]} is none of the tensors of the file: like= is to be the file of the very model that was quantized."
        )
    return found


def _orders(rows: int, heads: set[int]) -> list[np.ndarray]:
    """Rows of queries or keys with coordinates i and i + d / 2 of a head as neighbours, as a Llama of llama.cpp has them."""
    fit = [h for h in heads if rows % (2 * h) == 0]
    return [np.arange(rows).reshape(h, 2, -1).swapaxes(1, 2).ravel() for h in fit]

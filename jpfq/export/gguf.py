"""Results in GGUF, the files of llama.cpp: the float model's file with its matrices in Q4_0 or Q8_0.

    Q4_0    blocks of 32 inputs: a float16 step d, and 32 codes of 4 bits with 8 added; value = (code - 8) d. The low halves
            of the 16 bytes are codes 0 to 15, the high halves 16 to 31
    Q8_0    a float16 step, and 32 codes int8

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
from .matrix import integers, is_half, operands_left, products, values

BLOCK = 32
MISSING = "GGUF files take the package gguf: pip install 'jpfq[hub]'."


class _Matrix(NamedTuple):
    """A parameter as a matrix (out, in), or a vector."""

    path: str
    value: np.ndarray
    packed: tuple[str, np.ndarray, np.ndarray] | None  # kind, codes and steps (out, blocks)


def gguf(
    quantized: Any,
    file: str | os.PathLike,
    *,
    like: str | os.PathLike | None = None,
    batch: Any = None,
    overwrite: bool = False,
) -> dict[str, str]:
    """Writes a GGUF file.

    Kernels in groups of 32 inputs with float16 steps are held (`jpfq.formats.q4_0`, `q8_0`).

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
    used = {match.packed[0] for match, _ in found.values() if match.packed}
    content.add_file_type(package.LlamaFileType.MOSTLY_Q4_0 if "Q4_0" in used else package.LlamaFileType.MOSTLY_Q8_0)
    for tensor in reader.tensors:
        if tensor.name not in found:
            content.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
            continue
        match, rows = found[tensor.name]
        if match.packed is None:
            content.add_tensor(tensor.name, np.ascontiguousarray(match.value[rows], np.float32))
        else:
            kind, codes, steps = match.packed
            content.add_tensor(tensor.name, blocks(kind, codes[rows], steps[rows]), raw_dtype=kinds[kind])
    with writing(file):
        file.absolute().parent.mkdir(parents=True, exist_ok=True)
        with hidden(file.absolute().parent) as beside:
            content.write_header_to_file(beside / file.name)
            content.write_kv_data_to_file()
            content.write_tensors_to_file()
            content.close()
            (beside / file.name).replace(file)
    return left


def blocks(kind: str, codes: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """The bytes (out, bytes) of codes (out, in) about 0 and steps (out, in / 32)."""
    out = len(codes)
    codes = codes.reshape(out, -1, BLOCK)
    if kind == "Q4_0":
        shifted = (codes + 8).astype(np.uint8)
        packed = shifted[..., : BLOCK // 2] | shifted[..., BLOCK // 2 :] << 4
    else:
        packed = codes.astype(np.int8).view(np.uint8)
    step = steps.astype(np.float16)[..., None].view(np.uint8)
    return np.ascontiguousarray(np.concatenate([step, packed], -1)).reshape(out, -1)


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
        return _Matrix(path, value, _packed(tensor, path, site))
    except ValueError as error:
        left[path] = str(error)
        return _Matrix(path, value, None)


def _packed(tensor, path, site) -> tuple[str, np.ndarray, np.ndarray]:
    """Kind, codes and steps of a kernel; ValueError says why the format has none."""
    found, bits, symmetric = integers(tensor, path, site)
    if bits > 8 or not symmetric:
        raise ValueError(f"{tensor.grid} is no run of integers of 8 bits about 0")
    grouped = found.in_groups(BLOCK)
    if grouped is None or not is_half(grouped.step):
        raise ValueError("its steps are not of float16, one for every 32 inputs: see jpfq.formats.q4_0 and q8_0")
    return "Q4_0" if bits <= 4 else "Q8_0", found.codes, grouped.step


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

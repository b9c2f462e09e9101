"""The `Info` of kernels in a saved result: metrics by field in JSON, and the worst-case integer sums, packed.

Every such sum is nu p + mu g of whole numbers p and g, so all of a kernel are multiples of one unit: of nu, the largest
input code, where inputs have no sign. Sums are kept in that unit, each in as many bits as the largest takes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from ..matrix import Info, QTensor
from ..scalar import SumSpec, WorstCase
from ..scalar.integer_sums import MAX_WIDTH
from .codec import column, uncolumn

NEEDED = {f.name: f.default is dataclasses.MISSING for f in dataclasses.fields(Info) if f.name != "reach"}  # by metric
FIELDS = ("bits", "lo", "hi", "tile", "shape", "unit", "width")
SUFFIX = ".reach"  # of the array of sums, after the name of its kernel
LARGEST = 2**31 - 1


class Noted(NamedTuple):
    """A record of one kernel: which sums, (matrices, tiles, out) of them, their unit, and bits of each in it."""

    sums: SumSpec
    shape: tuple[int, int, int]
    unit: int
    width: int


def write_infos(infos: Sequence[Info]) -> tuple[dict[str, Any], dict[int, np.ndarray]]:
    """The metrics of all kernels in order, and by index of the kernel its packed sums, where they are bounded."""
    told = [name for name in NEEDED if any(_is_told(getattr(info, name), name) for info in infos)]
    columns = {name: column([getattr(info, name) for info in infos]) for name in told}
    rows, arrays = [], {}
    for number, info in enumerate(infos):
        if info.reach is not None:
            ends, sums = np.asarray(info.reach.ends), info.reach.sums
            unit = int(np.gcd.reduce(ends, axis=None)) or 1
            words = ends.reshape(-1, 1) // unit
            width = int(words.max(initial=0)).bit_length()
            arrays[number] = np.packbits(words >> np.arange(width, dtype=np.int32) & 1, bitorder="little")
            rows.append((sums.bits, sums.lo, sums.hi, sums.tile, list(ends.shape[:3]), unit, width))
    if rows:
        fields = dict(zip(FIELDS, zip(*rows, strict=True), strict=True))
        columns["reach"] = {"kernels": list(arrays)} | {name: column(values) for name, values in fields.items()}
    return columns, arrays


def _is_told(x, name):
    """True if a metric is not its default."""
    default = getattr(Info, name, None)
    return NEEDED[name] or (x is not None and (default is None or bool(np.any(np.asarray(x) != default))))


def read_infos(columns: Mapping[str, Any], paths: Sequence[str], reaches: Mapping[str, WorstCase]) -> dict[str, Info]:
    """The `Info` of each kernel that `write_infos` noted, by path; the worst-case sums are read before.

    Raises:
        ValueError: not what `write_infos` writes. Likewise `read_noted` and `read_reach`.
    """
    columns = {name: x for name, x in columns.items() if name != "reach"}
    wrong = [name for name, needed in NEEDED.items() if needed and paths and not isinstance(columns.get(name), dict)]
    wrong += sorted(columns.keys() - NEEDED)
    if wrong:
        raise ValueError(f"It has other metrics of a kernel than this jpfq knows: {', '.join(wrong)}.")
    values = {name: uncolumn(x, len(paths)) for name, x in columns.items()}
    figures = lambda i: {name: x[i] for name, x in values.items()}
    return {path: Info(**figures(i), reach=reaches.get(path)) for i, path in enumerate(paths)}


def read_noted(columns: Mapping[str, Any], count: int) -> dict[int, Noted]:
    """The records of bounded sums, by index of the kernel, of `count`."""
    if "reach" not in columns:
        return {}
    record = columns["reach"]
    if not isinstance(record, dict) or record.keys() != {"kernels", *FIELDS}:
        raise ValueError(f"Expected how far sums go; got {str(record)[:80]!r}.")
    numbers = record["kernels"]
    whole = isinstance(numbers, list) and all(type(i) is int and 0 <= i < count for i in numbers)
    if not whole or sorted(set(numbers)) != numbers:
        raise ValueError(f"Expected numbers of {count} kernels in order; got {str(numbers)[:80]!r}.")
    shapes = _shapes(record["shape"], len(numbers))
    rest = (uncolumn(record[name], len(numbers)) for name in FIELDS if name != "shape")
    return {i: _noted(shape, *row) for i, shape, *row in zip(numbers, shapes, *rest, strict=True)}


def read_reach(noted: Noted, words: np.ndarray, tensor: QTensor, name: str) -> WorstCase:
    """The `WorstCase` of a kernel's sums, from the record of them and its packed sums."""
    matrices, tiles, out = noted.shape
    n, more = divmod(tensor.codes.size, matrices * out)
    if more or not n or noted.sums.tiles(n) != tiles or tensor.grid.alphabet().zero is None:
        raise ValueError(f"{name} of shape {tensor.shape} on {tensor.grid} has no sums of shape {noted.shape}.")
    count, width = 2 * matrices * tiles * out, noted.width
    if words.dtype != np.uint8 or words.shape != (-(-count * width // 8),):
        raise ValueError(f"{name} has {count} sums of {width} bits in {words.nbytes} bytes of {words.dtype.name}.")
    bits = np.unpackbits(words, count=count * width, bitorder="little").reshape(count, width)
    ends = noted.unit * sum((bits[:, i].astype(np.int64) << i for i in range(width)), np.zeros(count, np.int64))
    if ends.max() > LARGEST:
        raise ValueError(f"{name} has sums that no accumulator holds.")
    return WorstCase(noted.sums, jnp.asarray(ends.astype(np.int32).reshape(*noted.shape, 2)))


def _shapes(values, count):
    right = isinstance(values, list) and len(values) == count
    if not right or not all(
        isinstance(shape, list) and len(shape) == 3 and all(map(_counts, shape)) for shape in values
    ):
        raise ValueError(f"Expected {count} shapes of sums; got {str(values)[:80]!r}.")
    return map(tuple, values)


def _noted(shape, bits, lo, hi, tile, unit, width):
    found = [np.asarray(x) for x in (bits, lo, hi)]
    if any(x.dtype.kind != "i" or x.ndim for x in found) or not (
        2 <= found[0] <= MAX_WIDTH and -LARGEST <= found[1] <= 0 <= found[2] <= LARGEST and found[1] < found[2]
    ):
        raise ValueError(f"Expected sums of 2 to {MAX_WIDTH} bits; got {bits} bits of inputs from {lo} to {hi}.")
    if not (tile is None or _counts(tile)) or not _counts(unit) or type(width) is not int or not 0 <= width < 32:
        raise ValueError(f"Expected a tile, a unit and a width; got {str((tile, unit, width))[:80]}.")
    bits, lo, hi = map(jnp.asarray, found)
    return Noted(SumSpec(bits, lo, hi, tile), shape, unit, width)


def _counts(x):
    return type(x) is int and 0 < x <= LARGEST

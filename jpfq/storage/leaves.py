"""One leaf of a saved result: a record in JSON, and its arrays by the suffix of their names.

Reading checks everything against the size of what is there before it makes anything.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..matrix import Hadamard, QTensor
from ..matrix.layout import Layout
from ..matrix.packed import compact, extent
from ..matrix.qtensor import code_dtype
from ..scalar import Grid
from ..scalar.bits import MAX_LEVELS, pack, packed_size, unpack
from ..scalar.step_types import TYPES, UnderHalf, packed_steps, step_type
from . import entropy
from .codec import DTYPES, NOT_FINITE, decode, encode, on_device

KEYS = {"threefry2x32": (2,), "rbg": (4,), "unsafe_rbg": (4,)}  # kinds of random keys, and the shape of their data
NUMBERS = int, float, bool
FIELDS = {"path": str, "grid": dict, "shape": list, "dtype": str, "rotated": list, "zero": float, "key": str}
FIELDS |= {"step_dtype": str, "step_unit": float, "computed_in": str}
NATIVE = {"float64", "float32", "float16", "bfloat16", "complex64", "bool"} | {
    f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}  # what safetensors and NumPy both hold
SUFFIXES = ".codes", ".step", ".zero"  # of the arrays of a quantized kernel
Arrays = dict[str, np.ndarray]


def write_tensor(tensor: QTensor, entropy_coded: bool) -> tuple[dict, Arrays]:
    """A quantized kernel. Its codes are packed in the order of the kernel, or coded where that is asked for and shorter."""
    lo, levels = extent(tensor.grid)
    record = {"grid": encode(tensor.grid), "shape": list(tensor.shape)}
    if tensor.dtype != tensor.step.dtype:
        record["dtype"] = np.dtype(tensor.dtype).name
    if tensor.rotated is not None:
        record["rotated"] = encode(tensor.rotated)
    words, zero = np.asarray(tensor.codes), np.asarray(compact(tensor.zero))
    if levels <= MAX_LEVELS:
        codes = words.ravel().astype(np.int32) - lo
        words = np.asarray(pack(jnp.asarray(codes), levels))
        if entropy_coded and levels <= entropy.MAX_LEVELS and codes.size:
            words = min(words, entropy.encode(codes, levels), key=lambda x: x.nbytes)
    step, unit = packed_steps(np.asarray(tensor.step), tensor.step_dtype)
    if tensor.step_dtype is not None:
        record |= {"step_dtype": tensor.step_dtype.name, "step_unit": unit, "computed_in": tensor.step.dtype.name}
        step = step if step.dtype.name in NATIVE else step.view(np.uint8)
    arrays = {".codes": words, ".step": step}
    if zero.size > 1:
        arrays[".zero"] = zero
    elif float(zero.item()) != tensor.grid.alphabet().zero:
        record["zero"] = float(zero.item())
    return record, arrays


def read_tensor(record: dict, arrays: Arrays, name: str) -> QTensor:
    """The kernel that `write_tensor` noted."""
    grid, shape = decode(record["grid"], Grid), record.get("shape")
    if not isinstance(shape, list) or not shape or not all(type(n) is int and 0 <= n < 2**40 for n in shape):
        raise ValueError(f"Expected the shape of {name}; got {str(shape)[:80]!r}.")
    codes = _codes(grid, take(arrays, f"{name}.codes"), tuple(shape), name)
    step, step_dtype = _step(record, take(arrays, f"{name}.step"), name)
    dtype = DTYPES.get(record.get("dtype", step.dtype.name))
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"Expected the type of {name}; got {record.get('dtype')!r}.")
    if f"{name}.zero" in arrays:
        zero = take(arrays, f"{name}.zero")
    else:
        zero = np.full((1,) * step.ndim, record.get("zero", grid.alphabet().zero), float)
    for part in (step, zero):
        runs = part.ndim == len(shape) and all(
            n > 0 and full % n == 0 for n, full in zip(part.shape, shape, strict=True)
        )
        if not runs or not jnp.issubdtype(step.dtype, jnp.floating):
            raise ValueError(f"{name} of shape {shape} has steps or zero points {part.shape} {part.dtype.name}.")
    zero = zero.astype(step.dtype)
    zero = np.broadcast_to(zero, step.shape) if zero.size == 1 else zero
    rotated = _rotated(record["rotated"], tuple(shape), name) if "rotated" in record else None
    return QTensor(jnp.asarray(codes), on_device(step), on_device(zero), grid, dtype, rotated, step_dtype)


def key_dtypes() -> dict[str, Any]:
    """The types of random keys, by name."""
    found = [jax.eval_shape(lambda kind=kind: jax.random.key(0, impl=kind)).dtype for kind in KEYS]
    return {dtype.name: dtype for dtype in found}


def write_plain(leaf: Any) -> tuple[dict, Arrays]:
    """Any other leaf: an array, a number, a random key."""
    kind = kind_of(leaf)
    if kind == "number":
        return {"number": encode(leaf)}, {}
    if kind in KEYS:
        return {"key": kind}, {"": np.asarray(jax.random.key_data(leaf))}
    value = np.asarray(leaf)
    if kind in NATIVE:
        return {}, {"": np.ascontiguousarray(value).reshape(value.shape)}
    return {"dtype": kind}, {"": np.ascontiguousarray(value)[..., None].view(np.uint8)}


def kind_of(leaf: Any) -> str:
    """ "number", the kind of a random key, or the type of an array. Raises ValueError for what cannot be saved."""
    if isinstance(leaf, NUMBERS):
        return "number"
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        kind = str(jax.random.key_impl(leaf))
        if kind not in KEYS:
            raise ValueError(f"A random key of kind {kind} cannot be saved.")
        return kind
    dtype = leaf.dtype if isinstance(leaf, jax.Array) else np.asarray(leaf).dtype
    if dtype.name not in DTYPES:
        raise ValueError(f"A parameter of type {dtype} cannot be saved.")
    return dtype.name


def read_plain(record: dict, arrays: Arrays, name: str) -> Any:
    """The leaf that `write_plain` noted."""
    if "number" in record:
        number = record["number"]
        number = NOT_FINITE.get(number, number) if isinstance(number, str) else number
        if type(number) not in NUMBERS:
            raise ValueError(f"Expected a number for {name}; got {str(number)[:80]!r}.")
        return number
    value = take(arrays, name)
    if "key" in record:
        kind = record["key"]
        if kind not in KEYS or value.dtype != np.uint32 or value.shape[-1:] != KEYS[kind]:
            raise ValueError(f"Expected a key of random numbers for {name}.")
        return jax.random.wrap_key_data(jnp.asarray(value), impl=kind)
    if "dtype" in record:
        dtype = DTYPES.get(record["dtype"])
        if dtype is None or value.dtype != np.uint8 or value.shape[-1:] != (dtype.itemsize,):
            raise ValueError(f"{name} does not hold numbers of {record['dtype']!r}.")
        value = value.view(dtype)[..., 0]
    return on_device(value)


def belongs(name: str, record: dict) -> set[str]:
    """The names of arrays that a record may speak of."""
    return {f"{name}{suffix}" for suffix in (SUFFIXES if "grid" in record else ("",))}


def check(record: Any) -> str:
    """The name of a leaf, once its record has the right fields of the right types."""
    if not isinstance(record, dict) or "path" not in record or not record.keys() <= {*FIELDS, "number"}:
        raise ValueError(f"Expected the record of a parameter; got {str(record)[:80]!r}.")
    wrong = [key for key, kind in FIELDS.items() if key in record and not isinstance(record[key], kind)]
    if wrong or abs(record.get("zero", 0)) > 2**31:
        raise ValueError(f"The record of {str(record['path'])[:80]!r} has a wrong {', '.join(wrong) or 'zero'}.")
    return record["path"]


def check_layout(layout: Layout) -> None:
    """Raises where a layout was not taken from a product."""
    try:
        right = math.prod(layout.dims) == math.prod(layout.shape)
    except (ValueError, TypeError, IndexError, ZeroDivisionError, OverflowError):
        right = False
    if not right:
        raise ValueError(f"{str(layout)[:200]} is no layout of a kernel.")


def _codes(grid, words, shape, name):
    """Integer codes from the array that holds them, whose size says whether they are what is declared."""
    count = math.prod(shape)
    lo, hi, *_ = grid.alphabet()
    if not (-(2**31) < lo <= hi < 2**31 and lo == int(lo) and hi == int(hi)):
        raise ValueError(f"{grid} has no codes of 32 bits.")
    lo, levels = extent(grid)
    if levels > MAX_LEVELS and words.dtype.kind in "iu" and words.shape == shape:
        return words
    if levels <= MAX_LEVELS and words.dtype == np.uint32 and words.ndim == 1:
        codes = entropy.decode(words, levels, count)
    elif levels <= MAX_LEVELS and words.dtype == np.uint8 and words.shape == (packed_size(count, levels),):
        codes = np.asarray(unpack(jnp.asarray(words), levels, count))
    else:
        raise ValueError(f"{name} is of shape {shape} and {grid}, and has {words.nbytes} bytes of {words.dtype.name}.")
    if codes.size and codes.max() >= levels:
        raise ValueError(f"{name} has codes that {grid} has not.")
    return (codes.astype(np.int32) + lo).astype(code_dtype(grid)).reshape(shape)


def _step(record, step, name):
    """Steps as they are computed with, and the type they are stored in."""
    stored, dtype = record.get("step_dtype"), DTYPES.get(record.get("computed_in"))
    if stored is None:
        return step, None
    if stored not in TYPES or dtype is None or dtype.kind != "f" or not 0 < record.get("step_unit", 0) < np.inf:
        raise ValueError(f"Expected the type of the steps of {name}; got {str(stored)[:80]!r}.")
    kind = TYPES[stored]
    if isinstance(kind, UnderHalf):  # steps as they are computed with
        if step.dtype != dtype:
            raise ValueError(f"The steps of {name} are {step.dtype.name}, and not {dtype.name}.")
        return step, kind
    if step.dtype not in (kind, np.dtype(np.uint8)) or kind.itemsize != step.dtype.itemsize:
        raise ValueError(f"The steps of {name} are {step.dtype.name}, and not {stored}.")
    found = step.view(kind).astype(dtype) * dtype.type(record["step_unit"])
    return found, step_type(stored)


def _rotated(value, shape, name):
    if len(value) != 2:
        raise ValueError(f"Expected the rotation of {name}; got {str(value)[:80]!r}.")
    rotation, layout = decode(value[0], Hadamard), decode(value[1], Layout)
    check_layout(layout)
    if layout.shape != shape:
        raise ValueError(f"{name} is of shape {shape}, and its rotation for {layout.shape}.")
    rotation.refuse(layout.dims[1], name)
    return rotation, layout


def take(arrays: Arrays, name: str) -> np.ndarray:
    """An array, which then is no longer among those that are left."""
    if name not in arrays:
        raise ValueError(f"The array {name} is missing.")
    return arrays.pop(name)

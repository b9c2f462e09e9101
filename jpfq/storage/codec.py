"""Settings and metrics as JSON, and back, from a fixed table: reading creates only the classes named here.

A dataclass becomes {"": its name, field: value, ..}, an array {"": "array", "dtype": .., "data": nested lists}. Numbers of
arrays are written so that they come back to the bit.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..calibrate.activation import ActivationQuantizer, Activations
from ..matrix import Hadamard
from ..matrix.layout import ConvLayout, DotLayout, Layout
from ..matrix.packed import plain
from ..scalar import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    NF4,
    Asymmetric,
    Binary,
    Codes,
    Equispaced,
    Grid,
    Infinite,
    Integer,
    Levels,
    Offset,
    PowersOfTwo,
    ScaledGrid,
    SumSpec,
    Symmetric,
    Ternary,
    TwoRanges,
    ranges,
)

DTYPES = {  # of arrays that are kept as they are; by name, and never looked up elsewhere
    np.dtype(x).name: np.dtype(x)
    for x in (
        *(np.float64, np.float32, np.float16, jnp.bfloat16, np.complex64, np.complex128, np.bool_),
        *(jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float8_e4m3b11fnuz, jnp.float8_e4m3fnuz, jnp.float8_e5m2fnuz),
        *(np.int64, np.int32, np.int16, np.int8, np.uint64, np.uint32, np.uint16, np.uint8),
        *(jnp.int4, jnp.uint4, jnp.int2, jnp.uint2),
    )
}
ON_DISK = {  # classes that files know by another name
    "ActivationQuantizer": "Rounded",
    "SumSpec": "Sums",
    "ScaledGrid": "Levels",
    "Levels": "LevelTable",
}
NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def encode(value: Any) -> Any:
    """A setting or metric as JSON."""
    kind = type(value)
    if isinstance(value, (Grid, ranges.Range)):
        value = plain(value)
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        value = np.asarray(value)
        return {"": "array", "dtype": value.dtype.name, "data": _listed(value)}
    if kind in FIELDS:
        given = {f.name: getattr(value, f.name) for f in dataclasses.fields(kind) if not _is_default(value, f)}
        return {"": name_of(kind)} | {name: encode(x) for name, x in given.items()}
    if isinstance(value, np.dtype):
        return value.name
    if isinstance(value, (list, tuple)):
        return [encode(x) for x in value]
    if kind is float and not math.isfinite(value):
        return str(value)
    if value is None or kind in (bool, int, float, str):
        return value
    raise ValueError(f"{value!r} cannot be saved: it is none of jpfq's own settings.")


def decode(value: Any, kind: type | tuple[type, ...]) -> Any:
    """Decodes what `encode` made: one of the classes named, or an array (`jax.Array`).

    Raises:
        ValueError: not what `encode` makes of these.
    """
    kinds = kind if isinstance(kind, tuple) else (kind,)
    name = value.get("") if isinstance(value, dict) else None
    if name == "array" and jax.Array in kinds:
        return array(value)
    found = next((cls for cls in FIELDS if name_of(cls) == name and issubclass(cls, kinds)), None)
    if found is None:
        raise ValueError(f"Expected {' or '.join(k.__name__ for k in kinds)}; got {str(value)[:80]!r}.")
    checks = FIELDS[found]
    needed = (f for f in dataclasses.fields(found) if f.default is f.default_factory is dataclasses.MISSING)
    missing = [f.name for f in needed if f.name not in value]
    if missing or not value.keys() - {""} <= checks.keys():
        raise ValueError(f"{name} has the fields {', '.join(checks) or 'none'}; got {', '.join(sorted(value))}.")
    return found(**{field: checks[field](x) for field, x in value.items() if field})


def name_of(kind: type) -> str:
    """The name of a class in files."""
    return ON_DISK.get(kind.__name__, kind.__name__)


def array(value: dict) -> jax.Array:
    """An array from its record."""
    dtype = value.get("dtype") if isinstance(value, dict) and value.keys() == {"", "dtype", "data"} else None
    if not isinstance(dtype, str) or dtype not in DTYPES or DTYPES[dtype].kind == "c":
        raise ValueError(f"Expected an array; got {str(value)[:80]!r}.")
    return on_device(_unlisted(value["data"], DTYPES[dtype]))


def on_device(values: np.ndarray) -> jax.Array:
    """As a JAX array of the same type; without 64-bit types, an array of one is refused."""
    if jax.dtypes.canonicalize_dtype(values.dtype) != values.dtype:
        raise ValueError(f"It holds {values.dtype.name}: jax.config.update('jax_enable_x64', True) lets JAX hold it.")
    return jnp.asarray(values)


def column(values: Sequence[Any]) -> Any:
    """Many values of one kind: as one array where they are numbers of one type in arrays."""
    arrays = [np.asarray(x) for x in values if isinstance(x, (jax.Array, np.ndarray, np.generic))]
    if (
        arrays
        and len(arrays) == len(values)
        and len({x.dtype for x in arrays}) == 1
        and not any(x.ndim for x in arrays)
    ):
        return encode(np.stack(arrays))
    return [encode(x) for x in values]


def uncolumn(value: Any, count: int) -> list:
    """The inverse of `column`."""
    stacked = array(value) if isinstance(value, dict) else None
    if len(value) != count if isinstance(value, list) else stacked is None or stacked.shape != (count,):
        raise ValueError(f"Expected {count} values; got {str(value)[:80]!r}.")
    return [_figure(x) for x in value] if stacked is None else list(stacked)


def _is_default(value, field):
    """True if a field of a setting is what it is when left out, and so need not be written."""
    x = getattr(value, field.name)
    return type(x) in (bool, int, float, str, type(None)) and type(x) is type(field.default) and x == field.default


def _listed(x):
    """Nested lists of the shortest numbers that come back to the bit."""
    if x.ndim:
        return [_listed(y) for y in x]
    if x.dtype.kind in "iub":
        return x.item()
    short, value = float(str(x)), float(x)
    short = short if x.dtype.type(short) == x else value
    return short if math.isfinite(value) else str(value)


def _unlisted(data, dtype):
    def numbers(x):
        if isinstance(x, list):
            return [numbers(y) for y in x]
        x = NOT_FINITE.get(x, x) if isinstance(x, str) else x
        if not isinstance(x, (bool, int, float)) or (dtype.kind in "iu" and not isinstance(x, int)):
            raise ValueError(f"Expected numbers of {dtype.name}; got {str(x)[:80]!r}.")
        return x

    try:
        with np.errstate(over="raise"):
            return np.array(numbers(data), dtype)
    except (OverflowError, FloatingPointError) as error:
        raise ValueError(f"Expected numbers of {dtype.name}: {error}") from error


def _figure(value):
    """A single value: a number, a text, None, or an array."""
    if isinstance(value, list):
        raise ValueError(f"Expected a figure; got {str(value)[:80]!r}.")
    if isinstance(value, str):
        return NOT_FINITE.get(value, value)
    return array(value) if isinstance(value, dict) else value


def _is(*kinds: type) -> Callable:
    """A check for a value of these very types: `True` is no int."""

    def check(value):
        if type(value) not in kinds or (type(value) is float and not math.isfinite(value)):
            raise ValueError(f"Expected {' or '.join(k.__name__ for k in kinds)}; got {str(value)[:80]!r}.")
        return value

    return check


def _tuple(item: Callable) -> Callable:
    return lambda value: tuple(map(item, _is(list)(value)))


def _maybe(check: Callable) -> Callable:
    return lambda value: None if value is None else check(value)


def _a(*kinds: type) -> Callable:
    return lambda value: decode(value, kinds)


_whole, _number, _flag, _text, _array = _is(int), _is(int, float), _is(bool), _is(str), _a(jax.Array)
_wholes = _tuple(_whole)
FIELDS: dict[type, dict[str, Callable]] = {
    Integer: {"bits": _number, "narrow": _flag},
    Asymmetric: {"bits": _number},
    Offset: {"bits": _number},
    Symmetric: {"K": _number},
    Equispaced: {"M": _number},
    Ternary: {},
    Binary: {},
    Infinite: {},
    Codes: {"lo": _number, "hi": _number, "zero": _maybe(_number), "reach": _maybe(_number)},
    Levels: {"values": _tuple(_number), "reach": _maybe(_number)},
    E2M1: {},
    E2M3: {},
    E3M2: {},
    E4M3: {},
    E5M2: {},
    NF4: {},
    PowersOfTwo: {"bits": _whole},
    TwoRanges: {"bits": _whole, "fine": _whole, "ratio": _whole},
    ranges.Max: {},
    ranges.Percentile: {"p": _number},
    ranges.MinMSE: {"candidates": _whole},
    ranges.KL: {"candidates": _whole},
    Hadamard: {"seed": _whole},
    DotLayout: dict.fromkeys(("shape", "contract", "batch", "data_contract", "data_batch"), _wholes) | {"first": _flag},
    ConvLayout: dict.fromkeys(
        ("shape", "strides", "data_dilation", "dilation", "data_spec", "spec", "out_spec"), _wholes
    )
    | {"padding": _tuple(_wholes), "groups": _whole},
    Activations: {
        **{"grid": _a(Grid), "range": _maybe(_a(ranges.Range)), "per": _text, "group": _maybe(_whole)},
        **{"step_dtype": _maybe(_text), "rotation": _maybe(_a(Hadamard))},
    },
    ScaledGrid: {
        **dict.fromkeys(("step", "zero", "lo", "hi"), _array),
        **dict.fromkeys(("table", "unit"), _maybe(_array)),
        "offset": _flag,
    },
    SumSpec: {"bits": _array, "lo": _array, "hi": _array, "tile": _maybe(_whole)},
    ActivationQuantizer: {
        **{"settings": _a(Activations), "layout": _a(Layout)},
        **{"levels": _maybe(_a(ScaledGrid)), "unit": _maybe(_array)},
    },
}

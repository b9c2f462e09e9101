"""One solved site on disk: a record in JSON, and its arrays by name.

Reading checks everything against what the run asks of the site before it makes anything.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ..calibrate.activation import ActivationQuantizer
from ..calibrate.site_result import SiteRequest, SiteResult
from ..matrix import Devices, Info, Solution, code_dtype
from ..scalar import Bounded, SumSpec, WorstCase
from ..scalar.step_types import kernel_bits
from .codec import decode, encode

FIGURES = {f"info.{f.name}": f.default is dataclasses.MISSING for f in dataclasses.fields(Info) if f.name != "reach"}
COUNTS = {"info.dead", "info.zero_steps", "info.failed"}
FIELDS = {"q", "places", "rounded", "sums"}


def write_solved(solved: SiteResult) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Encodes a solved site as JSON and arrays by name."""
    solution, reach = solved.solution, solved.solution.info.reach
    figures = {name: getattr(solution.info, name.removeprefix("info.")) for name in FIGURES}
    found = {"codes": solution.codes, "step": solution.step, "zero": solution.zero}
    found |= {name: x for name, x in figures.items() if x is not None}
    if solved.error is not None:
        found["error"] = solved.error
    if reach is not None:
        found["reach"] = reach.ends
    arrays = {name: np.ascontiguousarray(x).reshape(x.shape) for name, x in found.items()}
    q = np.asarray(solution.q)
    # Others are kept: those of a table, those a rotation came after, and products that were rounded otherwise.
    if not np.array_equal(_values(arrays, q.dtype), q):
        found["q"], arrays["q"] = solution.q, np.ascontiguousarray(q)
    record = {
        "q": q.dtype.name,
        "places": {name: _place(x) for name, x in {**found, "q": solution.q}.items()},
        "rounded": None if solved.rounded is None else encode(solved.rounded),
        "sums": None if reach is None else _sums(reach.sums),
    }
    return record, arrays


def read_solved(record: Any, arrays: dict[str, np.ndarray], asked: SiteRequest, devices: Devices | None) -> SiteResult:
    """The inverse of `write_solved`.

    Raises:
        ValueError: not a record that `write_solved` makes for such a site.
    """
    if not isinstance(record, dict) or record.keys() != FIELDS:
        raise ValueError(f"expected the fields {', '.join(sorted(FIELDS))}; got {str(record)[:80]}")
    sums = asked.recipe.rounding.sums if isinstance(asked.recipe.rounding, Bounded) else None
    _check_arrays(arrays, asked, sums)
    if record["q"] not in ("float32", "float64") or ("q" in arrays and arrays["q"].dtype.name != record["q"]):
        raise ValueError(f"weights of type {str(record['q'])[:80]}")
    if record["sums"] != (None if sums is None else _sums(sums)):
        raise ValueError("the sums that it bounds are others")
    rounded = _rounded(record["rounded"], asked)
    if "q" not in arrays:
        arrays["q"] = _values(arrays, np.dtype(record["q"]))
    places = record["places"]
    if not isinstance(places, dict) or places.keys() != arrays.keys():
        raise ValueError(f"expected where each of its arrays was; got {str(places)[:80]}")
    placed = {name: _at(places[name], x, devices) for name, x in arrays.items()}
    reach = None if sums is None else WorstCase(decode(record["sums"], SumSpec), placed["reach"])
    figures = {name.removeprefix("info."): placed[name] for name in FIGURES if name in placed}
    info = Info(**figures, reach=reach)
    solution = Solution(placed["codes"], placed["q"], placed["step"], placed["zero"], info)
    return SiteResult(solution, placed.get("error"), rounded)


def _check_arrays(arrays, asked, sums):
    """Raises where an array is missing, or of another shape or type than such a site has, or codes are off their grid."""
    B, n, out = asked.dims
    needed = {"codes", "step", "zero", *(name for name, needed in FIGURES.items() if needed)}
    needed |= {"error"} if asked.corrects else set()
    needed |= {"reach"} if sums is not None else set()
    wrong = sorted(needed - arrays.keys()) + sorted(arrays.keys() - needed - FIGURES.keys() - {"q"})
    if wrong:
        raise ValueError(f"expected the arrays {', '.join(sorted(needed))}; missing or too many: {', '.join(wrong)}")
    for name, x in arrays.items():
        if name in ("step", "zero"):
            b, groups, neurons = x.shape if x.ndim == 3 else (0, 0, 0)
            right = _is_float(x) and b in (1, B) and neurons in (1, out) and groups > 0 and n % groups == 0
        elif name == "codes":
            lo, hi, *_ = asked.recipe.grid.alphabet()
            right = x.dtype == code_dtype(asked.recipe.grid) and x.shape == (B, n, out)
            right = right and bool((x >= lo).all() and (x <= hi).all())
        elif name in ("q", "error"):
            right = _is_float(x) and x.shape == ((B, n, out) if name == "q" else (B, out))
        elif name == "reach":
            tiles, most = (0, 0) if sums is None else (sums.tiles(n), 2 ** (int(sums.bits) - 1) - 1)
            right = x.dtype == np.int32 and x.shape == (B, tiles, out, 2) and bool(((x >= 0) & (x <= most)).all())
        else:
            right = (
                x.shape in ((), (B,)) and x.dtype.kind in ("iu" if name in COUNTS else "iuf") and x.dtype.itemsize >= 4
            )
            right = right and jax.dtypes.canonicalize_dtype(x.dtype) == x.dtype
        if right and name in ("step", "zero", "q", "error"):
            right = bool(np.isfinite(x).all())
        if not right:
            raise ValueError(f"{name} {x.shape} {x.dtype.name} is not that of {B} matrices ({n}, {out}) on this grid")
    if arrays["step"].dtype != arrays["zero"].dtype:
        raise ValueError("its steps and zero points are of two types")


def _rounded(value, asked):
    """Decodes the rounding of the input, and checks that it is what the run asks for."""
    if value is None or asked.activations is None:
        if value is not None or asked.activations is not None:
            raise ValueError(f"its input is {'not ' if value is None else ''}rounded")
        return None
    rounded, levels = decode(value, ActivationQuantizer), value.get("levels")
    if encode(rounded.settings) != encode(asked.activations) or rounded.layout != asked.layout:
        raise ValueError("its input is rounded by other settings")
    if (levels is None) != asked.activations.dynamic:
        raise ValueError("its input has levels where they are taken as it runs, or none where they are not")
    unit = rounded.unit
    if (unit is None) == bool(kernel_bits(asked.activations.steps_as)) or (
        unit is not None and not (_is_float(unit) and unit.shape == () and 0 < float(unit) < math.inf)
    ):
        raise ValueError("the unit of the steps of its input is missing, or is none")
    if levels is not None:
        levels = rounded.levels
        step, zero, lo, hi = (np.asarray(x) for x in (levels.step, levels.zero, levels.lo, levels.hi))
        count = asked.layout.dims[0] if asked.activations.per == "channel" else 1
        right = step.shape == zero.shape == (count,) and lo.shape == hi.shape == ()
        if not right or not all(_is_float(x) and np.isfinite(x).all() for x in (step, zero, lo, hi)):
            raise ValueError("the levels of its input are no levels")
    return rounded


def _is_float(x):
    return x.dtype in (np.float32, np.float64) and jax.dtypes.canonicalize_dtype(x.dtype) == x.dtype


def _sums(sums):
    return encode(jax.tree.map(jnp.asarray, sums))


def _values(arrays, dtype):
    """The weights that codes stand for on a grid without a table: step * (code - zero), by groups of inputs."""
    codes, step, zero = (arrays[name] for name in ("codes", "step", "zero"))
    n = codes.shape[1]
    spread = lambda x: np.repeat(x, n // x.shape[1], 1)
    return (spread(step) * (codes.astype(step.dtype) - spread(zero))).astype(dtype)


def _place(x) -> list | None:
    """The partition spec of an array on its mesh; None for one that is on no mesh."""
    if not isinstance(x.sharding, NamedSharding):
        return None
    return [list(entry) if isinstance(entry, tuple) else entry for entry in x.sharding.spec]


def _at(place, x, devices):
    """An array with the sharding it had."""
    wrong = ValueError(f"an array {x.shape} was not split by {str(place)[:80]}")
    if place is not None and not (isinstance(place, list) and len(place) <= x.ndim):
        raise wrong
    split = [entry if isinstance(entry, list) else [entry] * (entry is not None) for entry in place or ()]
    used = [axis for names in split for axis in names]
    if not all(isinstance(axis, str) for axis in used) or len(set(used)) < len(used):
        raise wrong
    if place is None or devices is None:
        return jnp.asarray(x)
    axes = dict(devices.mesh.shape)
    if not axes.keys() >= set(used) or any(
        n % math.prod(axes[axis] for axis in names) for n, names in zip(x.shape, split)
    ):
        raise wrong
    spec = PartitionSpec(*(tuple(entry) if isinstance(entry, list) else entry for entry in place))
    return jax.device_put(x, NamedSharding(devices.mesh, spec))

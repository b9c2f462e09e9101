"""Rules that propagate row weights from the operands of an operation to its results, primitive by primitive.

All follow the three principles of row_weights.py. An operation without a rule loses the weights, and is named in the error.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..model.compat import bind, call_body, is_literal, opened, scan_arity
from .row_weight_ops import Lost, full, least, lost_or_least, most, note, scalar
from .row_weight_windows import convolution, starts_late, window

Weights = jax.Array | None

ELEMENTWISE = {
    "abs", "acos", "acosh", "add", "add_any", "and", "asin", "asinh", "atan", "atan2", "atanh", "bessel_i0e", "bessel_i1e",
    "bitcast_convert_type", "cbrt", "ceil", "clamp", "clz", "complex", "conj", "convert_element_type", "copy", "copy_p",
    "cos", "cosh", "device_put", "digamma", "div", "eq", "erf", "erf_inv", "erfc", "exp", "exp2", "expm1", "floor", "ge",
    "gt", "igamma", "igammac", "imag", "integer_pow", "is_finite", "le", "lgamma", "log", "log1p", "logistic", "lt", "max",
    "min", "mul", "ne", "neg", "nextafter", "not", "optimization_barrier", "or", "population_count", "pow", "real",
    "reduce_precision", "regularized_incomplete_beta", "rem", "round", "rsqrt", "select_n", "shift_left",
    "shift_right_arithmetic", "shift_right_logical", "sharding_constraint", "sign", "sin", "sinh", "sqrt", "square",
    "stop_gradient", "sub", "tan", "tanh", "xor", "zeta", "polygamma", "mesh_cast", "reshard", "pvary", "name",
}  # fmt: skip
REDUCTIONS = {
    "reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor", "argmax", "argmin",
}  # fmt: skip
WINDOWS = {"reduce_window_sum", "reduce_window_max", "reduce_window_min", "reduce_window"}
ALONG = {"cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp", "fft"}  # entries stay where they are
SCATTERS = {"scatter", "scatter-add", "scatter_add", "scatter_mul", "scatter_min", "scatter_max", "scatter_sub"}
# by position, the operands whose values determine where weights go
INDICES = {"gather": (1,), "dynamic_slice": slice(1, None), "dynamic_update_slice": slice(2, None)}


def indices(eqn: Any) -> list:
    """The operands of an equation whose values determine where weights go."""
    name = eqn.primitive.name
    if name in ("sort", "top_k", "approx_top_k"):
        return eqn.invars
    if name in SCATTERS:
        return eqn.invars[1:2]
    where = INDICES.get(name, ())
    return eqn.invars[where] if isinstance(where, slice) else [eqn.invars[i] for i in where]


def propagate(equations: Any, weights: dict, values: Any, cut: dict) -> dict:
    """The weights of every variable that has any, from those of the inputs.

    values: returns the value of a variable in `indices`; None inside loops.
    cut: records, by the name of an operation, whether it would cover other rows if the rows of weight 0 were removed.
    """
    env = dict(weights)
    for eqn in equations:
        own = [None if is_literal(v) else env.get(getattr(v, "source", v)) for v in eqn.invars]
        if all(w is None for w in own):
            continue
        lost = next((w for w in own if isinstance(w, Lost)), None)
        found = [lost] * len(eqn.outvars) if lost else _rule(eqn, own, values, cut)
        env.update((v, w) for v, w in zip(eqn.outvars, found, strict=True) if w is not None)
    return env


def _rule(eqn, own, values, cut) -> list:
    """The weights of the results of one equation."""
    name, outs = eqn.primitive.name, eqn.outvars
    body = call_body(eqn)
    if body is not None:
        return _body(body, own, cut)
    if name in ELEMENTWISE:
        if len(outs) == len(own) and len(outs) > 1:  # several values that pass through
            return own
        return [least(*(scalar(w, outs[0].aval.ndim) for w in own))] * len(outs)
    if name == "slice":
        return _slice_of(eqn, own, cut)
    if name in _RULES:
        return _RULES[name](eqn, own, values)
    if name in REDUCTIONS or name == "reduce":
        axes = tuple(eqn.params["axes" if name in REDUCTIONS else "dimensions"])
        return [most(least(*own[: len(outs)]), axes)] * len(outs)
    if name in ALONG:
        return own[:1]
    if name in SCATTERS:
        return [_scatter(eqn, own, values)]
    if name in WINDOWS:
        return [window(eqn, own[0], cut)] * len(outs)
    if name == "conv_general_dilated" and None in own:
        return [convolution(eqn, own, cut)]
    if name == "scan":
        return _scan(eqn, own, cut)
    if name == "cond":
        branches = [_body(branch, own[1:], cut) for branch in eqn.params["branches"]]
        return [lost_or_least(found) for found in zip(*branches, strict=True)]
    if name.startswith(("random_", "threefry", "rng_")):
        return [None] * len(outs)
    return [Lost(name)] * len(outs)


def _body(body, own, cut):
    """Propagates weights through an inner jaxpr, whose values are not known."""
    jaxpr, _ = opened(body)
    given = {v: w for v, w in zip(jaxpr.invars, own, strict=True) if w is not None}
    env = propagate(jaxpr.eqns, given, None, cut)
    return [None if is_literal(v) else env.get(v) for v in jaxpr.outvars]


def _scan(eqn, own, cut):
    """The outputs of each step have the weights of its inputs; the final carry has the largest of them."""
    constants, carries = scan_arity(eqn)
    first = constants + carries
    length, jaxpr = eqn.params["length"], opened(eqn.params["jaxpr"])[0]
    steps = [None if w is None else jnp.broadcast_to(w, (length, *w.shape[1:])) for w in own[first:]]
    lost: list = []

    def one(steps):
        found = _body(eqn.params["jaxpr"], [*own[:first], *steps], cut_inside)
        lost[:] = [w if isinstance(w, Lost) else None for w in found]
        return [None if isinstance(w, Lost) else w for w in found]

    cut_inside: dict = {}
    found = jax.vmap(one, axis_size=length)(steps)
    if cut_inside:
        lost = [Lost("a window inside a scan")] * len(jaxpr.outvars)
    out = [most(w, 0) for w in found[:carries]] + found[carries:]
    return [a or b for a, b in zip(lost, out, strict=True)] if any(lost) else out


def _broadcast(eqn, own, values):
    w, shape, places = own[0], eqn.params["shape"], eqn.params["broadcast_dimensions"]
    laid = [1] * len(shape)
    for axis, place in enumerate(places):
        laid[place] = w.shape[axis]
    return [w.reshape(laid)]


def _reshape(eqn, own, values):
    """Maps axes one to one where sizes agree, and else in runs of axes that are merged or split together."""
    w, old, new = own[0], eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if 0 in old:
        return [jnp.zeros(new, w.dtype)]
    shape: list[int] = []
    spread: set[int] = set()
    i = j = 0
    while i < len(old) or j < len(new):
        first, start = i, j
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while (before := math.prod(old[first:i])) != (after := math.prod(new[start:j])):
            i, j = (i + 1, j) if before < after else (i, j + 1)
        if any(w.shape[a] > 1 for a in range(first, i)):
            spread.update(range(first, i))
            shape += new[start:j]
        else:
            shape += [1] * (j - start)
    return [full(w, old, spread).reshape(shape)]


def _transpose(eqn, own, values):
    return [own[0].transpose(eqn.params["permutation"])]


def _squeeze(eqn, own, values):
    return [lax.squeeze(own[0], eqn.params["dimensions"])]


def _expand_dims(eqn, own, values):
    return [lax.expand_dims(own[0], eqn.params["dimensions"])]


def _slice_of(eqn, own, cut):
    p, w = eqn.params, own[0]
    strides = p["strides"] or (1,) * w.ndim
    kept = [
        (0, 1, 1) if n == 1 else part
        for n, part in zip(w.shape, zip(p["start_indices"], p["limit_indices"], strides, strict=True), strict=True)
    ]
    counts = w > 0
    for axis, (start, limit, stride) in enumerate(kept):
        if w.shape[axis] == 1:
            continue
        late = lax.slice_in_dim(counts, start, limit, axis=axis).any(axis)
        if start > 0:
            front = ~lax.slice_in_dim(counts, 0, start, axis=axis).all(axis)
            note(cut, "A slice", [(late & front).any()])
        if stride > 1:
            note(cut, "A slice", [starts_late(counts, axis)])
    return [lax.slice(w, *zip(*kept, strict=True))]


def _dynamic_slice(eqn, own, values: Any):
    w, sizes = own[0], eqn.params["slice_sizes"]
    if w is None:
        return [least(*(scalar(x, len(sizes)) for x in own[1:]))]
    if values is None:
        return [Lost("dynamic_slice inside a loop")]
    starts = [0 if n == 1 else values(v) for n, v in zip(w.shape, eqn.invars[1:], strict=True)]
    return [lax.dynamic_slice(w, starts, [1 if n == 1 else size for n, size in zip(w.shape, sizes, strict=True)])]


def _dynamic_update_slice(eqn, own, values: Any):
    if values is None:
        return [Lost("dynamic_update_slice inside a loop")]
    whole, part = eqn.invars[0].aval.shape, eqn.invars[1].aval.shape
    axes = {
        a for a in range(len(whole)) if part[a] < whole[a] or any(w is not None and w.shape[a] > 1 for w in own[:2])
    }
    starts = [values(v) if a in axes else 0 for a, v in enumerate(eqn.invars[2:])]
    return [lax.dynamic_update_slice(full(own[0], whole, axes), full(own[1], part, axes), starts)]


def _rev(eqn, own, values):
    return [lax.rev(own[0], [a for a in eqn.params["dimensions"] if own[0].shape[a] > 1])]


def _pad(eqn, own, values):
    w, config = own[0], eqn.params["padding_config"]
    if w is None:
        return [scalar(own[1], len(config))]
    widen = [c if n > 1 else (0, 0, 0) for c, n in zip(config, w.shape, strict=True)]
    return [lax.pad(w, jnp.asarray(jnp.inf, w.dtype), widen)]


def _concatenate(eqn, own, values):
    axis, avals = eqn.params["dimension"], [v.aval for v in eqn.invars]
    if len({id(w) for w in own}) == 1 and own[0].shape[axis] == 1:
        return own[:1]
    parts = [full(w, aval.shape, {axis}) for w, aval in zip(own, avals, strict=True)]
    shape = [max(sizes) for sizes in zip(*(w.shape for w in parts), strict=True)]
    parts = [jnp.broadcast_to(w, [*shape[:axis], w.shape[axis], *shape[axis + 1 :]]) for w in parts]
    return [jnp.concatenate(parts, axis)]


def _split(eqn, own, values):
    w, axis = own[0], eqn.params["axis"]
    if w.shape[axis] == 1:
        return [w] * len(eqn.outvars)
    return lax.split(w, eqn.params["sizes"], axis)


def _sort(eqn, own, values):
    p, axis = eqn.params, eqn.params["dimension"]
    if all(w is None or w.shape[axis] == 1 for w in own):
        return [least(*own)] * len(own)
    if values is None:
        return [Lost("sort inside a loop")] * len(own)
    given = [values(v) for v in eqn.invars]
    w = jnp.broadcast_to(least(*own), given[0].shape)  # rows are sorted together
    return [lax.sort((*given, w), dimension=axis, is_stable=p["is_stable"], num_keys=p["num_keys"])[-1]] * len(own)


def _top_k(eqn, own, values):
    w, axis = own[0], eqn.params.get("axis", own[0].ndim - 1)
    if w.shape[axis] == 1:
        return [w, w]
    if values is None or axis != w.ndim - 1:
        return [Lost("top_k")] * 2
    _, picked = bind(eqn, [values(eqn.invars[0])])
    w = jnp.broadcast_to(w, (*picked.shape[:-1], w.shape[-1]))
    return [jnp.take_along_axis(w, picked, -1)] * 2


def _gather(eqn, own, values):
    """An entry selected from data has the smaller weight of entry and index; one from a table has that of the index."""
    p, out = eqn.params, eqn.outvars[0].aval
    numbers, (w, index) = p["dimension_numbers"], own
    if index is not None:
        index = most(index, index.ndim - 1)
        index = lax.expand_dims(index, sorted(numbers.offset_dims))
    if w is None:
        return [index]
    if values is None:
        return [Lost("gather inside a loop")]
    shape = eqn.invars[0].aval.shape
    batching = getattr(numbers, "operand_batching_dims", ())
    indexed = {*numbers.start_index_map, *numbers.collapsed_slice_dims, *batching}
    w = full(w, shape, indexed)
    sizes = tuple(n if a in indexed else w.shape[a] for a, n in enumerate(p["slice_sizes"]))
    picked = lax.gather(
        w,
        values(eqn.invars[1]),
        numbers,
        sizes,
        unique_indices=p["unique_indices"],
        indices_are_sorted=p["indices_are_sorted"],
        mode=p["mode"],
        fill_value=math.inf,
    )
    return [least(picked, index) if picked.ndim == out.ndim else Lost("gather")]


def _scatter(eqn, own, values):
    """An entry that is written to has the largest weight of its updates; the others keep their weights."""
    if values is None:
        return Lost("scatter inside a loop")
    p, (whole, _, part) = eqn.params, (v.aval.shape for v in eqn.invars)
    old, index, new = own
    numbers = p["dimension_numbers"]
    if index is not None:
        index = lax.expand_dims(most(index, index.ndim - 1), sorted(numbers.update_window_dims))
    new = full(least(new, index), part, set(range(len(part))))
    new = jnp.where(jnp.isinf(new), jnp.finfo(new.dtype).max, new)
    landed = lax.scatter_max(
        jnp.full(whole, -1, new.dtype),
        values(eqn.invars[1]),
        new,
        numbers,
        indices_are_sorted=p["indices_are_sorted"],
        unique_indices=p["unique_indices"],
        mode=p["mode"],
    )
    old = full(old, whole, set(range(len(whole))))
    written = landed if eqn.primitive.name == "scatter" else jnp.minimum(landed, old)
    return _narrow(jnp.where(landed >= 0, written, old), numbers, part)


def _narrow(w, numbers, part):
    """Reduces to size 1 the axes that are written as a whole, along which weights do not change."""
    batching = getattr(numbers, "operand_batching_dims", ())
    windows = [a for a in range(w.ndim) if a not in (*numbers.inserted_window_dims, *batching)]
    for axis, place in zip(windows, sorted(numbers.update_window_dims), strict=True):
        if part[place] == w.shape[axis] and axis not in numbers.scatter_dims_to_operand_dims:
            w = w.max(axis, keepdims=True)
    return w


def _dot(eqn, own, values):
    """A product of two data arrays takes the largest weights along contracted axes; one with a kernel the smallest."""
    (contract, batch), sides = eqn.params["dimension_numbers"], (0, 1)
    combine = jnp.min if None in own else jnp.max
    parts = []
    for side in sides:
        w, ndim = own[side], eqn.invars[side].aval.ndim
        free = [a for a in range(ndim) if a not in (*contract[side], *batch[side])]
        if w is None:
            parts.append(([1] * len(batch[side]), None, [1] * len(free)))
            continue
        w = combine(w, tuple(contract[side]), keepdims=True).transpose(*batch[side], *free, *contract[side])
        w = w.reshape(w.shape[: w.ndim - len(contract[side])])
        parts.append((list(w.shape[: len(batch[side])]), w, list(w.shape[len(batch[side]) :])))
    (head, left, before), (tail, right, after) = parts
    left = None if left is None else left.reshape(head + before + [1] * len(after))
    right = None if right is None else right.reshape(tail + [1] * len(before) + after)
    return [least(left, right)]


_RULES: dict[str, Callable] = {
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "expand_dims": _expand_dims,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "rev": _rev,
    "pad": _pad,
    "concatenate": _concatenate,
    "split": _split,
    "sort": _sort,
    "top_k": _top_k,
    "gather": _gather,
    "dot_general": _dot,
}

"""Equations as hashable keys: equal for equal computations, whatever the names of their variables.

They serve two purposes. Equal equations of one program are merged; and segments with equal keys share one compiled
function, within a network, between networks, and between calls. A key contains everything the computation depends on,
including the constants of inner jaxprs.
"""

import dataclasses
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .compat import inner_jaxprs, is_jaxpr, is_literal, opened


def canonical(x: Any) -> Any:
    """The key of an equation, a jaxpr, an array, or a parameter of an equation."""
    if hasattr(x, "primitive"):
        return _equation(x)
    if is_jaxpr(x):
        return _jaxpr(x)
    if isinstance(x, (np.ndarray, np.generic, jax.Array)):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.extended)
        with jax.ensure_compile_time_eval():
            array = np.asarray(jax.random.key_data(jnp.asarray(x)) if is_key else x)
        return "array", array.shape, str(array.dtype), array.tobytes()
    if isinstance(x, dict):
        return "dict", tuple((k, canonical(v)) for k, v in sorted(x.items(), key=lambda item: str(item[0])))
    if isinstance(x, (tuple, list)):
        return type(x).__name__, tuple(map(canonical, x))
    if isinstance(x, (set, frozenset)):
        return "set", tuple(sorted(map(repr, x)))
    try:
        hash(x)
    except TypeError:
        return type(x).__name__, repr(x)
    return type(x).__name__, x


def segment(equations: list, inputs: list, outputs: list) -> Any:
    """The key of the function from `inputs` to `outputs` that `equations` define."""
    names = {v: i for i, v in enumerate(inputs)}
    return tuple(_aval(v) for v in inputs), _body(equations, names), tuple(names[v] for v in outputs)


def by_code(key: Any) -> Any:
    """The same key, with pure callbacks identified by their code instead of by the function object."""
    if not isinstance(key, tuple):
        return key
    described = key[:1] == ("pure_callback",)
    return tuple(_described(x, ()) if described else by_code(x) for x in key)


def _described(x, seen):
    """A value with functions replaced by their code and captured values. `seen` has the enclosing values."""
    if any(x is y for y in seen):
        return "itself"
    inside = lambda *parts: tuple(_described(part, (*seen, x)) for part in parts)
    if isinstance(x, (tuple, list)):
        return type(x).__name__, inside(*x)
    if isinstance(x, types.FunctionType):
        captured = [_content(cell) for cell in x.__closure__ or ()]
        return (
            "function",
            x.__module__,
            inside(x.__code__, captured, x.__defaults__, sorted((x.__kwdefaults__ or {}).items())),
        )
    if isinstance(x, types.CodeType):
        return "code", x.co_qualname, x.co_code, x.co_names, inside(*x.co_consts)
    if isinstance(x, types.MethodType):
        return "method", inside(x.__func__, x.__self__)
    if isinstance(x, functools.partial):
        return "partial", inside(x.func, x.args, sorted(x.keywords.items()))
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        return type(x).__name__, inside(*(getattr(x, field.name) for field in dataclasses.fields(x)))
    return canonical(x)


def _content(cell):
    try:
        return cell.cell_contents
    except ValueError:  # the cell is empty: its function is not defined yet
        return "nothing"


def _jaxpr(x):
    jaxpr, constants = opened(x)
    names = {v: i for i, v in enumerate([*jaxpr.constvars, *jaxpr.invars])}
    body = _body(jaxpr.eqns, names)
    return (
        tuple(map(canonical, constants)),
        tuple(map(_aval, names)),
        body,
        tuple(_operand(v, names) for v in jaxpr.outvars),
    )


def _body(equations, names):
    body = []
    for eqn in equations:
        operands = tuple(_operand(v, names) for v in eqn.invars)
        body.append((_equation(eqn), operands))
        for v in eqn.outvars:
            names.setdefault(v, len(names))
    return tuple(body)


def _operand(v, names):
    return ("literal", canonical(np.asarray(v.val)), _aval(v)) if is_literal(v) else names[v]


def _equation(eqn):
    """An equation without its operands. Functions beside an inner jaxpr are derivative rules, which do not count."""
    holds_jaxpr = bool(inner_jaxprs(eqn))
    parameters = {k: v for k, v in eqn.params.items() if not (holds_jaxpr and _is_rule(v))}
    return eqn.primitive.name, canonical(parameters), repr(eqn.ctx), tuple(map(_aval, eqn.outvars))


def _is_rule(value):
    return callable(value) and not is_jaxpr(value)


def _aval(v):
    return str(v.aval), getattr(v.aval, "weak_type", False), str(getattr(v.aval, "sharding", ""))

"""The differences between JAX releases in their intermediate representation, all in this file."""

from typing import Any

import jax
from jax.extend.core import Literal as Literal

PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general", "ragged_dot")
NOT_INLINED = {"scan", "while", "cond", "pallas_call", "shard_map", "custom_partitioning", "reduce", "reduce_window"}


def opened(jaxpr: Any) -> tuple[Any, tuple]:
    """(jaxpr, constants) of a jaxpr. Up to JAX 0.10 open and closed jaxprs are two classes, later one."""
    return getattr(jaxpr, "jaxpr", jaxpr), tuple(getattr(jaxpr, "consts", ()) or ())


def is_jaxpr(x: Any) -> bool:
    """True if `x` is a jaxpr of either kind."""
    return hasattr(x, "eqns") or hasattr(getattr(x, "jaxpr", None), "eqns")


def inner_jaxprs(eqn) -> list:
    """The jaxprs among an equation's parameters (the body of a loop, the branches of a cond)."""
    values = (w for v in eqn.params.values() for w in (v if isinstance(v, (tuple, list)) else (v,)))
    return [v for v in values if is_jaxpr(v)]


def call_body(eqn) -> Any | None:
    """The jaxpr that an equation merely calls (jit, remat, custom_jvp, ..), or None.

    It is recognised by its signature: inputs and outputs have the types of the equation. Names of primitives and of their
    parameters change between releases.
    """
    if eqn.primitive.name in NOT_INLINED:
        return None
    signature = lambda variables: [(getattr(v.aval, "shape", None), getattr(v.aval, "dtype", None)) for v in variables]
    for body in inner_jaxprs(eqn):
        jaxpr, _ = opened(body)
        if signature(jaxpr.invars) == signature(eqn.invars) and signature(jaxpr.outvars) == signature(eqn.outvars):
            return body
    return None


def scan_arity(eqn) -> tuple[int, int]:
    """(constants, carries) of a scan, counted by rank, because newer releases rename the parameters that hold them."""
    body, _ = opened(eqn.params["jaxpr"])
    carries = sum(o.aval.ndim == v.aval.ndim for o, v in zip(eqn.outvars, body.outvars, strict=True))
    scanned = sum(v.aval.ndim == b.aval.ndim + 1 for v, b in zip(eqn.invars, body.invars, strict=True))
    return len(eqn.invars) - scanned - carries, carries


def bind(eqn, values: list) -> list:
    """Evaluates one equation, eagerly or in a trace, in the context in which it was traced but on the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    with eqn.ctx.manager, jax.sharding.use_abstract_mesh(mesh):
        out = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


def is_literal(variable) -> bool:
    """True if an equation's input is a constant written into the program."""
    return isinstance(variable, Literal)


def key_name(entry: Any) -> str | None:
    """One entry of a pytree path as users write it; None for the accessor of a boxed parameter."""
    if isinstance(entry, jax.tree_util.GetAttrKey):
        return None if entry.name == "value" else entry.name
    return str(getattr(entry, "key", getattr(entry, "idx", entry)))

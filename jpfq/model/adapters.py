"""Adapters: the one list of supported frameworks.

To support another one, write a file that defines an `Adapter` and add it to ADAPTERS; from outside the package, call
`register`.
"""

from typing import Any

import jax

from .functional import Adapter, Functional, check_arrays, from_function
from .linen import LINEN
from .nnx import NNX
from .unlike import check_model, check_params, remedy_of


def _from_function(model, params, kwargs):
    """A function fn(params, *inputs) as a `Functional`; raises for anything else."""
    if not callable(model):
        shown = f"{str(model)[:80]!r}, of type {type(model).__name__}"
        raise ValueError(f"model is a Linen module, an NNX model or a function fn(params, *inputs); got {shown}.")
    known, remedy = remedy_of(model)
    if known or (params is None and not jax.tree_util.all_leaves([model])):
        raise ValueError(f"model is {type(model).__name__}, a pytree that contains its own parameters. {remedy}")
    if params is None:
        raise ValueError("A function needs its parameters: jpfq.quantize(fn, batches, rules, params=params).")
    return from_function(model, params, kwargs)


FUNCTION = Adapter("function", "a function", "params", lambda model: True, _from_function)
ADAPTERS = [LINEN, NNX, FUNCTION]  # the first that owns a model takes it


def register(adapter: Adapter) -> None:
    """Adds a framework. It takes precedence over those registered before."""
    ADAPTERS.insert(0, adapter)


def adapter_of(model: Any) -> Adapter:
    """The adapter of a model's framework."""
    return next(adapter for adapter in ADAPTERS if adapter.owns(model))


def phrase_of(kind: str) -> str | None:
    """The phrase for models of a kind; None if there is no adapter for it."""
    return next((adapter.phrase for adapter in ADAPTERS if adapter.kind == kind), None)


def adapt(model: Any, variables: Any, params: Any, kwargs: dict | None) -> Functional:
    """The model as a pure function, whatever its framework."""
    check_model(model, params)
    adapter, arguments = adapter_of(model), {"variables": variables, "params": params}
    for name, value in arguments.items():
        check_params(name, value, model)
    for name, value in arguments.items():
        if value is not None and name != adapter.argument:
            wanted = adapter.argument or "neither variables nor params"
            raise ValueError(f"{adapter.phrase} takes {wanted}; got {name}=...")
    arrays = None if adapter.argument is None else arguments[adapter.argument]
    functional = adapter.functional(model, arrays, kwargs or {})
    check_arrays(functional.paths, functional.leaves)
    return functional

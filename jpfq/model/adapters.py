"""Adapters: the one place that knows which frameworks there are.

A framework is one file that ends with an `Adapter`, and its name in ADAPTERS; from outside the package, `register`.
"""

from typing import Any

import jax

from .functional import PARTITION, Adapter, Functional, check_arrays, from_function
from .linen import LINEN
from .nnx import NNX


def _from_function(model, params, kwargs):
    """The functional of a function, or raises for what is no function of parameters and inputs."""
    if not callable(model):
        raise ValueError(f"model is a Linen module, an NNX model or a function fn(params, *inputs); got {model!r}.")
    if params is None:
        if not jax.tree_util.all_leaves([model]):
            raise ValueError(
                f"model is {type(model).__name__}, a pytree that has its parameters within itself. {PARTITION}"
            )
        raise ValueError("A function needs its parameters: jpfq.quantize(fn, batches, rules, params=params).")
    return from_function(model, params, kwargs)


FUNCTION = Adapter("function", "a function", "params", lambda model: True, _from_function)
ADAPTERS = [LINEN, NNX, FUNCTION]  # the first that owns a model takes it


def register(adapter: Adapter) -> None:
    """Adds a framework, which is asked before those there are."""
    ADAPTERS.insert(0, adapter)


def adapter_of(model: Any) -> Adapter:
    """The adapter of the framework that a model is of."""
    return next(adapter for adapter in ADAPTERS if adapter.owns(model))


def phrase_of(kind: str) -> str | None:
    """The phrase for models of a kind; None where no adapter is of it."""
    return next((adapter.phrase for adapter in ADAPTERS if adapter.kind == kind), None)


def adapt(model: Any, variables: Any, params: Any, kwargs: dict | None) -> Functional:
    """The model as a pure function, whatever framework it is of."""
    adapter, given = adapter_of(model), {"variables": variables, "params": params}
    for name, value in given.items():
        if value is not None and name != adapter.argument:
            wanted = adapter.argument or "neither variables nor params"
            raise ValueError(f"{adapter.phrase} takes {wanted}; got {name}=...")
    arrays = None if adapter.argument is None else given[adapter.argument]
    functional = adapter.functional(model, arrays, kwargs or {})
    check_arrays(functional.paths, functional.leaves)
    return functional

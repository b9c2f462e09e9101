"""Models that come in another form than `quantize` takes: one sentence with the line to write."""

from collections.abc import Mapping
from typing import Any

EQUINOX = (
    "For an Equinox module: params, static = eqx.partition(module, eqx.is_array); jpfq.quantize(lambda params, x: "
    "eqx.combine(params, static)(x), batches, rules, params=params), with jax.vmap around the call if the module takes one "
    "sample."
)
PENZAI = (
    "For a Penzai model: bare, params = pz.unbind_params(model, freeze=True); jpfq.quantize(lambda params, x: "
    "pz.bind_variables(bare, params)(x), batches, rules, params=params)."
)
PARTITION = f"Pass only the arrays as params, and close over the rest in the function. {EQUINOX}"
OWNING = {"equinox": EQUINOX, "penzai": PENZAI}
HAIKU = {
    "Transformed": "forward = hk.without_apply_rng(transformed).apply",
    "TransformedWithState": "forward = lambda params, x: transformed.apply(params, state, None, x)[0]",
}


def remedy_of(model: Any) -> tuple[bool, str]:
    """A framework whose models contain their parameters: the test for its models, and the line to write for one."""
    package = _package(model)
    return package in OWNING, OWNING.get(package or "", PARTITION)


def check_model(model: Any, params: Any) -> None:
    """Raises for a class, a training state or a transformed function in place of a model."""
    name = getattr(model, "__name__", type(model).__name__)
    if isinstance(model, type) and (params is None or any(base.__name__ == "Module" for base in model.__mro__)):
        raise ValueError(f"model is the class {name}: pass an instance of it, model = {name}(..) with its arguments.")
    if _is_train_state(model):
        raise ValueError(
            f"model is a {name}, which holds parameters but not the module: jpfq.quantize(module, batches, rules, "
            f"variables={_variables('state', model)})."
        )
    if isinstance(model, tuple) and hasattr(model, "init") and name in HAIKU:
        call = "jpfq.quantize(forward, batches, rules, params=params)"
        raise ValueError(f"model is what Haiku's transform returns: {HAIKU[name]}; {call}.")
    owner = getattr(model, "__self__", None)
    bare = isinstance(params, Mapping) and "params" not in params
    if bare and getattr(model, "__name__", "") == "apply" and _package(owner, "Module") == "flax":
        raise ValueError(
            f"model is the method apply of {type(owner).__name__}: pass the module itself, jpfq.quantize(module, batches, "
            "rules, variables={'params': params})."
        )


def check_params(name: str, value: Any, model: Any) -> None:
    """Raises for a training state in place of variables or params."""
    if _is_train_state(value):
        own = _variables("state", value) if name == "variables" else "state.params"
        raise ValueError(f"{name} is a {type(value).__name__}: pass {name}={own}.")
    if name == "variables" and value is not None and not isinstance(value, Mapping):
        raise ValueError(
            f"variables is a dict of collections, as module.init returns it, such as {{'params': params}}; got a "
            f"{type(value).__name__}."
        )


def _is_train_state(x: Any) -> bool:
    return callable(getattr(x, "apply_fn", None)) and hasattr(x, "params") and not isinstance(x, type)


def _variables(name: str, state: Any) -> str:
    more = f", 'batch_stats': {name}.batch_stats" if hasattr(state, "batch_stats") else ""
    return f"{{'params': {name}.params{more}}}"


def _package(x: Any, base: str | None = None) -> str | None:
    """The package that defines the type of `x`, or the first of its bases that has a name."""
    kinds = type(x).__mro__
    packages = [kind.__module__.partition(".")[0] for kind in kinds if base is None or kind.__name__ == base]
    known = [package for package in packages if package in (*OWNING, "flax")]
    return known[0] if known else None

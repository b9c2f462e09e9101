"""Flax Linen: (module, variables) as a pure function of leaves, and back."""

from typing import Any

import flax.errors
from flax import linen

from .functional import Adapter, Functional, call, flatten, identity_of


def is_linen(model: Any) -> bool:
    """True for a Linen module."""
    return isinstance(model, linen.Module)


def from_linen(module: linen.Module, variables: Any, kwargs: dict) -> Functional:
    """The leaves are those of `variables`. Paths of parameters omit the collection "params"."""
    if variables is None:
        raise ValueError(
            "A Linen module needs its variables: jpfq.quantize(module, batches, rules, variables=variables)."
        )
    if "params" not in variables:
        raise ValueError(
            f"variables must hold the collection 'params', as module.init returns it; got {sorted(variables)}. "
            "For bare parameters pass variables={'params': params}."
        )
    full, leaves, tree = flatten(variables)
    trainable = tuple(path.startswith("params/") for path in full)

    def fn(leaves, batch):
        variables = tree.unflatten(leaves)
        try:
            return call(lambda *args, **kw: module.apply(variables, *args, **kw), batch, kwargs)
        except (flax.errors.ModifyScopeVariableError, flax.errors.ScopeCollectionNotFound) as error:
            if 'collection "cache"' in str(error):
                raise ValueError(
                    "The model fills a cache while it runs, as attention does with decode=True, one position at a time. "
                    "Calibrate on whole sequences with decode=False: set it on the module, or pass "
                    f"kwargs={{'decode': False}} if it is an argument of the call. Flax says: {error}"
                ) from error
            if isinstance(error, flax.errors.ScopeCollectionNotFound):
                raise
            raise ValueError(
                "The model changes its variables while it runs, as BatchNorm does in training. Run it in evaluation mode, "
                f"by kwargs={{'train': False}} or the switch that it has. Flax says: {error}"
            ) from error
        except flax.errors.InvalidRngError as error:
            raise ValueError(
                "The model asks for random numbers, as Dropout does in training. Run it in evaluation mode, by "
                f"kwargs={{'deterministic': True}} or the switch that it has. Flax says: {error}"
            ) from error

    paths = tuple(path.removeprefix("params/") for path in full)
    rebuild = lambda leaves: _rebuild(tree.unflatten(leaves))
    origin = lambda: (from_linen, (module, tree.unflatten(range(len(paths))), kwargs))
    return Functional(fn, paths, leaves, trainable, rebuild, identity_of(module, tree, kwargs), origin)


def _rebuild(variables):
    return {"variables": variables, "params": variables["params"]}


def unboxed(tree: Any) -> Any:
    """Variables without Flax's boxes, such as the names of axes."""
    return linen.unbox(tree)


LINEN = Adapter("linen", "a Linen module", "variables", is_linen, from_linen)

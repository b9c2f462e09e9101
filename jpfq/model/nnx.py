"""Flax NNX: a model as a pure function of leaves, and back. The given model is never modified."""

from typing import Any

from flax import nnx

from .functional import Adapter, Functional, call, flatten


def is_nnx(model: Any) -> bool:
    """True for an NNX model."""
    return isinstance(model, nnx.Module)


def from_nnx(model: nnx.Module, kwargs: dict) -> Functional:
    """The leaves are those of the parameters (`nnx.Param`), then those of all other state."""
    graph, params, state = nnx.split(model, nnx.Param, ...)
    paths, leaves, tree = flatten(params)
    state_paths, state_leaves, state_tree = flatten(state)
    count = len(leaves)
    counters, caches = (set(flatten(nnx.state(model, kind))[0]) for kind in (nnx.RngState, nnx.Cache))

    def merge(leaves):
        return nnx.merge(graph, tree.unflatten(leaves[:count]), state_tree.unflatten(leaves[count:]))

    def fn(leaves, batch):
        model = merge(leaves)
        out = call(model, batch, kwargs)
        _, _, after = nnx.split(model, nnx.Param, ...)
        _refuse_change(state_paths, leaves[count:], dict(zip(*flatten(after)[:2], strict=True)), counters, caches)
        return out

    return Functional(
        fn,
        paths + state_paths,
        leaves + state_leaves,
        (True,) * count + (False,) * len(state_leaves),
        lambda leaves: {"model": merge(leaves), "params": tree.unflatten(leaves[:count])},
        origin=lambda: (from_nnx, (merge(range(count + len(state_leaves))), kwargs)),
    )


def _refuse_change(paths, before, after, counters, caches):
    """Raises if state changes, other than counters of random numbers, which the trace checks (randomness.py)."""
    for path, leaf in zip(paths, before, strict=True):
        if path not in counters and after.get(path) is not leaf:
            if path in caches or "cache" in path.lower():
                raise ValueError(
                    f"The model fills a cache while it runs ('{path}' changes), as attention does with decode=True, one "
                    "position at a time. Calibrate on whole sequences: model.set_attributes(decode=False)."
                )
            raise ValueError(
                f"The model changes its state, as BatchNorm does in training ('{path}' changes while it runs). "
                "Call model.eval() before quantizing it."
            )


def as_param(x: Any) -> nnx.Param:
    """An array as an `nnx.Param`."""
    return nnx.Param(x)


NNX = Adapter("nnx", "an NNX model", None, is_nnx, lambda model, _, kwargs: from_nnx(model, kwargs))

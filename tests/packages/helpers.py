"""What must hold for a model of any package: every kernel found, the same outputs, written back exactly, small errors."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jpfq
from jpfq.calibrate.stream import Stream
from jpfq.model.functional import flatten
from tests.network import zoo


class Case(NamedTuple):
    """A model, its parameters, batches, and the paths of the kernels that are to be found."""

    model: Any  # as `jpfq.quantize` takes it
    given: dict  # what it takes beside the model: params, variables or kwargs
    params: Any
    run: Callable  # (params, batch) -> the model's own outputs
    batches: list
    kernels: set


def check(case: Case, rules: Any = None, tolerance: float = 1e-5) -> jpfq.Quantized:
    """Quantizes a model to 8 bits, by one plain method unless told otherwise, and asserts all that follows."""
    rules = rules or zoo.plain(bits=8)
    inside, finish = [], Stream.finish

    def recording(self):
        for pair in finish(self):
            inside.append(pair)
            yield pair

    with mock.patch.object(Stream, "finish", recording):
        out = jpfq.quantize(case.model, case.batches, rules, **case.given)
    check_kernels(case, out, jpfq.plan(case.model, case.batches[0], rules, **case.given))
    check_weights(case, out)
    check_outputs(case, out, inside, tolerance)
    assert 0 < out.output_error < 0.02
    return out


def check_kernels(case: Case, out: jpfq.Quantized, plan: jpfq.Plan) -> None:
    """The kernels expected are quantized, every other parameter of rank 2 or more has a reason, and the plan said so."""
    shapes = leaves(case.params)
    assert set(out.tensors) == set(out.info) == {line.path for line in plan.lines} == case.kernels
    assert out.skipped == plan.skipped
    assert {path for path, x in shapes.items() if x.ndim > 1} - case.kernels <= set(out.skipped) <= set(shapes)
    assert all(out.skipped.values())


def check_weights(case: Case, out: jpfq.Quantized) -> None:
    """What came back is the dequantized tensor where there is one, and what was given elsewhere; of the same type."""
    before, after = leaves(case.params), leaves(out.params)
    assert list(before) == list(after)
    for path, old in before.items():
        new, tensor = after[path], out.tensors.get(path)
        assert (new.shape, new.dtype) == (old.shape, old.dtype), path
        np.testing.assert_array_equal(new, old if tensor is None else tensor.dequantize(), err_msg=path)


def check_outputs(case: Case, out: jpfq.Quantized, inside: list, tolerance: float) -> None:
    """The two networks inside are the model itself, with the parameters given and with those that came back."""
    run = jax.jit(lambda params, batch: jax.tree.leaves(case.run(params, batch)))
    sums = 0.0
    for batch, (exact, lossy) in zip(case.batches, inside, strict=True):
        own, own_lossy = ([wide(x) for x in run(params, batch)] for params in (case.params, out.params))
        for ours, theirs in zip([*exact, *lossy], [*own, *own_lossy], strict=True):
            assert np.abs(wide(ours) - theirs).max() <= tolerance * np.abs(theirs).max()
        sums += np.array([[np.sum((b - a) ** 2), np.sum(a**2)] for a, b in zip(own, own_lossy, strict=True)])
    error = max(math.sqrt(difference / energy) for difference, energy in sums)
    np.testing.assert_allclose(out.output_error, error, rtol=1e-2)


def wide(x) -> np.ndarray:
    """An array in float64."""
    return np.asarray(x, np.float64)


def leaves(tree: Any) -> dict:
    """The leaves of a tree by their '/'-joined path."""
    return dict(zip(*flatten(tree)[:2], strict=True))


def matrices(tree: Any) -> set:
    """The paths of all leaves of rank 2 or more."""
    return {path for path, x in leaves(tree).items() if x.ndim > 1}


def random_like(shapes: Any, seed: int = 7) -> Any:
    """Parameters of the given shapes: kernels of about unit gain, scales near 1, all else small."""
    rng = np.random.default_rng(seed)

    def fill(path, x):
        name, values = str(getattr(path[-1], "key", "")), rng.standard_normal(x.shape)
        if len(x.shape) > 1:
            values /= math.sqrt(math.prod(x.shape[:-1]))
        elif name == "var":
            values = np.ones(x.shape)
        else:
            values = 0.1 * values + (name in ("scale", "weight", "w"))
        return jnp.asarray(values, x.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def filled(make: Callable[[], nnx.Module]) -> nnx.Module:
    """An NNX model with random parameters, in a fraction of the time in which its initialisers compile."""
    graph, shapes, rest = nnx.split(nnx.eval_shape(make), nnx.Param, ...)
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.extended)
    rest = jax.tree.map(lambda x: jax.random.key(0) if is_key(x) else jnp.zeros(x.shape, x.dtype), rest)
    model = nnx.merge(graph, random_like(shapes), rest)
    model.eval()
    return model


def nnx_case(model: nnx.Module, batches: list, left: set) -> Case:
    """A case of an NNX model that is to be quantized but for some of its matrices. A batch is a tuple or a dict."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def run(params, batch):
        model = nnx.merge(graph, params, rest, copy=True)
        return model(**batch) if isinstance(batch, dict) else model(*batch)

    return Case(model, {}, params, run, batches, matrices(params) - left)


def linen_case(module: Any, variables: Any, kwargs: dict, batches: list, left: set = frozenset()) -> Case:
    """A case of a Linen module that is to be quantized but for some of its matrices."""

    def run(params, batch):
        return module.apply({**variables, "params": params}, *jax.tree.leaves(batch), **kwargs)

    given = {"variables": variables, "kwargs": kwargs}
    return Case(module, given, variables["params"], run, batches, matrices(variables["params"]) - set(left))


def tokens(seed: int, length: int = 8, size: int = 50) -> jax.Array:
    """Three sequences of random tokens, none of them special."""
    return jnp.asarray(np.random.default_rng(seed).integers(3, size, (3, length)))


def normal(seed: int, *shape: int) -> jax.Array:
    """Normal random numbers in float32."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)

"""What must hold for a model of any package: every kernel found, the same outputs, written back exactly, small errors."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import jpfq
from jpfq.network.functional import flatten
from jpfq.network.stream import Stream


class Case(NamedTuple):
    """A model, its parameters, batches, and the paths of the kernels that are to be found."""

    model: Any  # as `jpfq.quantize` takes it
    given: dict  # what it takes beside the model: params, variables or kwargs
    params: Any
    run: Callable  # (params, batch) -> the model's own outputs
    batches: list
    kernels: set


class Result(NamedTuple):
    """What `jpfq.quantize` gave, and what it computed on the way."""

    case: Case
    quantized: jpfq.Quantized
    inside: list  # per batch: the outputs of the float and of the quantized network, as lists of arrays


def quantized(case: Case, rules: Any) -> Result:
    """The model after `jpfq.quantize`, with the outputs of both networks as they were inside."""
    inside, finish = [], Stream.finish

    def recording(self):
        for pair in finish(self):
            inside.append(pair)
            yield pair

    with mock.patch.object(Stream, "finish", recording):
        return Result(case, jpfq.quantize(case.model, case.batches, rules, **case.given), inside)


def check_all(result: Result, tolerance: float = 1e-5) -> None:
    """All that follows."""
    check_kernels(result)
    check_weights(result)
    check_outputs(result, tolerance)
    assert 0 < result.quantized.output_error < 0.02


def check_kernels(result: Result) -> None:
    """The kernels expected are quantized, and every other parameter of rank 2 or more is listed with a reason."""
    case, out = result.case, result.quantized
    assert set(out.tensors) == set(out.info) == case.kernels
    shapes = leaves(case.params)
    assert {path for path, x in shapes.items() if x.ndim > 1} <= case.kernels | set(out.skipped)
    assert all(reason.strip() and path in shapes for path, reason in out.skipped.items())


def check_weights(result: Result) -> None:
    """What came back is the dequantized tensor where there is one, and the parameter given elsewhere; of the same type."""
    before, after = leaves(result.case.params), leaves(result.quantized.params)
    assert list(before) == list(after)
    for path, old in before.items():
        new, tensor = after[path], result.quantized.tensors.get(path)
        assert (new.shape, new.dtype) == (old.shape, old.dtype), path
        np.testing.assert_array_equal(new, old if tensor is None else tensor.dequantize(), err_msg=path)


def check_outputs(result: Result, tolerance: float) -> None:
    """Both networks inside are the model with the parameters given and with those that came back."""
    case, out = result.case, result.quantized
    run = jax.jit(lambda params, batch: jax.tree.leaves(case.run(params, batch)))
    sums = 0.0
    for batch, (exact, lossy) in zip(case.batches, result.inside, strict=True):
        own, own_lossy = run(case.params, batch), run(out.params, batch)
        for ours, theirs in zip([*exact, *lossy], [*own, *own_lossy], strict=True):
            assert relative(ours, theirs) <= tolerance
        sums += np.array([[np.sum((b - a) ** 2.0), np.sum(a**2.0)] for a, b in zip(map(wide, own), map(wide, own_lossy))])
    error = max(math.sqrt(difference / energy) for difference, energy in sums)
    np.testing.assert_allclose(out.output_error, error, rtol=1e-2)


def relative(x, reference) -> float:
    """The largest difference, against the largest entry."""
    x, reference = wide(x), wide(reference)
    return float(np.abs(x - reference).max() / np.abs(reference).max())


def wide(x) -> np.ndarray:
    """An array in float64."""
    return np.asarray(x, np.float64)


def leaves(tree: Any) -> dict:
    """The leaves of a tree by their '/'-joined path."""
    return dict(zip(*flatten(tree)[:2], strict=True))


def random_like(shapes: Any, seed: int = 7) -> Any:
    """Parameters of the given shapes: matrices of unit gain, scales near 1, all else small."""
    rng = np.random.default_rng(seed)

    def fill(path, x):
        values = rng.standard_normal(x.shape)
        if len(x.shape) > 1:
            values /= math.sqrt(math.prod(x.shape) / max(x.shape[-1], 1))
        else:
            name = str(getattr(path[-1], "key", ""))
            values = np.ones(x.shape) if name == "var" else 0.1 * values + (name in ("scale", "weight"))
        return jnp.asarray(values, x.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


def tokens(seed: int, length: int = 8, size: int = 50, batch: int = 3) -> jax.Array:
    """Random token numbers, none of them special."""
    return jnp.asarray(np.random.default_rng(seed).integers(3, size, (batch, length)))


def normal(seed: int, *shape: int) -> jax.Array:
    """Normal random numbers in float32."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)

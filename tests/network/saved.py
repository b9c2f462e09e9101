"""Results made by hand, without any quantization, to save and load."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import jpfq
from jpfq.matrix import code_dtype
from jpfq.model.adapters import adapt
from jpfq.model.mesh import like
from jpfq.scalar import SumSpec, WorstCase


def tensor(shape, step_shape, grid, dtype=jnp.float32, seed=0, **rest):
    """Random codes and steps, and zero points where the grid has them fitted."""
    rng = np.random.default_rng(seed)
    lo, hi, zero, _ = grid.alphabet()
    codes = jnp.asarray(rng.integers(int(max(lo, -1000)), int(min(hi, 1000)) + 1, shape), code_dtype(grid))
    step = jnp.asarray(rng.uniform(0.1, 1, step_shape), jnp.float32)
    zeros = rng.integers(int(lo), int(hi) + 1, step_shape) if zero is None else np.full(step_shape, zero)
    return jpfq.QTensor(codes, step, jnp.asarray(zeros, jnp.float32), grid, np.dtype(dtype), **rest)


def info(seed=0):
    """Random figures; some not finite, as they may be."""
    values = np.random.default_rng(seed).uniform(0, 1, 20).astype(np.float32)
    numbers = [f.name for f in dataclasses.fields(jpfq.Info) if f.name != "reach"]
    fields = {name: jnp.asarray(values[i]) for i, name in enumerate(numbers)}
    return jpfq.Info(**fields | {"square_bound": jnp.asarray(np.nan, jnp.float32), "dead": jnp.asarray(3)})


def reached(bits, tile, shape, inputs=(0, 255), seed=0):
    """How far sums of random codes could go, in tiles of (matrices, tiles, out)."""
    lo, hi = inputs
    most = (2 ** (bits - 1) - 1) // (hi - lo)
    up, down = np.random.default_rng(seed).integers(0, most + 1, (2, *shape))
    ends = np.stack([hi * up - lo * down, hi * down - lo * up], -1).astype(np.int32)
    return WorstCase(SumSpec(*map(jnp.asarray, (bits, lo, hi)), tile), jnp.asarray(ends))


def result(model, tensors, *, variables=None, params=None, kwargs=None, inputs=None):
    """As `jpfq.quantize` would return it."""
    functional = adapt(model, variables, params, kwargs)
    leaves = [
        like(tensors[path].dequantize(), leaf) if path in tensors else leaf
        for path, leaf in zip(functional.paths, functional.leaves, strict=True)
    ]
    rebuilt = functional.rebuild(leaves)
    return jpfq.Quantized(
        params=rebuilt["params"],
        tensors=tensors,
        info={path: info(i) for i, path in enumerate(tensors)},
        skipped={"other": "rule 1 skips it"},
        inputs=inputs or {},
        biases=("bias",),
        output_error=0.125,
        peak_bytes=1000,
        _functional=dataclasses.replace(functional, leaves=tuple(leaves)),
        _model=rebuilt.get("model"),
        _variables=rebuilt.get("variables"),
    )


def plain(x):
    """A leaf as NumPy knows it."""
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x)


def assert_same(found, expected, structure=True):
    """Equal to the bit, types included."""
    if structure:
        assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert getattr(a, "dtype", type(a)) == getattr(b, "dtype", type(b))
        a, b = plain(a), plain(b)
        assert a.shape == b.shape
        assert a.tobytes() == b.tobytes()

"""Sweeps over numbers, several matrices at once, jit and the number of compilations."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from jpfq.matrix import recipe_of, solve_all
from tests.helpers import PLAIN, assert_close, assert_codes_equal, problem32
from tests.reference import gpfq as reference

N, OUT = 40, 6
GPFQ = PLAIN | {"method": jpfq.GPFQ()}


@pytest.mark.slow
def test_vmap_over_numbers_is_the_loop():
    """Over the width of the grid and the factor of the scale at once."""
    W, gram = problem32()
    run = lambda bits, c: jpfq.solve(W, gram, **GPFQ | {"grid": jpfq.Integer(bits), "scale": jpfq.scale.AbsMax(c)})
    numbers = [(2, 1.0), (3, 0.5), (3, 1.0), (8, 0.9)]
    tensors, infos = jax.vmap(run)(*(jnp.array(x) for x in zip(*numbers, strict=True)))
    for i, (bits, c) in enumerate(numbers):
        tensor, info = run(bits, c)
        assert_codes_equal(tensors.codes[i], tensor.codes)
        assert_close(tensors.step[i], tensor.step)
        assert_close(infos.relative_error[i], info.relative_error)


@pytest.mark.slow
def test_several_matrices_at_once_are_the_loop():
    cases = [problem32(seed) for seed in (31, 32, 33)]
    W, grams = jax.tree.map(lambda *x: jnp.stack(x), *cases)
    recipe = recipe_of(3, None, **GPFQ)
    together = solve_all(W, grams, recipe, None)
    alone = [jpfq.solve(W, gram, bits=3, **GPFQ) for W, gram in cases]
    for i, (tensor, _) in enumerate(alone):
        assert_codes_equal(together.codes[i], tensor.codes)
        assert_close(together.step[i], tensor.step)
    joined = jpfq.Info.join([info for _, info in alone])
    for name in ("square_error", "energy", "saturation", "dead", "sparsity"):
        assert_close(getattr(together.info, name).astype(jnp.float32), getattr(joined, name))
    assert_close(together.info.entropy, reference.entropy(together.codes), scale=1)


def test_matrices_share_a_step_per_tensor():
    cases = [problem32(seed) for seed in (31, 32, 33)]
    W, grams = jax.tree.map(lambda *x: jnp.stack(x), *cases)
    recipe = recipe_of(3, None, **GPFQ | {"scale": jpfq.scale.AbsMax(per=jpfq.scale.PerTensor())})
    found = solve_all(W, grams, recipe, None)
    assert found.step.shape == (1, 1, 1)
    assert_close(found.step, np.abs(W).max().reshape(1, 1, 1) / 3)
    assert_close(found.q, found.step * found.codes)


@pytest.mark.slow
def test_jit_of_solve():
    W, gram = problem32()
    tensor, info = jax.jit(lambda W, gram: jpfq.solve(W, gram, bits=4, **GPFQ))(W, gram)
    expected, expected_info = jpfq.solve(W, gram, bits=4, **GPFQ)
    assert_codes_equal(tensor.codes, expected.codes)
    assert (tensor.codes.dtype, tensor.dtype) == (expected.codes.dtype, expected.dtype)
    assert_close(info.relative_error, expected_info.relative_error)


@pytest.mark.slow
def test_one_compilation_serves_equal_shapes():
    compiled = importlib.import_module("jpfq.matrix.stages")._solve_all
    W, gram = problem32()
    settings = GPFQ | {"scale": jpfq.scale.AbsMax()}
    jpfq.solve(W, gram, bits=4, **settings)
    before = compiled._cache_size()
    other_W, other_gram = problem32(34)
    for c, grid in ((0.5, jpfq.Integer(2)), (1.0, jpfq.Integer(8)), (0.9, jpfq.Ternary()), (1.1, jpfq.Equispaced(4))):
        jpfq.solve(other_W, other_gram, grid=grid, **settings | {"scale": jpfq.scale.AbsMax(c)})
    jpfq.solve(W.astype(jnp.bfloat16), gram, bits=3, **settings)
    assert compiled._cache_size() == before
    jpfq.solve(W, gram, bits=4, **settings, block=7)
    assert compiled._cache_size() == before + 1

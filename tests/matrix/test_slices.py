"""Slices: a wide matrix that is solved a run of neurons at a time has the codes and the figures of one that is not."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from jpfq.matrix import Gram, cut, recipe_of, slice_width, slices, solve_all, solve_sliced

RECIPES = {
    "recommended": {},
    "random": {"method": jpfq.GPFQ(), "rounding": jpfq.rounding.Stochastic(), "scale": jpfq.scale.AbsMax()},
    "groups": {"scale": jpfq.scale.AbsMax(per=jpfq.scale.PerGroup(4)), "method": jpfq.OPTQ(), "finish": None},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_runs_of_neurons_are_the_whole(name, monkeypatch, x64):
    k = jax.random.split(jax.random.key(0), 3)
    X = jax.random.normal(k[0], (2, 50, 12), jnp.float64).at[:, :, 3].set(0)
    gram = jax.vmap(Gram.from_data)(X, X + 0.1 * jax.random.normal(k[1], X.shape, X.dtype))
    W, key = jax.random.normal(k[2], (2, 12, 29), X.dtype), jax.random.key(4)
    recipe = recipe_of(None, jpfq.Asymmetric(3), **RECIPES[name])
    whole = cut(solve_all(W, gram, recipe, key), W.shape, np.uint8)
    monkeypatch.setattr(slices, "ENTRIES", 2 * 12 * 12)
    assert slice_width(W.shape, recipe) == 10  # twice, and nine
    found = solve_sliced(W, gram, recipe, key, np.uint8)
    np.testing.assert_array_equal(found.codes, whole.codes)
    for part in ("q", "step", "zero"):
        np.testing.assert_allclose(getattr(found, part), getattr(whole, part), rtol=1e-12)
    scale = 4.0 ** (int(found.info.exponent) - int(whole.info.exponent))
    for field in dataclasses.fields(whole.info):
        one, other = getattr(found.info, field.name), getattr(whole.info, field.name)
        if other is None or field.name == "exponent":
            continue
        one = one * scale if field.name.startswith("square") or field.name == "energy" else one
        if field.name in ("square_bound", "square_rounding"):  # of each run by itself: tighter
            assert not one > other * (1 + 1e-9)
        else:
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-24, err_msg=field.name)


@pytest.mark.slow
def test_a_wide_matrix_and_a_wide_layer_are_solved_in_runs(monkeypatch, x64):
    k = jax.random.split(jax.random.key(1), 2)
    x, W = jax.random.normal(k[0], (60, 8), jnp.float64), jax.random.normal(k[1], (8, 50), jnp.float64)
    whole, info = jpfq.solve(W, Gram.from_data(x), bits=4)
    monkeypatch.setattr(slices, "ENTRIES", 8 * 8)
    runs, told = jpfq.solve(W, Gram.from_data(x), bits=4)
    np.testing.assert_array_equal(runs.codes, whole.codes)
    np.testing.assert_allclose(told.relative_error, info.relative_error, rtol=1e-9)
    out = jpfq.quantize(lambda params, x: x @ params["w"], [x], 4, params={"w": W})
    np.testing.assert_array_equal(out.tensors["w"].codes, whole.codes)
    np.testing.assert_allclose(out.info["w"].relative_error, info.relative_error, rtol=1e-9)


def test_what_neurons_share_keeps_them_together():
    wide = (1, 64, 2**20)
    assert slice_width(wide, recipe_of(4, None)) == 2**17
    tensor = jpfq.scale.AbsMax(per=jpfq.scale.PerTensor())
    for settings in ({"scale": tensor}, {"prepare": jpfq.prepare.MagR()}, {"rounding": jpfq.rounding.Prune(0.5)}):
        assert slice_width(wide, recipe_of(4, None, **settings)) == wide[2]
    assert slice_width((1, 14336, 4096), recipe_of(4, None)) == 4096  # as many factors would cost more than they save

"""One battery over order x method x form x rounding x grid: what every combination of settings keeps."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from tests.helpers import Dither, assert_close, assert_codes_equal, assert_on_grid, problem

N, OUT, DEAD = 40, 6, (3, 17)

ORDERS = {"Natural": jpfq.Natural(), "Descending": jpfq.Descending()}
METHODS = {"GPFQ-gram": (jpfq.GPFQ(), "gram"), "GPFQ-data": (jpfq.GPFQ(), "data"), "MSQ": (jpfq.MSQ(), "gram")}
ROUNDINGS = {"Nearest": jpfq.Nearest(), "Dither": Dither()}
GRIDS = [
    jpfq.Integer(3),
    jpfq.Integer(3, narrow=True),
    jpfq.Asymmetric(3),
    jpfq.Symmetric(4),
    jpfq.Equispaced(4),
    jpfq.Equispaced(5),
    jpfq.Ternary(),
    jpfq.Binary(),
]
# Every order with every method; drawing a key is tried on two of them, to save compilations.
COMBINATIONS = [(order, method, "Nearest") for order in ORDERS for method in METHODS]
COMBINATIONS += [("Natural", "GPFQ-data", "Dither"), ("Descending", "GPFQ-gram", "Dither")]
each_combination = pytest.mark.parametrize(("order", "method", "rounding"), COMBINATIONS)


def drawn(seed, method):
    """Weights, and their data in the form that the method takes."""
    X, Xq, W = (jnp.asarray(x, jnp.float32) for x in problem(seed, n=N, out=OUT, dead=DEAD))
    rows = jpfq.Rows(X, Xq)
    return W, rows if METHODS[method][1] == "data" else rows.gram()


def settings(order, method, rounding):
    """What `solve` is called with."""
    (method, form), rounding = METHODS[method], ROUNDINGS[rounding]
    key = jax.random.key(0) if rounding.random else None
    scale = jpfq.AbsMax(0.8, per=jpfq.PerGroup(8))
    how = {"order": ORDERS[order], "method": method, "form": form, "rounding": rounding, "scale": scale}
    return how | {"key": key, "block": 16}


def zeros(tensor):
    """The code that means 0, of each weight."""
    return np.repeat(np.asarray(tensor.zero), 8, 0)


@pytest.mark.parametrize(
    ("order", "method", "rounding", "grid"),
    [(*how, grid) for how in COMBINATIONS for grid in (GRIDS if how[2] == "Nearest" else GRIDS[:2])],
    ids=str,
)
def test_what_comes_out(order, method, rounding, grid):
    W, data = drawn(60, method)
    for weights in (W, W.astype(jnp.bfloat16)):
        tensor, info = jpfq.solve(weights, data, grid=grid, **settings(order, method, rounding))
        assert tensor.shape == tensor.codes.shape == (N, OUT)
        assert tensor.step.shape == tensor.zero.shape == (N // 8, OUT)
        assert tensor.dequantize().dtype == tensor.dtype == weights.dtype
        assert tensor.step.dtype == info.relative_error.dtype == jnp.float32
        assert_on_grid(tensor)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((tensor, info)))
        assert 0 < info.relative_error < 2
        assert info.dead == len(DEAD)
        assert_close(info.sparsity, (np.asarray(tensor.codes) == zeros(tensor)).mean(), scale=1)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(("order", "method"), [(o, m) for o, m, r in COMBINATIONS if r == "Nearest" and m != "MSQ"])
def test_dead_coordinates_take_the_level_nearest_zero(order, method, grid):
    W, data = drawn(60, method)
    tensor, _ = jpfq.solve(W, data, grid=grid, **settings(order, method, "Nearest"))
    dead = list(DEAD)
    step, zero = np.repeat(np.asarray(tensor.step), 8, 0)[dead], zeros(tensor)[dead]
    assert_close(np.asarray(tensor.dequantize())[dead], np.where(zero == np.round(zero), 0, step / 2), scale=1)


@pytest.mark.parametrize(("order", "method", "rounding"), [c for c in COMBINATIONS if c[2] == "Dither"])
def test_jit_of_vmap_is_the_loop(order, method, rounding):
    cases = [drawn(seed, method) for seed in (60, 61)]
    solve = lambda W, data: jpfq.solve(W, data, grid=jpfq.Integer(3), **settings(order, method, rounding))
    tensors, infos = jax.jit(jax.vmap(solve))(*jax.tree.map(lambda *x: jnp.stack(x), *cases))
    for i, case in enumerate(cases):
        tensor, info = solve(*case)
        assert_codes_equal(tensors.codes[i], tensor.codes)
        assert_close(tensors.dequantize()[i], tensor.dequantize())
        assert_close(infos.relative_error[i], info.relative_error)


@each_combination
def test_layers_of_equal_shape_share_one_compilation(order, method, rounding):
    compiled = importlib.import_module("jpfq.matrix.solve")._solve_all
    recipe = settings(order, method, rounding)
    jpfq.solve(*drawn(60, method), grid=jpfq.Integer(3), **recipe)
    before = compiled._cache_size()
    for seed, grid in ((61, jpfq.Integer(4)), (62, jpfq.Integer(8, narrow=True)), (63, jpfq.Symmetric(2))):
        jpfq.solve(*drawn(seed, method), grid=grid, **recipe)
    assert compiled._cache_size() == before

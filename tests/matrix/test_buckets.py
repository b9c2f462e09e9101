"""Buckets: what fills a problem up changes neither codes nor figures of the rest; few sizes serve many layers."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from jpfq.matrix import Bucket, Gram, assign_buckets, cut, fill, recipe_of, solve_all
from jpfq.matrix.buckets import COMPILE, fills, seconds

PLAIN = {"finish": None, "shrinkage": None}
TENSOR = jpfq.scale.AbsMax(per=jpfq.scale.PerTensor())
RECIPES = {
    "recommended": {},
    "GPFQ": {"method": jpfq.GPFQ(), "scale": jpfq.scale.MinMSE(), **PLAIN},
    "one step": {"method": jpfq.OPTQ(), "scale": TENSOR, "finish": jpfq.finish.Refit()},
    "random": {"rounding": jpfq.rounding.Stochastic(), "order": jpfq.order.Natural()},
    "MSQ": {"method": jpfq.MSQ(), **PLAIN},
    "GPTAQ": {"method": jpfq.GPTAQ(), "shrinkage": None},
    "UNI": {"method": jpfq.UNI(2.0), "finish": jpfq.finish.Descend()},
    "exact": {"method": jpfq.Qronos(exact=True, damping=jpfq.damping.TopEigenvalue())},
}
GRIDS = (jpfq.Integer(3), jpfq.Ternary(), jpfq.Binary(), jpfq.Asymmetric(2))


def problem(agree: bool, rows: int):
    """Two matrices, an input that no row shows, and a neuron of 0."""
    k = jax.random.split(jax.random.key(rows), 3)
    X = jax.nn.relu(jax.random.normal(k[0], (2, rows, 20), jnp.float64)).at[:, :, 3].set(0)
    Xq = X + 0.05 * jax.random.normal(k[1], X.shape, X.dtype) * (X > 0).astype(X.dtype)
    W = jax.random.normal(k[2], (2, 20, 7), X.dtype).at[:, :, 2].set(0)
    return W, jax.vmap(Gram.from_data)(X) if agree else jax.vmap(Gram.from_data)(X, Xq)


@pytest.mark.parametrize(
    "name",
    [pytest.param("recommended", marks=pytest.mark.slow), "GPFQ", pytest.param("random", marks=pytest.mark.slow)],
)
def test_what_fills_up_changes_nothing(name, x64):
    check(name, agree=name == "GPFQ", size=(3, 37, 19), drifts=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize(
    ("agree", "drifts", "size"), [(False, True, (3, 130, 19)), (True, True, (2, 37, 7)), (True, False, (2, 20, 16))]
)
def test_every_recipe_in_every_bucket(name, agree, drifts, size, x64):
    check(name, agree, size, drifts)


def check(name, agree, size, drifts):
    for grid in GRIDS[: 2 if name == "exact" else 4]:
        recipe, key = recipe_of(None, grid, **RECIPES[name]), jax.random.key(5)
        if not fills(recipe):
            assert isinstance(recipe.scale, jpfq.scale.MinMSE)
            assert isinstance(grid, jpfq.Binary)
            continue
        W, gram = problem(agree, 12 if name == "recommended" else 60)
        alone = cut(solve_all(W, gram, recipe, key), W.shape, np.int8)
        filled, data = fill(W, gram, Bucket(size, drifts))
        assert filled.shape == size
        found = solve_all(filled, data, recipe, key, jnp.asarray(W.shape[-1]))
        assert_same(cut(found, W.shape, np.int8), alone)


def assert_same(found, expected):
    np.testing.assert_array_equal(found.codes, expected.codes)
    for name in ("q", "step", "zero"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-12)
    for field in dataclasses.fields(found.info):
        one, other = getattr(found.info, field.name), getattr(expected.info, field.name)
        if field.name == "square_bound" and np.isnan(one):
            continue  # GPTAQ has a bound where there is no C alone
        if other is not None:
            np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-24, err_msg=field.name)


def test_parts_of_others_are_filled_up_only_if_they_say_so():
    class Counting(jpfq.matrix.Method):
        def __call__(self, W, gram):
            return jpfq.GPFQ()(W / gram.H.shape[0], gram)

    class Half(jpfq.matrix.Damping):
        share = 0.5

        def __call__(self, H):
            return jnp.trace(H) / H.shape[0] / 2

    for method in (Counting(), jpfq.OPTQ(damping=Half())):
        assert not fills(recipe_of(4, None, method=method))
    assert fills(recipe_of(4, None))


def test_parts_that_count_weights_are_not_filled_up():
    refused = (
        {"scale": jpfq.scale.Quantile()},
        {"scale": jpfq.scale.MinError(jpfq.scale.Median())},
        {"rounding": jpfq.rounding.Prune(0.5)},
        {"order": jpfq.order.MinPivot()},
        {"rotation": jpfq.Hadamard()},
        {"prepare": jpfq.prepare.Align()},
        {"scale": jpfq.scale.AbsMax(per=jpfq.scale.PerGroup(4, refit=True)), "order": jpfq.order.Natural()},
    )
    for settings in refused:
        assert not fills(recipe_of(4, None, **settings)), settings
        assert not assign_buckets(
            {i: ((1, n, 8), True, recipe_of(4, None, **settings)) for i, n in enumerate((16, 32))}
        )


RESNET20 = [(1, 27, 16)] + [(1, 144, 16)] * 6 + [(1, 144, 32), (1, 64, 10)]
RESNET20 += [(1, 288, 32)] * 5 + [(1, 288, 64)] + [(1, 576, 64)] * 5


def found_for(sizes, **settings):
    return assign_buckets({i: (size, i > 0, recipe_of(4, None, **settings)) for i, size in enumerate(sizes)})


def test_small_layers_share_a_size_and_large_ones_keep_theirs():
    assert set(found_for(RESNET20).values()) == {Bucket((1, 576, 64), True)}
    assert not found_for([(1, 4096, 4096), (1, 4096, 14336), (1, 14336, 4096)])
    depthwise = [(96, 9, 1), (144, 9, 1), (144, 25, 1), (1, 96, 24)]
    assert len({bucket.size for bucket in found_for(depthwise).values()}) <= 2
    assert set(found_for([(1, 64, 64)] * 8).values()) == {Bucket((1, 64, 64), True)}  # the first as if it drifted


def test_a_bucket_holds_its_members_and_costs_less_than_they_do_alone():
    rng = np.random.default_rng(0)
    for _ in range(20):
        sizes = [tuple(int(x) for x in 2 ** rng.uniform(0, (5, 10, 10))) for _ in range(12)]
        found, recipe = found_for(sizes), recipe_of(4, None)
        for i, bucket in found.items():
            assert all(more >= size for more, size in zip(bucket.size, sizes[i], strict=True))
        solving = sum(seconds(found[i].size if i in found else size, recipe) for i, size in enumerate(sizes))
        programs = len({found.get(i, (size, i > 0)) for i, size in enumerate(sizes)})
        alone = sum(seconds(size, recipe) for size in sizes)
        alone += COMPILE * len({(size, i > 0) for i, size in enumerate(sizes)})
        assert solving + COMPILE * programs <= alone + 1e-9


def test_groups_keep_their_inputs():
    grouped = {"scale": jpfq.scale.AbsMax(per=jpfq.scale.PerGroup(16))}
    found = found_for([(1, 32, 8), (1, 32, 16), (1, 64, 16)], **grouped)
    assert {i: bucket.size for i, bucket in found.items()} == {0: (1, 32, 16), 1: (1, 32, 16)}


@pytest.mark.slow
def test_a_network_of_many_sizes_is_solved_by_one_program(x64):
    """As each of its layers alone, on the inputs that the layers before it leave."""
    widths = (12, 40, 24, 9)
    keys = jax.random.split(jax.random.key(0), len(widths))
    params = {
        f"w{i}": jax.random.normal(keys[i], shape, jnp.float64) for i, shape in enumerate(itertools.pairwise(widths))
    }

    def fn(params, x):
        for i in range(len(widths) - 1):
            x = jax.nn.relu(x @ params[f"w{i}"])
        return x

    x = jax.random.normal(keys[-1], (300, 12), jnp.float64)
    before = solve_all.__globals__["_solve_all"]._cache_size()
    rule = jpfq.Rule(".*", bits=4, scale=jpfq.scale.AbsMax(), method=jpfq.OPTQ())
    out = jpfq.quantize(fn, [x], rule, params=params)
    assert solve_all.__globals__["_solve_all"]._cache_size() - before <= 1
    X = Xq = x
    for i in range(len(widths) - 1):
        data = Gram.from_data(X) if i == 0 else Gram.from_data(X, Xq)
        tensor, info = jpfq.solve(params[f"w{i}"], data, bits=4, scale=rule.scale, method=rule.method)
        found = out.tensors[f"w{i}"]
        np.testing.assert_array_equal(found.codes, tensor.codes)
        np.testing.assert_allclose(found.step, tensor.step, rtol=1e-9)
        np.testing.assert_allclose(out.info[f"w{i}"].relative_error, info.relative_error, rtol=1e-9)
        np.testing.assert_allclose(out.info[f"w{i}"].relative_floor, info.relative_floor, rtol=1e-6, atol=1e-12)
        X, Xq = jax.nn.relu(X @ params[f"w{i}"]), jax.nn.relu(Xq @ found.dequantize())

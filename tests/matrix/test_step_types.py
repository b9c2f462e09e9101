"""Steps that are stored in fewer bits: codes answer for them, through searches, refits, finishers and shards."""

import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from jpfq.scalar.step_types import StepStorage, step_type
from tests.helpers import PLAIN, assert_codes_equal, problem, problem32
from tests.reference import gpfq as reference

N, OUT, SIZE = 48, 6, 8
TYPES = ("bfloat16", "float16", "float8_e8m0fnu", "float8_e4m3fn")
GROUPS = jpfq.scale.PerGroup(SIZE)


@pytest.mark.parametrize("name", TYPES)
def test_codes_answer_for_the_steps_as_stored(x64, name):
    """The published loop over levels of rounded steps."""
    X, Xq, W = problem(31, n=N, out=OUT)
    gram = jpfq.Gram.from_data(jnp.asarray(X), jnp.asarray(Xq))
    settings = PLAIN | {"bits": 4, "scale": jpfq.scale.AbsMax(per=GROUPS), "method": jpfq.GPFQ()}
    free, _ = jpfq.solve(jnp.asarray(W), gram, **settings)
    tensor, info = jpfq.solve(jnp.asarray(W), gram, **settings, step_dtype=name)
    store = StepStorage.over(free.step, step_type(name), 7, jnp.max)
    np.testing.assert_array_equal(tensor.step, store(free.step))
    codes, zero = reference.integer(4)
    levels = reference.level_lists(W.shape, np.asarray(tensor.step), codes, np.full(tensor.step.shape, zero))
    assert_codes_equal(tensor.codes, reference.gpfq_state(W, X, Xq, levels).index - 8)
    assert info.saturated_steps == 0


REFIT = jpfq.scale.PerGroup(SIZE, refit=True)
SETTINGS = {
    "recommended": {},  # a search for steps, and descent
    "refit": {"scale": jpfq.scale.AbsMax(per=REFIT), "finish": jpfq.finish.Refit()},
    "one step": {
        "scale": jpfq.scale.AbsMax(per=jpfq.scale.PerTensor()),
        "finish": jpfq.finish.CosineDescend(1),
    },
}
DEFAULT = {("bfloat16", "recommended"), ("float8_e8m0fnu", "one step"), ("float8_e4m3fn", "recommended")}


@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(name, case, marks=() if (name, case) in DEFAULT else pytest.mark.slow)
        for name in TYPES
        for case in SETTINGS
    ],
)
def test_every_step_is_one_that_is_stored(name, case):
    """And those of 8 bits stay where a search has put them: codes that were chosen for one would not suit another."""
    W, gram = problem32(32, n=N, out=OUT)
    settings = {"scale": jpfq.scale.MinError(jpfq.scale.AbsMax(per=GROUPS))} | SETTINGS[case]
    if "float8" in name and "finish" in settings:
        with pytest.raises(ValueError, match="moves steps a little, which float8"):
            jpfq.solve(W, gram, bits=4, step_dtype=name, **settings)
        settings["finish"] = jpfq.finish.Descend()
    tensor, info = jpfq.solve(W, gram, bits=4, step_dtype=name, **settings)
    assert tensor.step_dtype == step_type(name)
    step = np.asarray(tensor.step)
    store = StepStorage.over(tensor.step, step_type(name), 7, jnp.max)
    np.testing.assert_array_equal(store(tensor.step), step)
    size = 8 * tensor.nbytes - tensor.codes.size * 4
    assert size == step.size * (16 if "16" in name else 8) + (32 if "e4m3" in name else 0)
    free = jpfq.solve(W, gram, bits=4, **settings)[1].relative_error
    assert free < info.relative_error * 1.05
    assert info.relative_error < free * (1.35 if name == "float8_e8m0fnu" else 1.1)


@pytest.mark.parametrize(
    "grid",
    [jpfq.E2M1(), *(pytest.param(grid, marks=pytest.mark.slow) for grid in (jpfq.E4M3(), jpfq.Integer(8)))],
    ids=str,
)
@pytest.mark.parametrize("name", ["float8_e8m0fnu", "float8_e4m3fn"])
def test_the_recommended_recipe_is_better_than_gpfq_alone(name, grid):
    W, gram = problem32(34, n=N, out=OUT)
    base = jpfq.scale.AbsMax(per=GROUPS)
    alone = jpfq.solve(W, gram, grid=grid, plain=True, scale=base, step_dtype=name)[1].relative_error
    scale = jpfq.scale.MinError(base, least=0.4, most=1.6)
    best = jpfq.solve(W, gram, grid=grid, scale=scale, step_dtype=name, shrinkage=None)[1].relative_error
    assert best < alone


def test_a_wide_kernel_of_one_unit_is_solved_whole(monkeypatch):
    """Slices would each take a unit of their own."""
    from jpfq.matrix import slices

    monkeypatch.setattr(slices, "ENTRIES", 64)
    recipe = jpfq.Rule(".*", bits=4, scale=jpfq.scale.AbsMax(), finish=None).recipe()
    assert slices.slice_width((1, 8, 64), recipe) < 64
    recipe = jpfq.Rule(".*", bits=4, scale=jpfq.scale.AbsMax(), finish=None, step_dtype="float8_e4m3fn").recipe()
    assert slices.slice_width((1, 8, 64), recipe) == 64


def test_steps_beyond_a_type_are_counted():
    W, gram = problem32(33, n=N, out=OUT)
    tensor, info = jpfq.solve(W * 1e-8, gram, bits=4, plain=True, step_dtype="float16")
    assert info.saturated_steps == OUT
    params = {"w": W * 1e-8}
    rule = jpfq.Rule(".*", bits=4, plain=True, step_dtype="float16")
    found = jpfq.quantize(lambda params, x: x @ params["w"], [jnp.eye(N)], rule, params=params)
    assert f"w: {OUT} steps were beyond what their type stores" in found.summary()
    assert (np.asarray(tensor.step) == np.float32(2.0**-24)).all()


@pytest.mark.slow
def test_parts_too_far_apart_for_one_unit_keep_float32(tmp_path):
    """A stack of two kernels, one 2^30 times the other: no E4M3 under one power of two holds the steps of both."""
    W, x = problem(35, n=N, out=OUT)[2], jnp.asarray(problem(35, n=N, out=OUT)[0], jnp.float32)
    both = lambda params, x: (x @ params["w"][0], x @ params["w"][1])
    rule = jpfq.Rule(".*", bits=4, plain=True, scale=jpfq.scale.AbsMax(per=GROUPS), step_dtype="float8_e4m3fn")
    for factor, held in ((4.0, True), (2.0**30, False)):
        params = {"w": jnp.asarray(np.stack([W, W * factor]), jnp.float32)}
        found = jpfq.quantize(both, [x], rule, params=params)
        assert (found.tensors["w"].step_dtype is not None) == held
        found.save(tmp_path / str(held))
        again = jpfq.load(tmp_path / str(held))
        np.testing.assert_array_equal(again.tensors["w"].step, found.tensors["w"].step)


def test_a_type_that_no_format_has_is_refused():
    W, gram = problem32(33, n=N, out=OUT)
    with pytest.raises(ValueError, match="step_dtype is one of float32, bfloat16"):
        jpfq.solve(W, gram, bits=4, step_dtype="float64")

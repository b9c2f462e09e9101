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


HALVES = {"uint6_float16": 8, "int8_float16": 16}  # groups to a float16


@pytest.mark.parametrize("name", ["float16", *HALVES])
def test_codes_answer_for_steps_and_offsets_as_stored(x64, name):
    """The published loop over levels step * code - offset; groups are those of the inputs in their own order."""
    X, Xq, W = problem(36, n=64, out=OUT)
    gram = jpfq.Gram.from_data(jnp.asarray(X), jnp.asarray(Xq))
    scale = jpfq.scale.AbsMax(per=jpfq.scale.PerGroup(64 // HALVES.get(name, 8)))
    settings = PLAIN | {"grid": jpfq.Offset(3), "scale": scale, "method": jpfq.GPFQ()}
    tensor, info = jpfq.solve(jnp.asarray(W), gram, **settings, step_dtype=name)
    groups = W.reshape(len(tensor.step), -1, OUT)
    low, high = np.minimum(groups.min(1), 0), np.maximum(groups.max(1), 0)
    step, offset = np.float64(tensor.step), np.float64(tensor.zero)
    assert np.abs(step / ((high - low) / 7) - 1).max() < 0.2
    assert np.abs(offset + low).max() < np.abs(low).max() / 60
    store = StepStorage(step_type(name))
    np.testing.assert_array_equal(store(tensor.step), step)
    spread = lambda x: np.repeat(x, len(groups[0]), 0)[..., None]
    levels = spread(step) * np.arange(8) - spread(offset)
    found = reference.gpfq_state(W, X, Xq, levels)
    assert_codes_equal(tensor.codes, found.index)
    np.testing.assert_array_equal(tensor.dequantize(), found.q)
    assert (
        8 * tensor.nbytes == W.size * 3 + step.size * 2 * {"float16": 16, "uint6_float16": 8, "int8_float16": 9}[name]
    )
    assert info.saturated_steps == 0


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("uint6_float16", jpfq.Offset(4)),
        pytest.param("uint6_float16", jpfq.Integer(4), marks=pytest.mark.slow),
        pytest.param("int8_float16", jpfq.Offset(4), marks=pytest.mark.slow),
        pytest.param("int8_float16", jpfq.Integer(6), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_steps_under_a_float16_stay_storable(name, grid):
    """Through the search, the order of the recursion, and a descent that moves them; a sweep finds the same."""
    W, gram = problem32(37, n=96, out=OUT)
    W, gram = W[:64], jpfq.Gram.from_data(np.random.default_rng(0).standard_normal((200, 64)).astype(np.float32))
    scale = jpfq.scale.MinError(jpfq.scale.AbsMax(per=jpfq.scale.PerGroup(64 // HALVES[name] // 2)))
    settings = {"grid": grid, "scale": scale}
    tensor, info = jpfq.solve(W, gram, step_dtype=name, **settings)
    stored = StepStorage(step_type(name)).levels(tensor.levels.with_steps(tensor.step, tensor.zero))
    np.testing.assert_array_equal(stored.step, tensor.step)
    np.testing.assert_array_equal(stored.zero, tensor.zero)
    half = jpfq.solve(W, gram, step_dtype="float16", **settings)[1].relative_error
    assert info.relative_error < 1.15 * half
    assert (tensor.rounded(tensor.dequantize()).codes == tensor.codes).all()
    again = jpfq.Packed.of(tensor).unpack()
    for field in ("codes", "step", "zero"):
        np.testing.assert_array_equal(getattr(again, field), getattr(tensor, field))
    assert again.step_dtype == tensor.step_dtype == step_type(name)


def test_what_a_float16_over_groups_does_not_go_with_is_refused():
    W, gram = problem32(33, n=N, out=OUT)
    cases = {
        r"step_dtype='uint6_float16' has a float16 over 8 groups.*PerGroup": {"bits": 4, "scale": jpfq.scale.AbsMax()},
        "without refit": {"bits": 4, "scale": jpfq.scale.AbsMax(per=REFIT), "plain": True},
        "uint6_float16 has a float16 for every 64 inputs, which do not divide its 48": {
            "bits": 4,
            "scale": jpfq.scale.AbsMax(per=GROUPS),
        },
    }
    for message, settings in cases.items():
        with pytest.raises(ValueError, match=message):
            jpfq.solve(W, gram, step_dtype="uint6_float16", **settings)
    for name in (None, "float8_e4m3fn"):
        with pytest.raises(
            ValueError, match=r"Offset\(4\) stores an offset beside each step: take step_dtype='float16'"
        ):
            jpfq.solve(W, gram, grid=jpfq.Offset(4), step_dtype=name)
    summed = {"accumulator": jpfq.Accumulator(16), "inputs": jpfq.Asymmetric(8)}
    with pytest.raises(ValueError, match=r"Offset.* gives weights a zero point"):
        jpfq.solve(W, gram, grid=jpfq.Offset(4), step_dtype="float16", **summed)
    pruned = {"rounding": jpfq.rounding.HardThreshold(0.1), "finish": None}
    with pytest.raises(ValueError, match=r"sends weights to 0, which is no level of Offset\(4\)"):
        jpfq.solve(W, gram, grid=jpfq.Offset(4), step_dtype="float16", **pruned)
    with pytest.raises(ValueError, match=r"takes a grid with 0 among its levels; got Offset\(8\)"):
        jpfq.Activations(jpfq.Offset(8))
    with pytest.raises(ValueError, match="'int8_float16' is for the steps of weights"):
        jpfq.Activations(jpfq.Integer(8), per="row", step_dtype="int8_float16")


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

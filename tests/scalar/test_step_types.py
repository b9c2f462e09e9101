"""Stored steps: each type holds what it should, saturates at its ends, and what was stored is found again."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jpfq
from jpfq.scalar import ScaledGrid
from jpfq.scalar.step_types import StepStorage, kernel_bits, step_bits, step_type, unit_of_stored

STEPS = np.float32(np.random.default_rng(0).lognormal(-4, 2, 400))
TYPES = ("bfloat16", "float16", "float8_e8m0fnu", "float8_e4m3fn")
UNDER_HALF = {"uint6_float16": (63, 8), "int8_float16": (127, 16)}  # the largest integer, and the groups to a float16


def storage(name, step):
    return StepStorage.over(jnp.asarray(step), step_type(name), 6, jnp.max)


@pytest.mark.parametrize("name", TYPES)
def test_what_is_stored_is_the_nearest_number_of_the_type(name):
    store = storage(name, STEPS)
    found = np.asarray(store(jnp.asarray(STEPS)))
    units = np.float64(STEPS) / float(store.unit)
    numbers = np.unique(np.arange(2 ** (8 * step_type(name).itemsize), dtype=f"u{step_type(name).itemsize}"))
    with np.errstate(invalid="ignore"):  # of NaN
        numbers = numbers.view(step_type(name)).astype(np.float64)
    numbers = np.sort(numbers[np.isfinite(numbers) & (numbers > 0)])
    above = np.clip(np.searchsorted(numbers, units), 1, len(numbers) - 1)
    low, high = numbers[above - 1], numbers[above]
    middle = low * 4 / 3 if name == "float8_e8m0fnu" else (low + high) / 2
    away = np.abs(units - middle) > 1e-6 * middle  # from a tie
    np.testing.assert_array_equal((found / float(store.unit))[away], np.where(units < middle, low, high)[away])
    np.testing.assert_array_equal(store(jnp.asarray(found)), found)  # what is stored stays


@pytest.mark.parametrize("name", TYPES)
def test_the_ends_saturate_and_are_counted(name):
    info = ml_dtypes.finfo(step_type(name))
    step = np.float32([2e-38, 1e-20, 1.0, 1e20, 3e38])
    store = StepStorage(step_type(name))
    found = np.asarray(store(jnp.asarray(step)))
    least = max(float(info.smallest_subnormal), 2.0**-126)
    assert (found >= np.float32(least)).all()
    assert (found <= np.float32(float(info.max))).all()
    beyond = np.asarray(store.exceeds(jnp.asarray(step)))
    np.testing.assert_array_equal(beyond, (step < least / 2) | (step > np.float64(float(info.max)) * 1.25))
    assert store(jnp.zeros(1))[0] == (2.0**-126 if name == "float8_e8m0fnu" else 0)


def test_the_unit_of_a_kernel_is_the_least_power_of_two_that_fits():
    for largest in (1.0, 0.9, 0.874, 0.876, 447.0, 448.0, 449.0, 3e-5):
        step = np.float32([largest / 3, largest])
        store = storage("float8_e4m3fn", step)
        assert np.log2(float(store.unit)) % 1 == 0
        assert 224 < largest / float(store.unit) <= 448
        assert not store.exceeds(jnp.asarray(step)).any()
        found = np.asarray(store(jnp.asarray(step)))
        assert unit_of_stored(found) in (float(store.unit) / 2, float(store.unit))
        units = found / unit_of_stored(found)
        np.testing.assert_array_equal(units.astype(ml_dtypes.float8_e4m3fn).astype(np.float32), units)
    with pytest.raises(ValueError, match="no numbers of float8_e4m3fn"):
        unit_of_stored(np.float32([1.0, 1 / 3]))


def test_what_a_step_takes():
    names = (None, "float32", *TYPES, *UNDER_HALF)
    bits = {name: (step_bits(step_type(name)), kernel_bits(step_type(name))) for name in names}
    assert bits == {
        None: (32, 0),
        "float32": (32, 0),
        "bfloat16": (16, 0),
        "float16": (16, 0),
        "float8_e8m0fnu": (8, 0),
        "float8_e4m3fn": (8, 32),
        "uint6_float16": (6 + 16 // 8, 0),
        "int8_float16": (8 + 16 // 16, 0),
    }
    assert step_type(step_type("uint6_float16")) == step_type("uint6_float16")
    assert step_type("float32") is None
    assert step_type(jnp.bfloat16) == step_type("bfloat16") == np.dtype(jnp.bfloat16)
    for wrong in ("float64", "int8", 3, "half a byte", jpfq.Integer(4)):
        with pytest.raises(ValueError, match="step_dtype is one of float32, bfloat16, float16"):
            step_type(wrong)


@pytest.mark.parametrize("name", UNDER_HALF)
def test_integers_under_a_float16_are_the_nearest(name):
    """By a plain loop over runs and neurons: the largest is on the top integer, steps above 0 on 1 at least."""
    top, run = UNDER_HALF[name]
    rng = np.random.default_rng(3)
    x = np.float32(rng.lognormal(-4, 2, (4 * run, 5)))
    x[:, 0] *= 1e-6  # whose float16 are among the least
    x[run:, 1] = 0
    levels = ScaledGrid(jnp.asarray(x), jnp.asarray(x), jnp.zeros(()), jnp.ones(()), offset=True)
    store = StepStorage(step_type(name))
    found = store.levels(levels)
    for least, stored in ((1, found.step), (0, found.zero)):
        for first in range(0, len(x), run):
            for o in range(x.shape[1]):
                w = np.float64(x[first : first + run, o])
                half = np.float64(np.float16(max(np.float32(w.max() / top), 2.0**-24))) if w.any() else 0.0
                whole = np.clip(np.rint(w / half), least, top) * (w > 0) if w.any() else np.zeros(run)
                np.testing.assert_array_equal(stored[first : first + run, o], np.float32(half * whole))
                assert half < 1e-4 or whole.max() in (0, top)
    again = store.levels(found)
    np.testing.assert_array_equal(again.step, found.step)
    np.testing.assert_array_equal(again.zero, found.zero)
    beyond = np.asarray(store.exceeds(jnp.asarray(x)))
    assert beyond[:run, 0].any()
    np.testing.assert_array_equal(beyond, np.asarray(found.step) > 2 * x)
    huge = np.asarray(store(jnp.full((run, 1), 1e9)))
    assert (huge == np.float32(65504 * top)).all()


@pytest.mark.parametrize("grid", [jpfq.E2M1(), jpfq.E2M3(), jpfq.E3M2(), jpfq.E4M3(), jpfq.E5M2(), jpfq.Integer(8)])
def test_powers_of_two_are_those_of_the_ocp_formats(grid):
    """2^(floor(log2 radius) - log2 of the power of two at or below the largest level), for any radius."""
    radius = np.random.default_rng(1).lognormal(0, 2, 300)
    reach = grid.alphabet().reach
    step = jnp.asarray(radius / reach, jnp.float32)
    found = StepStorage.over(step, step_type("float8_e8m0fnu"), reach, jnp.max)(step)
    expected = 2.0 ** (np.floor(np.log2(radius)) - np.floor(np.log2(reach)))
    np.testing.assert_array_equal(found, np.float32(expected))

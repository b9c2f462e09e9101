"""Two ranges: their levels by brute force, the parts that they are made of, and the split of least error."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jpfq
from jpfq.scalar.two_ranges import CLIPS, RATIOS

every_grid = st.integers(2, 6).flatmap(
    lambda bits: st.builds(jpfq.TwoRanges, st.just(bits), st.integers(1, 2 ** (bits - 1) - 1), st.sampled_from(RATIOS))
)


@settings(deadline=None, max_examples=60)
@given(every_grid)
def test_levels_are_the_integers_near_zero_and_multiples_beyond(grid):
    levels = set(grid.values)
    fine = {x for x in levels if abs(x) <= grid.fine}
    assert len(levels) == 2**grid.bits
    assert fine == set(range(-grid.fine, grid.fine + 1))
    step = grid.ratio
    beyond = itertools.takewhile(lambda x: x <= -min(levels), itertools.count(step, step))
    assert {-x for x in levels if x < -grid.fine} == {x for x in beyond if x > grid.fine}
    assert {x for x in levels if x > grid.fine} == {-x for x in levels if x < -grid.fine} - {-min(levels)}
    assert grid.alphabet().reach == max(levels)
    assert grid.unit == 1  # so that sums of codes are sums of integers


@settings(deadline=None, max_examples=60)
@given(every_grid)
def test_each_level_is_fine_or_coarse(grid):
    fine, coarse = grid.parts
    np.testing.assert_array_equal(fine + grid.ratio * coarse, grid.values)
    assert not (fine * coarse).any()
    assert abs(fine).max() == grid.fine


def test_one_range_is_one_of_them():
    assert jpfq.TwoRanges(4, fine=7, ratio=8).values == tuple(range(-8, 8))


def brute(x, grid, w):
    """The least weighted square error over the shares of the radius, number by number."""
    levels = np.array(grid.values) / max(grid.values)
    return min(np.sum(w * np.min((x[:, None] - clip * levels) ** 2, axis=1)) for clip in CLIPS)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_fitted_split_has_the_least_error(weighted):
    rng = np.random.default_rng(0)
    x = np.where(rng.random(500) < 0.05, rng.uniform(-1, 1, 500), rng.normal(0, 0.05, 500)).clip(-1, 1)
    w = np.where(abs(x) > 0.3, 30.0, 1.0) if weighted else np.ones(500)
    errors = {(fine, ratio): brute(x, jpfq.TwoRanges(4, fine, ratio), w) for fine in range(1, 8) for ratio in RATIOS}
    found = jpfq.TwoRanges.fit(x, 4, w if weighted else None)
    assert errors[found.fine, found.ratio] <= 1.001 * min(errors.values())  # it looks at a histogram
    assert errors[found.fine, found.ratio] < 0.8 * errors[7, 8]
    if weighted:
        assert found != jpfq.TwoRanges.fit(x, 4)


def test_weights_without_outliers_keep_one_range():
    uniform = np.linspace(-1, 1, 1001)
    assert jpfq.TwoRanges.fit(uniform, 4).values == tuple(range(-8, 8))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_two_kernels_add_up_to_the_bit(dtype):
    rng = np.random.default_rng(3)
    X, W = rng.standard_normal((64, 24)).astype(np.float32), rng.standard_normal((24, 6))
    W = jnp.asarray(W, jnp.float32).at[::7].mul(12).astype(dtype)
    grid = jpfq.TwoRanges(4, fine=4, ratio=8)
    scale = jpfq.scale.AbsMax(per=jpfq.scale.PerGroup(8))
    tensor, _ = jpfq.solve(W, jpfq.Gram.from_data(X), grid=grid, scale=scale, method=jpfq.GPFQ(), plain=True)
    fine, coarse = tensor.split()
    levels = np.array(grid.values)[np.asarray(tensor.codes)]
    np.testing.assert_array_equal(np.int64(fine.codes) + 8 * np.int64(coarse.codes), levels)
    np.testing.assert_array_equal(coarse.step, 8 * tensor.step)
    np.testing.assert_array_equal(fine.dequantize() + coarse.dequantize(), tensor.dequantize())
    assert fine.grid == jpfq.Integer(4)
    assert coarse.grid == jpfq.Integer(3)
    assert (coarse.codes != 0).any()
    assert (fine.codes != 0).any()
    for part in (fine, coarse):
        lo, hi, *_ = part.grid.alphabet()
        assert lo <= part.codes.min()
        assert part.codes.max() <= hi


def test_one_range_is_not_split():
    tensor, _ = jpfq.solve(jnp.ones((4, 2)), jpfq.Gram.from_data(jnp.eye(4)), bits=4, method=jpfq.MSQ(), plain=True)
    with pytest.raises(ValueError, match=r"on jpfq.TwoRanges\(..\) are split into two; this one is on Integer\(4\)"):
        tensor.split()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jpfq.TwoRanges(1, 1, 2), "from 2 to 8 bits; got 1"),
        (lambda: jpfq.TwoRanges(4, 8, 2), "fine is from 1 to 7 at 4 bits; got 8"),
        (lambda: jpfq.TwoRanges(4, True, 2), "fine is from 1 to 7 at 4 bits; got True"),
        (lambda: jpfq.TwoRanges(4, 3, 3), "ratio is one of 2, 4, 8, 16, 32; got 3"),
        (lambda: jpfq.TwoRanges.fit([0.5, 2.0], 4), "takes numbers from -1 to 1"),
        (lambda: jpfq.TwoRanges.fit([0.5, np.nan], 4), "takes numbers from -1 to 1"),
        (lambda: jpfq.TwoRanges.fit([], 4), "takes numbers from -1 to 1"),
        (lambda: jpfq.TwoRanges.fit([0.5, 1.0], 4, [0, 0]), "positive somewhere"),
        (lambda: jpfq.TwoRanges.fit([0.5, 1.0], 9), "from 2 to 8 bits; got 9"),
        (lambda: jax.jit(lambda x: jpfq.TwoRanges(4, x, 2))(1), "vmap cannot sweep over it"),
    ],
)
def test_what_is_no_split_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()

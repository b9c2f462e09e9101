"""Ranges of activations: equal to plain loops over a histogram; histograms add; zero is a level; bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jpfq
from jpfq import ranges
from jpfq.scalar import Codes
from jpfq.scalar.ranges import Histogram

GRIDS = {"asymmetric": jpfq.Asymmetric(4), "integer": jpfq.Integer(4), "narrow": jpfq.Integer(4, narrow=True)}
RANGES = {"max": ranges.Max(), "percentile": ranges.Percentile(0.99), "mse": ranges.MinMSE(), "kl": ranges.KL()}

lay = jax.jit(lambda range_, histogram, grid: range_(histogram, grid))


def histogram(x, weights=None, bins=512):
    x = jnp.asarray(x)
    return Histogram.over(x.min(), x.max(), bins).add(x, weights)


def heavy(seed=0, size=4000, shift=0.0):
    return np.random.default_rng(seed).standard_t(3, size).astype(np.float32) + np.float32(shift)


def rounded(x, step, zero, lo, hi):
    """The nearest levels, by a plain formula."""
    return step * (np.clip(np.floor(x / step + zero + 0.5), lo, hi) - zero)


def by_hand(low, high, grid):
    """Step and zero point of a grid over an interval."""
    lo, hi, zero, reach = grid.alphabet()
    if zero is not None:
        return max(-low, high) / reach, zero
    low, high = min(low, 0), max(high, 0)
    step = (high - low) / (hi - lo)
    return step, np.floor(-low / step + 0.5)


def test_a_histogram_counts_every_number_once_and_adds():
    x, weights = heavy(), np.random.default_rng(1).integers(0, 3, 4000).astype(np.float32)
    whole = histogram(x, weights)
    ends = Histogram.over(jnp.asarray(x).min(), jnp.asarray(x).max(), 512)
    parts = ends.add(x[:1000], weights[:1000]).add(x[1000:], weights[1000:])
    expected, _ = np.histogram(x, 512, (x.min(), x.max()), weights=weights)
    assert whole.counts.sum() == weights.sum()
    assert np.array_equal(whole.counts, parts.counts)
    assert np.abs(np.cumsum(np.asarray(whole.counts)) - np.cumsum(expected)).max() <= 4  # ties at the edges of bins


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("shift", [0.0, 1.5, 40.0])
def test_zero_is_a_level_and_the_step_is_positive(name, grid, shift):
    levels = lay(RANGES[name], histogram(heavy(shift=shift)), grid)
    assert levels.step.shape == levels.zero.shape == ()
    assert levels.step > 0
    assert levels.lo <= levels.zero <= levels.hi
    assert levels.zero == jnp.round(levels.zero)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_max_clips_nothing(grid):
    x = heavy(3, shift=0.7)
    levels = lay(ranges.Max(), histogram(x), grid)
    step, zero = by_hand(x.min(), x.max(), grid)
    assert np.isclose(levels.step, step)
    assert levels.zero == zero
    assert np.abs(levels.decode(levels.encode(x)) - x).max() <= step * (0.5 + 1e-5)


def test_percentile_leaves_the_named_share_outside():
    x = heavy(5, 40_000)
    low, high = np.quantile(x, [0.01, 0.99])
    width = (x.max() - x.min()) / 4096
    levels = lay(ranges.Percentile(0.98), histogram(x, bins=4096), jpfq.Asymmetric(8))
    assert np.isclose(levels.step * 255, high - low, atol=3 * width)
    levels = lay(ranges.Percentile(0.98), histogram(x, bins=4096), jpfq.Integer(8))
    assert np.isclose(levels.step * 127, np.quantile(np.abs(x), 0.98), atol=3 * width)


@settings(deadline=None, derandomize=True, max_examples=15)
@given(st.integers(0, 10**6), st.sampled_from(list(GRIDS)), st.floats(-2, 2))
def test_least_square_error_is_found_as_by_trying_all(seed, name, shift):
    hist, grid, count = histogram(heavy(seed, 500, shift), bins=64), GRIDS[name], 8
    levels = lay(ranges.MinMSE(count), hist, Codes.of(grid))
    x, counts = np.asarray(hist.centres), np.asarray(hist.counts)
    lo, hi, zero, _ = grid.alphabet()
    low, high = (float(v) for v in (hist.low, hist.high))
    low, high = (min(low, 0), max(high, 0)) if zero is None else (-max(abs(low), abs(high)), max(abs(low), abs(high)))
    shares = np.linspace(1, 1 / count, count)
    pairs = [(a, b) for a in shares for b in shares] if zero is None else [(a, a) for a in shares]
    cost = lambda step, zero: np.sum(counts * (x - rounded(x, step, zero, lo, hi)) ** 2)
    best = min(cost(*by_hand(a * low, b * high, grid)) for a, b in pairs)
    assert cost(float(levels.step), float(levels.zero)) <= best * (1 + 1e-4) + 1e-6


def test_clipping_ranges_err_less_than_the_whole_range_on_heavy_tails():
    x = heavy(7, 20_000)
    error = lambda range_: np.mean(
        (x - np.asarray((lambda q: q.decode(q.encode(x)))(lay(range_, histogram(x), jpfq.Asymmetric(4))))) ** 2
    )
    whole = error(ranges.Max())
    assert error(ranges.MinMSE()) < error(ranges.KL()) < whole
    assert error(ranges.MinMSE()) < error(ranges.Percentile(0.99)) < whole


def test_divergence_is_least_at_the_chosen_interval():
    """KL against a plain loop of the published procedure."""
    x = np.abs(heavy(11, 5000))
    hist, grid, count = histogram(x, bins=256), jpfq.Asymmetric(3), 20
    centres, counts = np.asarray(hist.centres, float), np.asarray(hist.counts, float).copy()
    counts[np.abs(centres) <= (x.max() - x.min()) / 256 / 2] = 0

    def divergence(share):
        step, zero = by_hand(0.0, float(hist.high) * share, grid)
        inside = centres / step <= 7.5
        last = np.flatnonzero(inside)[-1]
        clipped = np.where(inside, counts, 0)
        clipped[last] += counts[~inside].sum()
        codes = np.clip(np.floor(centres / step + zero + 0.5), 0, 7)
        rounded = np.zeros_like(counts)
        for code in np.unique(codes):
            mine = (codes == code) & inside & (counts > 0)
            rounded[mine] = counts[mine].sum() / max(mine.sum(), 1)
        p, q = clipped / clipped.sum(), rounded / rounded.sum()
        live = p > 0
        return np.sum(p[live] * np.log(p[live] / np.maximum(q[live], 1e-9)))

    levels = lay(ranges.KL(count), hist, grid)
    found = float(levels.step) * 7 / float(hist.high)
    least = min(divergence(share) for share in np.linspace(1, 1 / count, count))
    assert divergence(found) <= least * (1 + 1e-3)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("name", RANGES)
def test_inputs_that_are_all_zero_stay_so(name, grid):
    levels = lay(RANGES[name], histogram(np.zeros(10, np.float32)), grid)
    assert levels.decode(levels.encode(jnp.zeros(()))) == 0


@pytest.mark.parametrize(
    "make", [lambda: ranges.Percentile(1.2), lambda: ranges.Percentile(0.2), lambda: ranges.Percentile("a")]
)
def test_a_percentile_is_a_share(make):
    with pytest.raises(ValueError, match=r"Percentile takes a share p in \(0.5, 1\]"):
        make()


@pytest.mark.parametrize("kind", [ranges.MinMSE, ranges.KL])
def test_a_search_needs_two_candidates(kind):
    with pytest.raises(ValueError, match=f"{kind.__name__} takes two candidates or more; got 1"):
        kind(1)

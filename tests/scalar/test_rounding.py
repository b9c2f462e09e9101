"""Roundings: each solves its problem, the random ones on average; `error` bounds what they round away."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jpfq
from jpfq.matrix import System
from jpfq.scalar import RoundingContext, ScaledGrid
from jpfq.scalar.rounding import prune
from tests.helpers import assert_close, assert_codes_equal, recursed
from tests.reference import gpfq as reference
from tests.reference import spfq

DRAWS = 20_000
THRESHOLDS = {"soft": jpfq.rounding.SoftThreshold, "hard": jpfq.rounding.HardThreshold}


def levels_of(step=1.0, zero=0.0, lo=-3.0, hi=3.0):
    return ScaledGrid(*(jnp.float32(x) for x in (step, zero, lo, hi)))


@jax.jit
def visit(rounding, levels, a, key=None):
    return rounding((), a, RoundingContext(levels, key, ()))


@jax.jit
def drawn(rounding, levels, a):
    """The values of many draws for one argument, and the bound on |a - q|."""
    keys = jax.random.split(jax.random.key(0), DRAWS)
    codes = jax.vmap(lambda key: rounding((), a, RoundingContext(levels, key, ()))[1])(keys)
    return levels.decode(codes), rounding.error(levels)


def assert_mean(x, mean, variance):
    """The sample has this mean and variance, as far as its size can tell (six deviations)."""
    x = np.asarray(x, np.float64)
    assert abs(x.mean() - mean) <= 6 * np.sqrt(variance / DRAWS) + 1e-6
    fourth = ((x - mean) ** 4).mean()
    assert abs(((x - mean) ** 2).mean() - variance) <= 6 * np.sqrt(max(fourth - variance**2, 0) / DRAWS) + 1e-6


# Nearest


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(-6, 6), st.integers(-64, 64))
def test_nearest_minimises_the_square_distance(exponent, sixteenths):
    step, a = 2.0**exponent, 2.0**exponent * sixteenths / 16
    levels = [step * k for k in range(-3, 4)]
    carry, code = visit(jpfq.rounding.Nearest(), levels_of(step), jnp.float32(a))
    assert carry == ()
    assert code == reference.nearest(a, levels) - 3
    assert (a - step * float(code)) ** 2 == min((a - p) ** 2 for p in levels)


def test_nearest_is_a_stateless_setting_without_numbers():
    assert jpfq.rounding.Nearest().init() == ()
    assert not jpfq.rounding.Nearest.random
    assert jax.tree.leaves(jpfq.rounding.Nearest()) == []
    assert jpfq.rounding.Nearest() == jpfq.rounding.Nearest()


def test_mapped_over_neurons_it_is_encode():
    levels = levels_of(0.3, 0, -8, 7)
    a = jnp.asarray(np.random.default_rng(0).standard_normal(50) * 3, jnp.float32)
    _, codes = jax.vmap(lambda x: jpfq.rounding.Nearest()((), x, RoundingContext(levels, None, ())))(a)
    np.testing.assert_array_equal(codes, levels.encode(a))
    assert len(set(codes.tolist())) > 10


# Random roundings


@pytest.mark.parametrize("a", [0.5, -0.37, 0.09, 0.6])
def test_stochastic_is_unbiased(a):
    step, below = 0.2, np.floor(np.float32(a) / np.float32(0.2))
    part = a / step - below
    q, error = drawn(jpfq.rounding.Stochastic(), levels_of(step), jnp.float32(a))
    assert_mean(q, a, step**2 * part * (1 - part))
    assert set(np.round(np.asarray(q) / step)) <= {below, below + 1}
    assert np.abs(q - a).max() <= error


def test_stochastic_saturates_and_keeps_levels():
    for a, expected in ((5.0, 3), (-7.5, -3), (2.0, 2), (-3.0, -3)):
        q, _ = drawn(jpfq.rounding.Stochastic(), levels_of(), jnp.float32(a))
        assert (q == expected).all()


@pytest.mark.parametrize("a", [0.0, 0.7, -1.2])
def test_one_bit_is_unbiased(a):
    """+K with probability (1 + a / K) / 2, -K otherwise, hence of variance K^2 - a^2."""
    K = 1.5
    q, error = drawn(jpfq.rounding.Stochastic(), levels_of(2 * K, 0.5, 0, 1), jnp.float32(a))
    assert_mean(q, a, K**2 - a**2)
    assert set(np.asarray(q).tolist()) == {-K, K}
    assert np.abs(q - a).max() <= error == 2 * K
    assert spfq.one_bit(a, (1 + a / K) / 2 - 1e-6, K) == K


@pytest.mark.parametrize("a", [0.35, -0.1, 0.0])
def test_pruning_is_unbiased(a):
    c = 0.4
    keys = jax.random.split(jax.random.key(1), DRAWS)
    found = jax.vmap(lambda key: prune(jnp.float32(a), jnp.float32(c), key))(keys)
    assert_mean(found, a, c * abs(a) - a**2)
    values = set(np.asarray(found).tolist())
    assert values == ({0.0, float(np.float32(c * np.sign(a)))} if a else {0.0})
    assert prune(jnp.float32(0.41), jnp.float32(c), keys[0]) == jnp.float32(0.41)
    assert prune(jnp.float32(0.3), jnp.float32(0), keys[0]) == jnp.float32(0.3)


@pytest.mark.parametrize("c", [0.4, 0.5])
@pytest.mark.parametrize("a", [0.3, -0.13, 0.55])
def test_pruning_then_quantizing_is_unbiased(a, c):
    step = 0.2
    q, error = drawn(jpfq.rounding.Prune(c), levels_of(step), jnp.float32(a))
    outcomes = [(c * np.sign(a), abs(a) / c), (0.0, 1 - abs(a) / c)] if abs(a) < c else [(a, 1.0)]
    second = lambda z: z**2 + step**2 * (z / step % 1) * (1 - z / step % 1)
    assert_mean(q, a, sum(share * second(z) for z, share in outcomes) - a**2)
    assert np.abs(q - a).max() <= error
    if c == 0.4 and abs(a) < c:  # a multiple of the step: what was raised stays
        assert set(np.round(np.asarray(q) / step)) == {0, 2 * np.sign(a)}


def test_pruning_before_another_rounding():
    q, error = drawn(jpfq.rounding.Prune(0.5, then=jpfq.rounding.Nearest()), levels_of(0.2), jnp.float32(0.3))
    assert set(np.round(np.asarray(q) / 0.2)) == {0, 3}  # .5 is a tie of .4 and .6
    assert_close(error, 0.6)


@functools.cache
def system():
    rng = np.random.default_rng(4)
    A, L = rng.standard_normal((40, 6)), 0.2 * np.tril(rng.standard_normal((40, 40)), -1)
    levels = ScaledGrid(*(jnp.asarray(x, jnp.float32) for x in (np.full((1, 6), 0.3), np.zeros((1, 6)), -8, 7)))
    return np.float32(A), np.float32(L), levels


@pytest.mark.parametrize("rounding", [jpfq.rounding.Stochastic(), jpfq.rounding.Prune(0.5)], ids=str)
def test_draws_depend_on_coordinate_and_neuron_alone(rounding):
    """One key, one set of codes: in blocks, and whatever the order of the visit."""
    A, L, levels = system()
    order, key = np.arange(40), jax.random.key(2)
    plain = np.asarray(recursed(System(A, L, None, None), levels, order, rounding, key).codes)
    assert_codes_equal(recursed(System(A, L, None, None), levels, order, rounding, key, block=16).codes, plain)
    p = np.random.default_rng(0).permutation(40)
    alone = np.asarray(recursed(System(A, 0 * L, None, None), levels, order, rounding, key).codes)
    assert_codes_equal(recursed(System(A[p], 0 * L, None, None), levels, p, rounding, key).codes, alone[p])
    other = np.asarray(recursed(System(A, L, None, None), levels, order, rounding, jax.random.key(3)).codes)
    assert (other != plain).mean() > 0.2


# Thresholds


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(-80, 80), st.integers(0, 24), st.sampled_from([0.25, 1.0, 2.0]))
def test_soft_threshold_is_a_proximal_map(sixteenths, lam, step):
    """argmin_p (a - p)^2 / 2 + lam |p| over the levels; numbers are such that ties are exact."""
    a, lam = step * sixteenths / 16, step * lam / 16
    levels = [step * k for k in range(-3, 4)]
    _, code = visit(jpfq.rounding.SoftThreshold(jnp.float32(lam)), levels_of(step), jnp.float32(a))
    q, cost = step * float(code), lambda p: (a - p) ** 2 / 2 + lam * abs(p)
    assert cost(q) == min(cost(p) for p in levels)
    assert q == spfq.soft_threshold(a, lam, levels)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(-80, 80), st.integers(0, 24))
def test_hard_threshold(sixteenths, lam):
    a, lam = sixteenths / 16, lam / 16
    _, code = visit(jpfq.rounding.HardThreshold(jnp.float32(lam)), levels_of(), jnp.float32(a))
    assert code == spfq.hard_threshold_grid(a, lam, [float(k) for k in range(-3, 4)])


@pytest.mark.parametrize("make", [*THRESHOLDS.values(), jpfq.rounding.Prune])
def test_units_of_a_threshold(make):
    """The same threshold of .9 in weights, in steps of .3, and in radii: the top level is six steps above zero."""
    levels = levels_of(0.3, 1.0, -4, 7)
    a = jnp.linspace(-1.5, 1.8, 50, dtype=jnp.float32)
    key = jax.random.key(0)
    codes = [
        jax.vmap(lambda x: visit(make(jnp.float32(c), unit), levels, x, key)[1])(a)
        for c, unit in ((0.9, "weight"), (3.0, "step"), (0.5, "radius"))
    ]
    assert_codes_equal(codes[1], codes[0])
    assert_codes_equal(codes[2], codes[0])
    assert (codes[0] == 1).sum() > 5  # the code of zero
    assert len(set(np.asarray(codes[0]).tolist())) > 3


ROUNDINGS = {
    "nearest": jpfq.rounding.Nearest(),
    "stochastic": jpfq.rounding.Stochastic(),
    "soft": jpfq.rounding.SoftThreshold(0.7),
    "hard": jpfq.rounding.HardThreshold(0.7),
    "hard, small": jpfq.rounding.HardThreshold(0.1),
    "prune": jpfq.rounding.Prune(0.7),
    "prune, nearest": jpfq.rounding.Prune(1.3, then=jpfq.rounding.Nearest()),
}


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    st.floats(0, 1, width=32),
    st.integers(0, 1000),
    st.sampled_from([(0.3, 0.0, -4.0, 3.0), (0.9, 2.0, 0.0, 7.0), (2.0, 0.0, -1.0, 1.0)]),
)
def test_error_bounds_what_is_rounded_away(place, seed, grid):
    """For every argument between the ends of the grid."""
    levels = levels_of(*grid)
    low, high = levels.decode(levels.lo), levels.decode(levels.hi)
    a = low + jnp.float32(place) * (high - low)
    for rounding in ROUNDINGS.values():
        _, code = visit(rounding, levels, a, jax.random.key(seed))
        assert levels.lo <= code <= levels.hi
        assert abs(a - levels.decode(code)) <= rounding.error(levels) * (1 + 1e-5) + 1e-6


def test_error_has_the_shape_of_the_steps():
    levels = ScaledGrid(jnp.full((3, 4), 0.5), jnp.zeros((3, 4)), jnp.float32(-4), jnp.float32(3))
    for rounding in ROUNDINGS.values():
        assert rounding.error(levels).shape == (3, 4)


def test_what_a_descent_rounds_by_afterwards():
    assert jpfq.rounding.Stochastic().for_finish == jpfq.rounding.Nearest() == jpfq.rounding.Nearest().for_finish
    assert jpfq.rounding.SoftThreshold(0.1).for_finish == jpfq.rounding.SoftThreshold(0.1)
    assert jpfq.rounding.Prune(0.1).for_finish is None
    for rounding in ROUNDINGS.values():
        assert rounding.random == (type(rounding) in (jpfq.rounding.Stochastic, jpfq.rounding.Prune))
        assert rounding.sparse == (
            type(rounding) in (jpfq.rounding.SoftThreshold, jpfq.rounding.HardThreshold, jpfq.rounding.Prune)
        )

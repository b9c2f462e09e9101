"""Noise shaping: the codes of the papers' loops, states within their bound, and one recursion in two forms."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jpfq
from jpfq.embed import Beta, Memoryless, SigmaDelta, feedback
from jpfq.matrix import Recursion, substitute
from tests.helpers import assert_codes_equal
from tests.reference import noise_shaping as reference

ROWS, M = 6, 60

# Each quantizer of this size, and the papers' loop for it: y -> (q, states).
LOOPS = {
    "order 1, one bit": (SigmaDelta(1, 12), lambda y: reference.sigma_delta_1(y, 1, 2.0)),
    "order 1": (SigmaDelta(1, 12, K=3), lambda y: reference.sigma_delta_1(y, 3, 2 / 5)),
    "order 2": (SigmaDelta(2, 15, K=2), lambda y: reference.sigma_delta_2(y, 2, 2.0)),
    "order 2, published": (SigmaDelta.published(2, 15, K=2), lambda y: reference.sigma_delta_2(y, 2, 2 / 3)),
    "order 2, one bit": (SigmaDelta(2, 15), lambda y: reference.one_bit(y, reference.H2, 3.0)),
    "order 2, one bit, published": (SigmaDelta.published(2, 15), lambda y: reference.one_bit(y, reference.H2, 2.0)),
    "order 3, one bit": (
        SigmaDelta(3, 10),
        lambda y: reference.one_bit(y, reference.H3, 1 / (1 - 1.462962962962963 / 2)),
    ),
    "plain": (Memoryless(2), lambda y: (reference.midrise(y, 2, 2 / 3), y - reference.midrise(y, 2, 2 / 3))),
}
BETAS = [(1.9, 12, 1), (1.1, 2, 2), (4.5, 12, 3)]
ALL = [quantizer for quantizer, _ in LOOPS.values()] + [Beta(beta, width, K) for beta, width, K in BETAS]


def vectors(seed=0, rows=ROWS):
    """Random vectors within +-1 that lean to the edges, where states are largest."""
    return np.sin(4 * np.random.default_rng(seed).standard_normal((rows, M)))


def codes_of(q, K, step):
    return np.round(q / step + K - 0.5).astype(int)


@pytest.mark.parametrize("name", LOOPS)
def test_codes_and_states_are_those_of_the_loop(x64, name):
    quantizer, loop = LOOPS[name]
    Y = vectors()
    codes, stability = quantizer(jnp.asarray(Y))
    q, states = map(np.stack, zip(*map(loop, Y)))
    assert_codes_equal(codes, codes_of(q, quantizer.K, quantizer.spacing))
    np.testing.assert_allclose(stability.peak, np.abs(states).max(1), rtol=1e-12)
    assert codes.dtype == np.int8


@pytest.mark.parametrize(("beta", "width", "K"), BETAS)
def test_a_wider_step_is_the_same_as_scaled_data(x64, beta, width, K):
    """The paper scales the data of the beta scheme; here the step is stable for the data as they are."""
    Y = vectors(1)
    codes, stability = Beta(beta, width, K)(jnp.asarray(Y))
    q, states = map(np.stack, zip(*(reference.beta_scheme(y, K, beta, width) for y in Y)))
    assert_codes_equal(codes, codes_of(q, K, 2 / (2 * K - 1)))
    shrunk = (2 * K - beta) / (2 * K - 1)
    rounding = 1e-15 * beta**width  # an error in u grows by beta with every entry of a block
    np.testing.assert_allclose(stability.peak * shrunk, np.abs(states).max(1), rtol=1e-12 + rounding)


@functools.partial(jax.jit, static_argnames="block")
def dense(system, levels, block):
    recursion = Recursion(levels, jnp.arange(M), ROWS, jpfq.rounding.Nearest())
    return substitute(system.base, system.L, recursion, block=block, about=system.about).codes


@pytest.mark.parametrize("block", [None, 16])
def test_the_states_are_the_feedback_of_the_recursion(x64, block):
    """q = Q(A + L (about - q)) with the matrix of h / (1 - h): the same codes as with the last states carried."""
    Y = jnp.asarray(vectors(2))
    for quantizer in ALL:
        codes = dense(quantizer.system(Y), quantizer.levels(), block)
        assert_codes_equal(codes.T, quantizer(Y)[0])


def test_feedback_in_closed_form(x64):
    """Order 1: all ones; order 2: t - j + 1; beta: its powers within blocks."""
    t, j = np.indices((12, 12))
    for taps, lags, run, expected in [
        ([1.0], (1,), 12, np.ones((12, 12))),
        ([2.0, -1.0], (1, 2), 12, t - j + 1.0),
        ([1.5], (1,), 4, np.where(t // 4 == j // 4, 1.5 ** np.maximum(t - j, 0.0), 0)),
        ([], (), 1, np.zeros((12, 12))),
    ]:
        found = feedback(jnp.asarray(taps, float), lags, 12, run)
        np.testing.assert_allclose(found, np.tril(expected, -1), rtol=1e-14)


@pytest.mark.parametrize("quantizer", [q for q in ALL if isinstance(q, SigmaDelta)], ids=repr)
def test_filters_have_vanishing_moments(quantizer):
    """delta_0 - h annihilates polynomials of a degree less than the order."""
    for degree in range(quantizer.order):
        moment = sum(h * lag**degree for lag, h in quantizer.filter().items())
        assert moment == pytest.approx(1.0 if degree == 0 else 0.0, abs=1e-12)


def test_norms_of_the_one_bit_filters():
    thresholds = [2 - sum(map(abs, SigmaDelta(r, 1).filter().values())) for r in (1, 2, 3)]
    np.testing.assert_allclose(thresholds, [1, 0.667, 0.537], atol=5e-4)
    for r, threshold in zip((1, 2, 3), thresholds):
        assert SigmaDelta.published(r, 1).reach == pytest.approx(threshold)
        assert SigmaDelta(r, 1).reach == pytest.approx(1)


# Stability


def quantizers():
    """Every filter, with all K and beta that it takes."""
    K = st.integers(1, 20)
    beta = lambda K: st.floats(1.001, 2 * K - 0.01).map(lambda beta: Beta(beta, 12, K))
    return st.one_of(
        st.builds(SigmaDelta, st.just(1), st.just(12), K),
        st.builds(SigmaDelta, st.just(2), st.just(15), K),
        st.builds(SigmaDelta, st.just(3), st.just(10)),
        st.builds(Memoryless, K),
        K.flatmap(beta),
    )


@settings(deadline=None, derandomize=True, max_examples=150)
@given(quantizers(), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.3, 1.0, 3.0, 1e6]), st.floats(0.05, 4))
@example(SigmaDelta(2, 15, K=2), 0, 1e6, 1.0)
@example(Beta(39.99, 12, 20), 0, 1e6, 1.0)
def test_states_stay_within_half_a_step(quantizer, seed, spread, scale):
    """Whatever the vectors, if only |y| <= reach: random, constant (spread 0), or all at the edges (spread 1e6)."""
    quantizer = type(quantizer)(**{**vars(quantizer), "step": float(quantizer.stable_step) * scale})
    rng = np.random.default_rng(seed)
    Y = np.clip(spread * rng.standard_normal((ROWS, M)) + rng.uniform(-1, 1, (ROWS, 1)), -1, 1) * float(quantizer.reach)
    with jax.enable_x64(True):
        codes, stability = quantizer(jnp.asarray(Y))
        assert stability.bound == pytest.approx(float(quantizer.spacing) / 2)
        assert np.asarray(stability.stable).all(), f"{np.asarray(stability.peak).max() / stability.bound} of the bound"
    assert np.asarray(codes).min() >= 0
    assert np.asarray(codes).max() <= 2 * quantizer.K - 1


@pytest.mark.parametrize("quantizer", [SigmaDelta(2, 15, K=2), SigmaDelta(2, 15), SigmaDelta(3, 10)], ids=repr)
def test_running_out_of_the_alphabet_is_seen(x64, quantizer):
    """With the published step order 2 and 3 saturate on vectors within +-1; the vectors that do are named."""
    Y = np.where(np.arange(ROWS)[:, None] < 3, 0.1, 1.0) * vectors(2)
    published = SigmaDelta.published(quantizer.order, quantizer.width, quantizer.K)
    stability = published(jnp.asarray(Y))[1]
    assert stability.stable[:3].all()
    assert not stability.stable[3:].any()
    assert quantizer(jnp.asarray(Y))[1].stable.all()


def test_nan_is_not_stable():
    stability = SigmaDelta(1, 12)(jnp.asarray(vectors()).at[2, 5].set(jnp.nan))[1]
    np.testing.assert_array_equal(stability.stable, np.arange(ROWS) != 2)


# One program, whatever is around it


@pytest.mark.slow
@pytest.mark.parametrize("quantizer", [SigmaDelta(2, 15, K=2), Memoryless.stochastic(2)], ids=repr)
def test_rows_are_independent_and_may_be_sharded(quantizer):
    """Under vmap, in chunks, with more axes, and with rows on two devices: the same codes."""
    Y, key = jnp.asarray(vectors(4), jnp.float32), jax.random.key(0)
    codes, stability = quantizer(Y, key)
    alone = jax.vmap(lambda y, i: quantizer(y, key, i))(Y, jnp.arange(ROWS))
    assert_codes_equal(alone[0], codes)
    np.testing.assert_array_equal(alone[1].peak, stability.peak)
    assert_codes_equal(jnp.concatenate([quantizer(Y[:4], key)[0], quantizer(Y[4:], key, 4)[0]]), codes)
    assert_codes_equal(quantizer(Y.reshape(2, 3, M), key)[0].reshape(ROWS, M), codes)
    mesh = Mesh(jax.devices()[:2], ("rows",))
    placed = jax.device_put(Y, NamedSharding(mesh, P("rows")))
    sharded, _ = quantizer(placed, key)
    assert_codes_equal(sharded, codes)
    assert len(sharded.sharding.device_set) == 2
    assert sharded.sharding.is_equivalent_to(NamedSharding(mesh, P("rows")), 2)


def test_vectors_draw_for_themselves():
    Y, key = jnp.full((2, M), 0.2), jax.random.key(1)
    codes, _ = Memoryless.stochastic()(Y, key)
    assert (codes[0] != codes[1]).any()
    assert (codes[0, : M // 2] != codes[0, M // 2 :]).any()


def test_numbers_do_not_recompile(compilations):
    """One program for each shape and filter: K, beta and the step are numbers in it."""
    Y = jnp.asarray(vectors(5), jnp.float32)
    run = lambda: [q(Y)[0] for q in (Beta(1.5, 12), Beta(3.0, 12, 3), Beta(1.2, 12, 2, step=0.9))]
    Beta(1.5, 12)(Y)
    compilations.clear()
    run()
    assert compilations == []


def test_memory_is_linear_in_the_measurements():
    """No matrix of m x m: twice the measurements take twice the bytes."""
    quantizer = SigmaDelta(2, 15, K=2)
    some = lambda m: jax.jit(quantizer).lower(jax.ShapeDtypeStruct((2, m), jnp.float32)).compile().memory_analysis()
    small, large = (some(m).temp_size_in_bytes for m in (1500, 3000))
    assert small < 10 * 4 * 2 * 1500
    assert large < 2.1 * small


def test_a_sweep_is_one_vmap(x64):
    Y = jnp.asarray(vectors(6))
    betas = jnp.array([1.2, 1.5, 1.9])
    codes = jax.vmap(lambda beta: Beta(beta, 12)(Y)[0])(betas)
    for k, beta in enumerate(betas):
        assert_codes_equal(codes[k], Beta(float(beta), 12)(Y)[0])

"""Random Fourier features: the kernel they estimate, without bias where that is claimed, and under jit and on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jpfq
from jpfq.embed import Beta, Memoryless, SigmaDelta
from tests.helpers import assert_close, assert_codes_equal

N, GAMMA = 4, 0.3


def data(seed=0, rows=6):
    return np.random.default_rng(seed).standard_normal((rows, N))


def exact(X, Y):
    return np.exp(-GAMMA * ((X[:, None] - Y[None]) ** 2).sum(-1))


def sample(quantizer, m, seed=0):
    return jpfq.RandomFourierFeatures.sample(jax.random.key(seed), N, m, GAMMA, quantizer)


def test_features_are_cosines_of_random_angles(x64):
    some, X = sample(SigmaDelta(1, 4), 40_000), data()
    Z = np.cos(X @ np.asarray(some.frequencies) + np.asarray(some.phases))
    assert_close(some.measure(jnp.asarray(X)), Z)
    assert_close(some.features(jnp.asarray(X)), Z.reshape(len(X), -1, 4).sum(-1) * np.sqrt(2 / 10_000) / 2)
    # Frequencies have mean 0 and variance 2 gamma, phases lie evenly on the circle: to four deviations.
    draws = some.frequencies.size
    assert abs(float(some.frequencies.mean())) < 4 * np.sqrt(2 * GAMMA / draws)
    assert abs(float(some.frequencies.var()) / (2 * GAMMA) - 1) < 4 * np.sqrt(2 / draws)
    assert abs(np.exp(1j * np.asarray(some.phases)).mean()) < 4 / np.sqrt(40_000)


@pytest.mark.parametrize("quantizer", [SigmaDelta(1, 15, K=2), SigmaDelta(2, 15, K=2), Beta(1.9, 12)], ids=repr)
def test_the_kernel_is_estimated(quantizer):
    """To five deviations of an average of p products (each of variance at most 1 + k^2)."""
    some = sample(quantizer, 600 * quantizer.width)
    X = data()
    a = some.condense(some.transform(jnp.asarray(X, jnp.float32))[0])
    found = np.asarray(some.kernel(a, a[:3]))
    assert found.shape == (6, 3)
    off = ~np.eye(6, 3, dtype=bool)
    assert np.abs(found - exact(X, X[:3]))[off].max() < 5 * np.sqrt(2 / 600) + 0.02


def test_noise_shaping_takes_less_from_the_kernel_than_rounding_does():
    """Of the kernel that the same condensed features have unquantized: order 2 errs least, plain rounding most."""
    X = jnp.asarray(data(1, rows=12), jnp.float32)
    off = ~np.eye(12, dtype=bool)
    errors = []
    for quantizer in (Memoryless(4), SigmaDelta(1, 29, K=4), SigmaDelta(2, 29, K=4)):
        some = sample(quantizer, 60 * quantizer.width)
        a, f = some.condense(some.transform(X)[0]), some.features(X)
        errors.append(np.sqrt(np.mean(np.asarray(some.kernel(a, a) - some.kernel(f, f))[off] ** 2)))
    assert errors[2] < 0.5 * errors[1] < 0.25 * errors[0], errors


def test_stochastic_rounding_is_unbiased(x64):
    """The mean product over many draws is that of the features themselves: to six deviations."""
    some = sample(Memoryless.stochastic(), 24)
    x, y = jnp.asarray(data(2, rows=2))
    keys = jax.random.split(jax.random.key(1), (4000, 2))
    draw = lambda pair: jnp.vdot(
        some.condense(some.transform(x, pair[0])[0]), some.condense(some.transform(y, pair[1])[0])
    )
    products = np.asarray(jax.jit(jax.vmap(draw))(keys))
    expected = float(jnp.vdot(some.features(x), some.features(y)))
    assert abs(products.mean() - expected) < 6 * products.std() / np.sqrt(4000)
    assert products.std() > 0.1


def test_signs_against_cosines_are_unbiased(x64):
    """Averaged over all phases, the semi-quantized product is the cosine of the angle between, also near 0 and pi."""
    m = 4096
    phases = 2 * np.pi * (np.arange(m) + 0.5) / m
    some = jpfq.RandomFourierFeatures(jnp.ones((1, m)), jnp.asarray(phases), Memoryless.semi_quantized())
    x, y = np.linspace(-3, 3, 7)[:, None], np.array([[0.4]])
    codes, _ = some.transform(jnp.asarray(x))
    found = some.kernel(some.condense(codes), some.features(jnp.asarray(y)))
    np.testing.assert_allclose(found[:, 0], np.cos(x - y)[:, 0], atol=2e-3)


def test_everything_runs_in_one_program_and_on_a_mesh(compilations):
    """Codes, condensing, storing and the kernel inside one jit, rows on two devices; a second call compiles nothing."""
    some = sample(SigmaDelta(2, 9, K=2), 72)
    X = jnp.asarray(data(3), jnp.float32)

    @jax.jit
    def whole(some, X):
        codes, stability = some.transform(X)
        stored = some.store(codes)
        return codes, stored, stability.stable, some.kernel(some.load(stored), some.features(X))

    codes, stored, stable, kernel = whole(some, X)
    assert stable.all()
    assert_codes_equal(codes, some.transform(X)[0])
    compilations.clear()
    whole(some, X + 1)
    some.transform(X + 1)
    assert len(compilations) <= 1  # of X + 1
    mesh = Mesh(jax.devices()[:2], ("rows",))
    placed = jax.device_put(X, NamedSharding(mesh, P("rows")))
    sharded = whole(some, placed)
    assert_codes_equal(sharded[0], codes)
    assert_codes_equal(sharded[1], stored)
    assert len(sharded[0].sharding.device_set) == 2
    assert_close(sharded[3], kernel)


def test_one_compilation_for_each_shape(compilations):
    """None for another draw of the features or another kernel, one for another number of rows."""
    X, more = (jnp.asarray(data(4, rows), jnp.float32) for rows in (6, 10))
    some, other = (sample(SigmaDelta(2, 9, K=2), 72, seed) for seed in (0, 1))
    run = jax.jit(lambda some, X: some.transform(X)[0])
    counts = []
    for features, rows in ((some, X), (other, X), (some, more), (other, more)):
        compilations.clear()
        run(features, rows)
        counts.append(len(compilations))
    assert counts == [1, 0, 1, 0]

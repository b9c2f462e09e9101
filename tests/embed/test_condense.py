"""Condensation: what the sums of codes are, how much of the rounding they lose, and how many bits they take."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from jpfq.embed import Beta, Memoryless, SigmaDelta, pack, unpack
from tests.reference import noise_shaping as reference

N, M = 5, 60
QUANTIZERS = [
    SigmaDelta(1, 12),
    SigmaDelta(1, 4, K=3),
    SigmaDelta(2, 15, K=2),
    SigmaDelta(3, 10),
    Beta(1.5, 12, 2),
    Memoryless(2),
    Memoryless(3),
]


def features(quantizer, seed=0):
    return jpfq.RandomFourierFeatures.sample(jax.random.key(seed), N, M, 0.3, quantizer)


def data(seed=0, rows=4):
    return np.random.default_rng(seed).standard_normal((rows, N))


def v_of(quantizer):
    if isinstance(quantizer, Beta):
        return float(quantizer.beta) ** -np.arange(1.0, quantizer.width + 1)
    return reference.vector(getattr(quantizer, "order", 1), quantizer.width)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)
def test_condensed_vectors(x64, quantizer):
    """sqrt(2 / p) (I kron v^T) q / |v|, also from what is stored, in as many bits as are reported."""
    some = features(quantizer)
    codes, _ = some.transform(jnp.asarray(data()))
    q = float(quantizer.spacing) * (np.asarray(codes) - quantizer.K + 0.5)
    expected = np.sqrt(2 / some.p) * np.stack([reference.condense(row, v_of(quantizer)) for row in q])
    found = some.condense(codes)
    np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-12)
    stored = some.store(codes)
    assert stored.dtype == jnp.uint8
    assert stored.shape == (4, some.bytes_per_vector)
    np.testing.assert_array_equal(some.load(stored), found)


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)
def test_bits_are_counted_on_all_values_that_may_occur(quantizer):
    """All codes at the lowest and at the highest level are the ends of what is stored; every value between takes part."""
    some = features(quantizer)
    ends = quantizer.to_store(jnp.array([[0], [2 * quantizer.K - 1]]) * jnp.ones((1, M), int))
    assert ends.min() == 0
    assert ends.max() == quantizer.stored_levels - 1
    numbers = ends.shape[-1]
    assert numbers == (M if isinstance(quantizer, Beta) else M // quantizer.width)
    assert some.bits_per_vector == pytest.approx(numbers * math.log2(quantizer.stored_levels))
    assert some.bytes_per_vector == math.ceil(numbers * math.ceil(math.log2(quantizer.stored_levels)) / 8)


@pytest.mark.parametrize(("order", "width", "K"), [(1, 12, 1), (1, 15, 4), (2, 15, 2), (2, 29, 3)])
def test_bits_are_those_of_the_papers_but_for_one_level(order, width, K):
    """p log2(width (2K - 1)) and p (2 log2(width + 1) + log2(2K - 1) - 2): they count one level less."""
    quantizer = SigmaDelta(order, width, K)
    published = {
        1: math.log2(width * (2 * K - 1)),
        2: 2 * math.log2(width + 1) + math.log2(2 * K - 1) - 2,
    }
    assert math.log2(quantizer.stored_levels - 1) == pytest.approx(published[order])


@pytest.mark.parametrize("quantizer", [SigmaDelta(1, 12), SigmaDelta(2, 15, K=2), Beta(1.5, 12, 2)], ids=repr)
def test_condensing_cancels_the_rounding(x64, quantizer):
    """|<v, y - q>| <= |v - h * v, reversed|_1 step / 2, which for order r is 2^r step / 2, while |v|_1 grows as width^r."""
    some = features(quantizer)
    X = jnp.asarray(data(1, rows=50))
    v, norm = v_of(quantizer), np.sqrt(some.p / 2) * np.linalg.norm(v_of(quantizer))
    apart = norm * np.abs(np.asarray(some.features(X) - some.condense(some.transform(X)[0]))).max()
    kernel = np.zeros(len(v) + 3)
    kernel[0] = 1
    for lag, h in quantizer.filter().items():
        kernel[lag] -= float(h)
    shaped = np.convolve(v[::-1], kernel)[: None if isinstance(quantizer, SigmaDelta) else len(v)]
    bound = np.abs(shaped).sum() * float(quantizer.spacing) / 2
    if isinstance(quantizer, SigmaDelta):
        assert bound == pytest.approx(2**quantizer.order * quantizer.spacing / 2)
    else:
        assert bound == pytest.approx(quantizer.beta**-quantizer.width * quantizer.spacing / 2)
    assert 0.2 * bound < apart <= bound * (1 + 1e-9)


@pytest.mark.parametrize(("bits", "count"), [(1, 13), (3, 8), (7, 9), (12, 5)])
def test_packing_goes_round(bits, count):
    x = np.random.default_rng(bits).integers(0, 2**bits, (3, count))
    x[0, 0], x[0, 1] = 0, 2**bits - 1
    packed = pack(jnp.asarray(x), bits)
    assert packed.shape == (3, -(-bits * count // 8))
    np.testing.assert_array_equal(unpack(packed, bits, count), x)
    whole = sum(int(k) << (bits * i) for i, k in enumerate(x[0]))
    assert int.from_bytes(np.asarray(packed[0]).tobytes(), "little") == whole


def test_a_stream_of_rows_is_all_rows():
    """Chunk by chunk, also where the rounding draws; unpacked it is what the codes condense to."""
    some, key = features(Memoryless.stochastic(2)), jax.random.key(3)
    X = jnp.asarray(data(2, rows=8), jnp.float32)
    codes, stability = some.transform(X, key)
    parts = list(some.stream([X[:4], X[4:]], key))
    stored = jnp.concatenate([part for part, _ in parts])
    np.testing.assert_array_equal(stored, some.store(codes))
    np.testing.assert_array_equal(some.load(stored), some.condense(codes))
    np.testing.assert_array_equal(jnp.concatenate([s.peak for _, s in parts]), stability.peak)

"""What embeddings refuse, and that the message names what was given and what to do; settings as pytrees."""

import itertools

import jax
import jax.numpy as jnp
import pytest

import jpfq
from jpfq.embed import FJLT, Beta, Memoryless, SigmaDelta, SparseGaussian, hadamard, pack, unpack

KEY = jax.random.key(0)


def fourier(quantizer=SigmaDelta(1, 4), **change):  # noqa: B008
    given = {"key": KEY, "inputs": 3, "m": 12, "gamma": 1.0, "quantizer": quantizer}
    return jpfq.RandomFourierFeatures.sample(**{**given, **change})


def codes():
    return jnp.zeros((2, 12), jnp.int8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SigmaDelta(4, 5), "orders 1, 2 and 3; got 4"),
        (lambda: SigmaDelta(True, 5), "orders 1, 2 and 3; got True"),
        (lambda: SigmaDelta(3, 10, K=2), r"order 3 is for one bit, K=1; got K=2\. Take order 2, or K=1"),
        (lambda: SigmaDelta(2, 16), r"the width is 2 n - 1 .*width=16\. Take 15 or 17"),
        (lambda: SigmaDelta(3, 11), r"the width is 3 n - 2 .*width=11\. Take 10 or 13"),
        (lambda: SigmaDelta(1, 0), "width is an integer of at least 1; got 0"),
        (lambda: SigmaDelta(1, 2.0), r"width is an integer of at least 1; got 2\.0"),
        (lambda: SigmaDelta(1, 4, K=0), "K is an integer of at least 1; got 0"),
        (lambda: SigmaDelta(1, 4, step=0.0), r"positive step, or None for the stable one; got 0\.0"),
        (lambda: SigmaDelta(1, 4, step="published"), "positive step.*got 'published'"),
        (lambda: Beta(1.0), r"1 < beta < 2K = 2; got 1\.0"),
        (lambda: Beta(4.0, K=2), r"1 < beta < 2K = 4; got 4\.0"),
        (lambda: Beta("1.5"), "1 < beta < 2K = 2; got '1.5'"),
        (lambda: Beta(float("nan")), "got nan"),
        (
            lambda: Memoryless(2, jpfq.rounding.Stochastic),
            r"rounding takes a Rounding, such as jpfq\.rounding\.Stochastic\(\)",
        ),
        (lambda: Memoryless(True), "K is an integer of at least 1; got True"),
        (lambda: fourier(m=14), r"14 measurements are not a multiple of width=4.*Take 12 or 16"),
        (lambda: fourier(m=3), r"3 measurements are not a multiple of width=4.*Take 4\."),
        (lambda: fourier(m=12.0), r"m is an integer of at least 1; got 12\.0"),
        (lambda: fourier(gamma=0), "must be a positive number; got 0"),
        (lambda: fourier(gamma="scale"), "must be a positive number; got 'scale'"),
        (
            lambda: jpfq.RandomFourierFeatures(jnp.ones((3, 12)), jnp.ones(11), SigmaDelta(1, 4)),
            r"shapes \(3, 12\) and \(11,\)",
        ),
        (lambda: fourier().transform(jnp.ones((2, 4))), r"takes vectors \(\.\., 3\); got shape \(2, 4\)"),
        (lambda: fourier().transform(jnp.ones(())), r"takes vectors \(\.\., 3\); got shape \(\)"),
        (lambda: fourier().transform(jnp.ones((2, 3), int)), r"real floating array \(\.\., 3\); got int32 of shape"),
        (lambda: fourier().transform([[1.0, 2.0, 3.0]]), "real floating array"),
        (
            lambda: fourier(Memoryless.stochastic()).transform(jnp.ones((2, 3))),
            r"Stochastic draws.*pass key=jax\.random",
        ),
        (
            lambda: fourier().condense(codes().astype(float)),
            r"Codes are integers \(\.\., 12\).*float32 of shape \(2, 12\)",
        ),
        (lambda: fourier().store(codes()[:, :8]), r"Codes are integers \(\.\., 12\).*int8 of shape \(2, 8\)"),
        (lambda: fourier().load(codes()), r"uint8 \(\.\., 2\); got int8 of shape \(2, 12\)"),
        (lambda: fourier().kernel(codes(), jnp.ones((2, 3))), r"real \(\.\., 3\), from `condense`.*int8"),
        (lambda: fourier().kernel(jnp.ones((2, 3)), jnp.ones((2, 12))), r"real \(\.\., 3\).*shape \(2, 12\)"),
        (lambda: SparseGaussian.sample(KEY, 8, 4, 0.0), r"density.*\(0, 1\]; got 0\.0"),
        (lambda: FJLT.sample(KEY, 8, 0, 0.5), "m is an integer of at least 1; got 0"),
        (
            lambda: jax.jit(lambda key: SparseGaussian.sample(key, 8, 4, 0.5))(KEY),
            "sampled on the host: sample them outside of jit",
        ),
        (
            lambda: jpfq.BinaryEmbedding(SparseGaussian.sample(KEY, 8, 6, 0.5), SigmaDelta(1, 4)),
            "6 measurements are not a multiple of width=4",
        ),
        (
            lambda: jpfq.BinaryEmbedding(SparseGaussian.sample(KEY, 8, 8, 0.5), SigmaDelta(1, 4), scale=-1.0),
            r"scale.*positive number; got -1\.0",
        ),
        (lambda: hadamard(jnp.ones((2, 12))), "power of two; got 12"),
        (lambda: pack(codes(), 0), "whole number of bits from 1 to 31; got 0"),
        (lambda: unpack(jnp.zeros((2, 4), jnp.uint8), 3, 8), r"8 codes of 3 bits.*uint8 \(\.\., 3\).*shape \(2, 4\)"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_settings_differ_in_structure():
    """The programs that `jit` keeps are found by structure: two settings of one structure would share a program."""
    some = [
        SigmaDelta(1, 4),
        SigmaDelta(2, 5),
        SigmaDelta(1, 4, K=2),
        SigmaDelta.published(1, 4),
        Beta(1.5),
        Beta(1.5, 4),
    ]
    some += [Memoryless(), Memoryless(2), Memoryless.stochastic(), Memoryless.semi_quantized()]
    for a, b in itertools.combinations(some, 2):
        assert jax.tree.structure(a) != jax.tree.structure(b), f"{a} and {b}"
    for a in some:
        leaves, structure = jax.tree.flatten(a)
        assert jax.tree.unflatten(structure, leaves) == a

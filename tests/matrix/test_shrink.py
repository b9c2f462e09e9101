"""Shrinkage: the formula, its limits, and that figures stay those of the data."""

import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from jpfq.matrix import Shrinkage
from tests.helpers import PLAIN, assert_close, assert_codes_equal, problem
from tests.reference import gpfq
from tests.reference.shrinkage import without_chance

N, OUT = 40, 6


def test_the_formula(x64):
    """Of the correlations as much is kept as is more than chance; and the diagonal of H grows by k."""
    X, Xq, _ = problem(101, n=N, drift=0.3)
    gram, k = jpfq.Gram.from_data(X, Xq), 0.5 * N / 64
    found = Shrinkage(0.5)(gram)
    H, C, drift = Xq.T @ Xq, Xq.T @ (X - Xq), (X - Xq).T @ (X - Xq)
    energy = np.diag(H)
    assert_close(found.H, without_chance(H, energy, energy, 64) + k * np.diag(energy))
    assert_close(found.C, (1 + k) * without_chance(C, energy, np.diag(drift), 64))
    for name in ("drift", "sum_X", "sum_Xq", "count"):
        np.testing.assert_array_equal(getattr(found, name), getattr(gram, name))
    alone = Shrinkage(0.5)(jpfq.Gram.from_data(Xq))
    assert alone.C is None
    assert_close(alone.H, found.H)


def test_inputs_that_are_independent_are_rounded_by_themselves(x64):
    """Orthogonal columns have less than chance, and so have most Grams of independent draws, or nearly."""
    X = np.linalg.qr(np.random.default_rng(7).standard_normal((64, N)))[0]
    found = Shrinkage()(jpfq.Gram.from_data(jnp.asarray(X)))
    np.testing.assert_array_equal(found.H, np.diag(np.diag(found.H)))
    drawn = np.random.default_rng(8).standard_normal((200, N))
    H = np.asarray(Shrinkage(0.0)(jpfq.Gram.from_data(jnp.asarray(drawn))).H)
    off = lambda M: np.linalg.norm(M - np.diag(np.diag(M)))
    assert off(H) < 0.35 * off(drawn.T @ drawn)


def test_many_rows_need_none(x64):
    X, Xq, _ = problem(102, n=N)
    gram = jpfq.Gram.from_data(X, X + 0.1 * Xq)  # a drift that follows the inputs
    many = jpfq.Gram(*(1e6 * x for x in (gram.H, gram.C, gram.drift, gram.sum_X, gram.sum_Xq, gram.count)))
    found = Shrinkage()(many)
    np.testing.assert_allclose(found.H, many.H, rtol=1e-4)
    np.testing.assert_allclose(found.C, many.C, rtol=1e-3, atol=1e-3 * np.abs(many.C).max())


def test_in_a_solve(x64):
    """The method sees the Gram after shrinkage; figures are those of the data themselves."""
    X, _, W = problem(103, n=N, out=OUT, drift=0)
    settings = PLAIN | {"method": jpfq.GPFQ(), "bits": 3, "scale": jpfq.scale.AbsMax()}
    tensor, info = jpfq.solve(W, jpfq.Gram.from_data(X), **settings | {"shrinkage": Shrinkage()})
    H = X.T @ X
    shrunk = without_chance(H, np.diag(H), np.diag(H), 64) + 0.5 * N / 64 * np.diag(np.diag(H))
    levels = gpfq.level_lists(W.shape, np.abs(W).max(0, keepdims=True) / 3, gpfq.integer(3)[0], np.zeros((1, OUT)))
    assert_codes_equal(tensor.codes, gpfq.gpfq_gram(W, shrunk, shrunk, levels).index - 4)
    assert_close(info.relative_error, gpfq.relative_error(X, W, X, np.asarray(tensor.dequantize())))
    assert_close(info.energy, ((X @ W) ** 2).sum())


@pytest.mark.slow
def test_few_rows_fit_new_ones_better():
    """What it is for: the error on rows not seen, under mismatch, of few rows."""
    errors = {}
    for seed in range(3):
        X, Xq, W = (np.float32(x) for x in problem(104 + seed, m=640, n=N, out=OUT, drift=0.3))
        gram = jpfq.Gram.from_data(X[:48], Xq[:48])
        for shrinkage in (None, Shrinkage()):
            method = jpfq.Qronos(damping=jpfq.damping.MeanDiagonal(1e-3))
            tensor, _ = jpfq.solve(W, gram, **PLAIN | {"method": method, "bits": 3, "shrinkage": shrinkage})
            errors.setdefault(shrinkage, []).append(gpfq.relative_error(X[48:], W, Xq[48:], tensor.dequantize()))
    assert np.mean(errors[Shrinkage()]) < 0.9 * np.mean(errors[None])


@pytest.mark.parametrize("share", [-1, "0.5", True])
def test_bad_share(share):
    with pytest.raises(ValueError, match="Shrinkage takes a share of 0 or more; got"):
        Shrinkage(share)

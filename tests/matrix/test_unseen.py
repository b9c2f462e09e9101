"""What calibration has not seen: weights of their own, rows that are few, inputs of unusual size, data that show nothing."""

import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from jpfq.matrix import Shrinkage
from tests.helpers import PLAIN, assert_close, assert_codes_equal, problem
from tests.reference.shrinkage import without_chance

N, OUT = 32, 6
ROUNDED = {"method": jpfq.MSQ(), "scale": jpfq.scale.MinMSE(), "shrinkage": None, "finish": None}


def new_error(X, Xq, W, q):
    """||X W - Xq q|| / ||X W|| on rows that nothing was chosen by."""
    return np.linalg.norm(X @ W - Xq @ np.asarray(q, np.float64)) / np.linalg.norm(X @ W)


def test_few_rows_are_trusted_less(x64):
    """The formulas of the docstring, of 5 rows and 32 inputs, one of which is 0."""
    X, Xq, _ = problem(1, m=5, n=N, drift=0.3, dead=(3,))
    found = Shrinkage(0.5)(jpfq.Gram.from_data(X, Xq))
    H, C, drift = Xq.T @ Xq, Xq.T @ (X - Xq), (X - Xq).T @ (X - Xq)
    energy, t, k = np.diag(H), 5 / (N + 16), 0.5 * N / 5
    mean = energy.sum() / (N - 1)
    more = k * (1 - t) * (2 * 5 / N + 2 / (5 + 2)) * mean
    rare = np.maximum(4 * mean / 5 - energy, 0)
    assert 0 < (rare > 0).sum() < N
    expected = without_chance(H, energy, energy, 5, t)
    expected += np.diag(np.where(energy > 0, k * energy + more + (1 + k) * rare, (1 + k) * mean))
    assert_close(found.H, expected)
    prior = 16 * (1 - t) * mean / 5 + rare
    slopes = (np.diag(C) + prior * np.trace(C) / energy.sum()) / (energy + prior)
    kept = (1 + k) * without_chance(C, energy, np.diag(drift), 5, t)
    assert_close(found.C, np.where(np.eye(N) > 0, np.diag(slopes * np.diag(expected) * (energy > 0)), kept))


@pytest.mark.slow
@pytest.mark.parametrize("drift", [0, 0.1])
def test_recommended_rules_bear_few_rows(drift):
    """On new rows at most 1.1 times as far off as plain rounding, from one row on; an input that sleeps changes nothing."""
    for bits in (4, 8):
        for m in (1, 2, 12):
            errors = []
            for seed in range(5):
                X, Xq, W = (np.float32(x) for x in problem(seed, m=m + 300, n=N, out=OUT, drift=drift))
                seen, seen_q = X[:m].copy(), Xq[:m].copy()
                seen[:, :4] = seen_q[:, :4] = 0
                gram = jpfq.Gram.from_data(jnp.asarray(seen), jnp.asarray(seen_q))
                solve = lambda gram=gram, W=W, bits=bits, **settings: jpfq.solve(W, gram, bits=bits, **settings)[
                    0
                ].dequantize()
                errors.append([new_error(X[m:], Xq[m:], W, q) for q in (solve(), solve(**ROUNDED))])
            ours, plain = np.mean(errors, 0)
            assert ours <= 1.1 * plain, (bits, m, ours / plain)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1e-20, 1e18])
def test_codes_do_not_depend_on_the_size_of_inputs(size):
    """Neither in the Gram form, summed batch by batch, nor in the data form; what is small is not dead."""
    X, Xq, W = (jnp.asarray(x, jnp.float32) for x in problem(3, m=64, n=N, out=OUT, drift=0.1))
    for settings in ({"shrinkage": Shrinkage()}, {"form": "data", "shrinkage": None, "method": jpfq.GPFQ()}):
        settings = PLAIN | {"method": jpfq.Qronos()} | settings
        found = []
        for c in (1, size):
            rows = jpfq.Rows(c * X, c * Xq)
            gram = jpfq.Gram.from_data(c * X[:20], c * Xq[:20]).update(c * X[20:], c * Xq[20:])
            found.append(jpfq.solve(W, rows if "form" in settings else gram, bits=4, **settings))
            assert_close(gram.mean_X, c * np.asarray(X).mean(0))
        (one, info), (other, scaled) = found
        assert_codes_equal(one.codes, other.codes)
        assert scaled.dead == 0
        assert_close(scaled.relative_error, info.relative_error)


def test_a_small_input_among_others_is_not_dead():
    X, _, W = (jnp.asarray(x, jnp.float32) for x in problem(4, m=64, n=N, out=OUT, drift=0))
    X = X.at[:, 3].multiply(1e-25).at[:, 5].set(0)
    tensor, info = jpfq.solve(W, jpfq.Gram.from_data(X), bits=4, **PLAIN, method=jpfq.GPFQ())
    assert info.dead == 1
    codes = np.floor(np.asarray(W)[[3, 5]] / np.asarray(tensor.step) + 0.5)
    assert_codes_equal(np.asarray(tensor.codes)[[3, 5]], np.clip(codes, -8, 7))
    both = jpfq.Gram.from_data(1e-20 * X).update(X)
    np.testing.assert_allclose(both.H, jpfq.Gram.from_data(X).H, rtol=1e-6)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (jpfq.Rows(jnp.zeros((8, N))), "show nothing: all its inputs are 0"),
        (jpfq.Gram.from_data(jnp.zeros((8, N))), "show nothing: all its inputs are 0"),
        (jpfq.Gram.from_data(jnp.zeros((0, N))), "hold no rows"),
        (jpfq.Rows(jnp.zeros((0, N))), "hold no rows"),
        (jpfq.Gram.from_data(jnp.ones((8, N)), weights=jnp.zeros(8)), "hold no rows"),
    ],
    ids=["rows of zeros", "zeros", "no rows", "none in data form", "no weights"],
)
def test_data_that_show_nothing_are_refused(data, message):
    with pytest.raises(ValueError, match=f"of the matrix {message}"):
        jpfq.solve(jnp.ones((N, OUT)), data, bits=4)

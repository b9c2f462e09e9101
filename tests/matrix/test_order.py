"""Orders: permutations of the coordinates, by the reference, and what they do to the pivots."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from tests.helpers import assert_codes_equal, problem
from tests.reference import optq

N = 40
DEAD = (0, 7, 39)

min_pivot = jax.jit(lambda share, data: jpfq.order.MinPivot(jpfq.damping.MeanDiagonal(share))(data))


def test_natural_and_descending():
    _, Xq, _ = (np.float32(x) for x in problem(91, n=N, dead=DEAD))
    Xq[:, 5] = Xq[:, 9]  # a tie, which goes to the lower index
    for data in (jpfq.Rows(Xq), jpfq.Gram.from_data(Xq)):
        assert jpfq.order.Natural()(data) is None
        p = np.asarray(jpfq.order.Descending()(data))
        assert_codes_equal(np.sort(p), np.arange(N))
        energy = (np.float64(Xq) ** 2).sum(0)
        assert (np.diff(energy[p]) <= 1e-5 * energy.max()).all()
        assert_codes_equal(p[-3:], DEAD)
    exact = jpfq.Rows(np.float32([[1, 2, 1, 2, 0]]))
    assert_codes_equal(jpfq.order.Descending()(exact), [1, 3, 0, 2, 4])


@pytest.mark.parametrize("dead", [(), DEAD])
@pytest.mark.parametrize("share", [0.01, 0.3])
def test_min_pivot(x64, dead, share):
    for seed in range(3):
        X, Xq, _ = problem(92 + seed, n=N, dead=dead)
        lam = share * (Xq**2).sum() / Xq.any(0).sum()
        expected = optq.min_pivot(Xq.T @ Xq + lam * np.eye(N))
        for data in (jpfq.Gram.from_data(X, Xq), jpfq.Rows(jnp.asarray(X), jnp.asarray(Xq))):
            assert_codes_equal(min_pivot(share, data), expected)


def test_min_pivot_of_dependent_inputs(x64):
    """Without damping the inputs that the rows cannot tell apart come last, and no pivot is divided by."""
    X = np.random.default_rng(0).integers(-3, 4, (6, 10)).astype(float)
    p = np.asarray(jpfq.order.MinPivot(jpfq.damping.MeanDiagonal(0.0))(jpfq.Gram.from_data(X)))
    assert_codes_equal(np.sort(p), np.arange(10))


def test_orders_lower_the_pivots(x64):
    """Their product is the determinant, whatever the order: a small sum is an even one."""
    for seed in range(4):
        _, Xq, _ = problem(95 + seed, n=N, drift=0)
        lam = 0.01 * (Xq**2).sum() / N
        gram = jpfq.Gram.from_data(Xq)
        orders = np.arange(N), np.asarray(min_pivot(0.01, gram)), np.asarray(jpfq.order.Descending()(gram))
        natural, least, descending = (optq.pivots(Xq[:, p], lam) for p in orders)
        assert least.sum() < 0.95 * natural.sum()
        assert least.sum() < 1.05 * descending.sum()
        np.testing.assert_allclose(np.log(least).sum(), np.log(natural).sum(), rtol=1e-9)

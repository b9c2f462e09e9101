"""Methods: what GPFQ and MSQ feed the recursion, and the published codes exactly, by the Gram and from the rows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from jpfq.matrix import Recursion, follow, substitute
from jpfq.scalar import ScaledGrid
from tests.helpers import assert_close, assert_codes_equal, problem
from tests.reference import gpfq as reference
from tests.reference import spfq

N, OUT, K = 40, 6, 4
NEAREST = jpfq.rounding.Nearest()
BLOCKS = [1, 5, 16, 32, 64, None]
DEAD = (0, 7, 39)


@functools.partial(jax.jit, static_argnames=("block", "form"))
def quantized(W, data, step, method, block, form, rounding=NEAREST):
    """Codes on Symmetric(K) at given steps (1, out), and the final residual in the data form."""
    levels = ScaledGrid(step, jnp.zeros_like(step), *(jnp.asarray(x, step.dtype) for x in (-K, K)))
    recursion = Recursion(levels, jnp.arange(W.shape[0]), W.shape[1], rounding)
    if form == "data":
        path, u = follow(W, data, method, recursion, block=block)
        return path.codes, path.q, u
    system = method(W, data)
    path = substitute(system.base, system.L, recursion, block=block, about=system.about)
    return path.codes, path.q, None


def steps(W):
    return np.abs(W).max(0, keepdims=True) / K


def level_lists(W):
    return reference.level_lists(W.shape, steps(W), reference.symmetric(K)[0], np.zeros((1, W.shape[1])))


@functools.cache
def case(drift, dead):
    """A problem and the published state form's answer to it."""
    X, Xq, W = problem(11, n=N, out=OUT, drift=drift, dead=dead)
    return X, Xq, W, reference.gpfq_state(W, X, Xq, level_lists(W))


def test_the_two_published_forms_agree():
    for drift, dead in ((0.1, DEAD), (0, ())):
        X, Xq, W, state = case(drift, dead)
        gram = reference.gpfq_gram(W, Xq.T @ Xq, Xq.T @ X, level_lists(W))
        assert_codes_equal(gram.index, state.index)
        np.testing.assert_allclose(gram.argument, state.argument, atol=1e-12)


@pytest.mark.parametrize("block", BLOCKS)
def test_gram_form_is_the_state_form(x64, block):
    X, Xq, W, expected = case(0.1, DEAD)
    codes, q, _ = quantized(W, jpfq.Gram.from_data(X, Xq), steps(W), jpfq.GPFQ(), block, "gram")
    assert_codes_equal(codes, expected.index - K)
    assert_close(q, expected.q)


@pytest.mark.parametrize("block", BLOCKS)
def test_data_form_is_the_state_form(x64, block):
    X, Xq, W, expected = case(0.1, DEAD)
    codes, q, u = quantized(W, jpfq.Rows(X, Xq), steps(W), jpfq.GPFQ(), block, "data")
    assert_codes_equal(codes, expected.index - K)
    assert_close(q, expected.q)
    assert_close(u, X @ W - Xq @ expected.q)


@pytest.mark.parametrize("form", ["gram", "data"])
def test_where_the_networks_agree(x64, form):
    X, _, W, expected = case(0, ())
    for data in (jpfq.Rows(X), jpfq.Rows(X, X)):
        data = data if form == "data" else data.gram()
        codes, _, u = quantized(W, data, steps(W), jpfq.GPFQ(), 16, form)
        assert_codes_equal(codes, expected.index - K)
        if form == "data":
            assert_close(u, X @ (W - expected.q))


@pytest.mark.parametrize("form", ["gram", "data"])
def test_msq_is_rounding(x64, form):
    X, Xq, W, _ = case(0.1, DEAD)
    rows = jpfq.Rows(X, Xq)
    codes, q, u = quantized(W, rows if form == "data" else rows.gram(), steps(W), jpfq.MSQ(), 16, form)
    expected = reference.msq(W, level_lists(W))
    assert_codes_equal(codes, expected.index - K)
    assert_close(q, expected.q)
    if form == "data":
        assert_close(u, X @ W - Xq @ expected.q)


@pytest.mark.parametrize("scaling", [1.0, 4.0])
@pytest.mark.parametrize("form", ["gram", "data"])
def test_uni_is_the_published_recursion(x64, scaling, form):
    X, Xq, W, _ = case(0.1, DEAD)
    levels, rows = level_lists(W), jpfq.Rows(X, Xq)
    nearest = lambda a, t, o: levels[t, o][reference.nearest(a, levels[t, o])]
    expected = spfq.uni(W, X, Xq, scaling, nearest)
    data = rows if form == "data" else rows.gram()
    _, q, _ = quantized(W, data, steps(W), jpfq.UNI(scaling), 16, form)
    assert_close(q, expected.q)


def test_uni_without_scaling_is_gpfq_where_the_networks_agree(x64):
    X, _, W, expected = case(0, ())
    codes, *_ = quantized(W, jpfq.Gram.from_data(X), steps(W), jpfq.UNI(), 16, "gram")
    assert_codes_equal(codes, expected.index - K)


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_sparse_gpfq(x64, kind):
    X, Xq, W, _ = case(0.1, DEAD)
    levels, lam = level_lists(W), 0.3
    rule = {"soft": spfq.soft_threshold, "hard": spfq.hard_threshold_grid}[kind]
    expected = spfq.sparse_gpfq(W, X, Xq, lambda a, t, o: rule(a, lam, levels[t, o]))
    rounding = {"soft": jpfq.rounding.SoftThreshold(lam), "hard": jpfq.rounding.HardThreshold(lam)}[kind]
    gram = jpfq.Gram.from_data(X, Xq)
    _, q, _ = quantized(W, gram, steps(W), jpfq.GPFQ(), 16, "gram", rounding)
    assert_close(q, expected.q)
    assert (expected.q == 0).mean() > 0.2


def test_the_system_of_gpfq(x64):
    """A = D^-1 tril(G) W and L = D^-1 stril(H), where a dead coordinate has its own weight and no feedback."""
    X, Xq, W, _ = case(0.1, DEAD)
    system = jpfq.GPFQ()(jnp.asarray(W), jpfq.Gram.from_data(X, Xq))
    H, G = Xq.T @ Xq, Xq.T @ X
    assert_close(system.cost, np.diag(H))
    alive = np.diag(H) > 0
    for t in range(N):
        row = np.array([H[t, j] / H[t, t] if j < t and alive[t] else 0 for j in range(N)])
        assert_close(system.L[t], row, scale=1)
        assert_close(system.A[t], G[t, : t + 1] @ W[: t + 1] / H[t, t] if alive[t] else W[t], scale=1)


@pytest.mark.parametrize("form", ["gram", "data"])
def test_codes_depend_on_the_data_through_their_products_alone(x64, form):
    """The Cholesky form: with H = R^T R, the n rows R and R^-T G are as good as the m rows Xq and X."""
    X, Xq, W = problem(12, n=N, out=OUT)
    R = np.linalg.cholesky(Xq.T @ Xq).T
    small = jpfq.Rows(np.linalg.solve(R.T, Xq.T @ X), R)
    expected = reference.gpfq_state(W, X, Xq, level_lists(W))
    codes, *_ = quantized(W, small if form == "data" else small.gram(), steps(W), jpfq.GPFQ(), 16, form)
    assert_codes_equal(codes, expected.index - K)


def test_on_orthogonal_inputs_path_following_is_memoryless(x64):
    X = np.linalg.qr(np.random.default_rng(0).standard_normal((64, N)))[0] * np.linspace(1, 3, N)
    _, _, W, _ = case(0.1, DEAD)
    gram = jpfq.Gram.from_data(X, X)
    greedy, *_ = quantized(W, gram, steps(W), jpfq.GPFQ(), 16, "gram")
    assert_codes_equal(greedy, quantized(W, gram, steps(W), jpfq.MSQ(), 16, "gram")[0])


def test_units_of_the_data_do_not_matter(x64):
    X, Xq, W, expected = case(0.1, DEAD)
    gram = jpfq.Gram.from_data(1e3 * X, 1e3 * Xq)
    assert_codes_equal(quantized(W, gram, steps(W), jpfq.GPFQ(), 16, "gram")[0], expected.index - K)


def test_methods_that_factor_have_no_data_form():
    X, Xq, W, _ = case(0.1, DEAD)
    for method in (jpfq.GPFQ(), jpfq.MSQ(), jpfq.UNI()):
        assert method.local
    for method in (jpfq.OPTQ(), jpfq.QEP(), jpfq.GPTAQ(), jpfq.Qronos()):
        assert not method.local
        with pytest.raises(TypeError, match="no data form"):
            method.block(W, jpfq.Rows(X, Xq), np.zeros((X.shape[0], OUT)))

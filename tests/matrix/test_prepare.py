"""Preparations: Align and SPFQ, LeastSquares and MagR equal their references; Hadamard turns everything alike."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from tests.helpers import PLAIN, assert_close, assert_codes_equal, level_lists, problem, recursed
from tests.reference import gpfq, magr, qronos, spfq

N, OUT = 40, 6
DEAD = (0, 7, 39)
GRID = jpfq.Symmetric(4)


@functools.cache
def case(drift=0.3, dead=DEAD):
    return problem(71, n=N, out=OUT, drift=drift, dead=dead)


def codes_of(method, W, gram, levels, rounding=None, key=None):
    return recursed(method(jnp.asarray(W), gram), levels, rounding=rounding, key=key).codes


# Alignment


@pytest.mark.parametrize("passes", [1, 2, 5])
def test_align_is_phase_one_of_spfq(x64, passes):
    X, Xq, W = case()
    V, data = jpfq.prepare.Align(passes)(jnp.asarray(W), jpfq.Gram.from_data(X, Xq), None)
    assert_close(V, spfq.align(W, X, Xq, passes))
    assert data.C is None
    assert data.drift is None
    assert_close(data.H, Xq.T @ Xq)


def test_align_where_the_networks_agree(x64):
    """There is nothing to align; weights of dead coordinates stay."""
    _, Xq, W = case()
    V, _ = jpfq.prepare.Align(2)(jnp.asarray(W), jpfq.Gram.from_data(Xq), None)
    np.testing.assert_array_equal(V, W)


def test_many_passes_are_least_squares(x64):
    X, Xq, W = case(dead=())
    gram = jpfq.Gram.from_data(X, Xq)
    best = qronos.least_squares(W, X, Xq, 0)
    far = [np.abs(np.asarray(jpfq.prepare.Align(r)(jnp.asarray(W), gram, None)[0]) - best).max() for r in (1, 20, 3000)]
    assert far[0] > 2 * far[1]
    assert far[2] < 1e-6
    solved, _ = jpfq.prepare.LeastSquares(damping=jpfq.damping.MeanDiagonal(0.0))(jnp.asarray(W), gram, None)
    assert_close(solved, best, scale=10)


def test_one_pass_before_path_following_changes_nothing(x64):
    X, Xq, W = case()
    gram = jpfq.Gram.from_data(X, Xq)
    levels = jpfq.scale.AbsMax(0.8)(jnp.asarray(W), GRID)
    aligned = jpfq.prepare.Align()(jnp.asarray(W), gram, None)
    assert_codes_equal(codes_of(jpfq.GPFQ(), *aligned, levels), codes_of(jpfq.GPFQ(), W, gram, levels))


def uniforms(key):
    """What `Stochastic` draws for every weight."""
    draw = lambda t, o: jax.random.uniform(jax.random.fold_in(jax.random.fold_in(key, o), t), dtype=jnp.float64)
    return jax.vmap(lambda t: jax.vmap(lambda o: draw(t, o))(jnp.arange(OUT)))(jnp.arange(N))


@pytest.mark.parametrize("passes", [1, 3])
def test_spfq(x64, passes):
    """Alignment, UNI and stochastic rounding are the published codes, given the same random numbers."""
    X, Xq, W = case()
    key = jax.random.key(3)
    levels = jpfq.scale.AbsMax(0.8)(jnp.asarray(W), GRID)
    expected = spfq.spfq(W, X, Xq, level_lists(levels, W.shape), np.asarray(uniforms(key)), passes)
    aligned = jpfq.prepare.Align(passes)(jnp.asarray(W), jpfq.Gram.from_data(X, Xq), None)
    codes = codes_of(jpfq.UNI(), *aligned, levels, jpfq.rounding.Stochastic(), key)
    assert_codes_equal(codes, expected.index - 4)
    assert (np.asarray(codes) != np.asarray(codes_of(jpfq.UNI(), *aligned, levels))).mean() > 0.1


# Least squares and MagR


@pytest.mark.parametrize("alpha", [1.0, 0.4, 0.0])
def test_least_squares(x64, alpha):
    X, Xq, W = case()
    lam = 0.01 * (Xq**2).sum() / Xq.any(0).sum()
    full = qronos.least_squares(W, X, Xq, lam)
    V, data = jpfq.prepare.LeastSquares(alpha)(jnp.asarray(W), jpfq.Gram.from_data(X, Xq), None)
    assert_close(V, W + alpha * (full - W))
    assert data.C is None
    alone = jpfq.Gram.from_data(Xq)
    assert jpfq.prepare.LeastSquares(alpha)(jnp.asarray(W), alone, None)[1] is alone


@pytest.mark.parametrize("drift", [0, 0.3])
def test_magr(x64, drift):
    """Proximal gradient on the float inputs, whatever the quantized network gets."""
    X, Xq, W = case(drift, ())
    X, Xq = X + 4, Xq + 4  # one direction rules, so that power iterations find the largest eigenvalue exactly
    S = X.T @ X
    S /= np.linalg.eigvalsh(S)[-1]
    gram = jpfq.Gram.from_data(X, None if drift == 0 else Xq)
    largest = [np.abs(W).max(0)]
    for alpha in (0.01, 0.1, 1.0):
        expected = magr.magr(W, X, np.full(OUT, alpha / np.abs(S).sum(0).max()), 30)
        V, data = jpfq.prepare.MagR(alpha, 30)(jnp.asarray(W), gram, None)
        assert np.abs(V - expected).max() < 1e-9
        assert data is gram
        largest.append(np.abs(V).max(0))
    assert (np.diff(largest, axis=0) < 0).all()


def test_magr_keeps_the_output(x64):
    """Few rows leave weights room to be smaller at the same output."""
    X, _, W = problem(73, m=12, n=N, out=OUT, drift=0)
    V, _ = jpfq.prepare.MagR(0.1)(jnp.asarray(W), jpfq.Gram.from_data(X), None)
    assert (np.abs(V).max(0) < 0.8 * np.abs(W).max(0)).all()
    assert gpfq.relative_error(X, W, X, np.asarray(V)) < 0.03


def test_magr_by_itself(x64):
    """The step on the largest weight, where inputs are orthogonal: prox of the largest magnitude, once and for all."""
    W = problem(72, n=N, out=OUT)[2]
    V, _ = jpfq.prepare.MagR(0.5, 3)(jnp.asarray(W), jpfq.Gram.from_data(np.eye(N)), None)
    expected = np.stack([magr.prox_max_norm(W[:, o], 0.5) for o in range(OUT)], axis=1)
    assert_close(V, expected)
    zeros = jpfq.prepare.MagR()(jnp.asarray(W), jpfq.Gram.from_data(np.zeros((3, N))), None)[0]
    assert_close(zeros, W)


@pytest.mark.slow
def test_preparations_in_a_row(x64):
    """They act in the order in which they are given; errors are against the weights as they were."""
    X, Xq, W = case()
    gram = jpfq.Gram.from_data(X, Xq)
    settings = PLAIN | {"method": jpfq.MSQ(), "grid": GRID, "scale": jpfq.scale.AbsMax()}
    tensor, info = jpfq.solve(W, gram, prepare=(jpfq.prepare.MagR(0.1), jpfq.prepare.Align(2)), **settings)
    V = jpfq.prepare.Align(2)(jpfq.prepare.MagR(0.1)(jnp.asarray(W), gram, None)[0], gram, None)[0]
    levels = jpfq.scale.AbsMax()(V, GRID)
    assert_codes_equal(tensor.codes, levels.encode(V))
    assert_close(tensor.step, levels.step)
    assert_close(info.relative_error, gpfq.relative_error(X, W, Xq, tensor.dequantize()))


# Rotation


@pytest.mark.parametrize(("n", "block"), [(40, 8), (32, 32), (6, 2)])
def test_hadamard_is_orthogonal(x64, n, block):
    turn = jpfq.Hadamard(seed=5)
    R = np.asarray(turn.unrotate(jnp.eye(n)))
    assert_close(R @ R.T, np.eye(n))
    assert_close(turn.rotate(jnp.eye(n)), R.T)
    assert_close(np.abs(R[:block, :block]), np.full((block, block), block**-0.5))
    assert np.count_nonzero(R) == n * block
    M = jnp.asarray(np.random.default_rng(0).standard_normal((n, 3)))
    assert_close(turn.unrotate(turn.rotate(M)), M)
    other = np.asarray(jpfq.Hadamard(seed=6).unrotate(jnp.eye(n)))
    assert (np.sign(other) != np.sign(R)).any()


def test_hadamard_turns_the_gram(x64):
    X, Xq, _ = case()
    turn = jpfq.Hadamard()
    R = np.asarray(turn.unrotate(jnp.eye(N)))
    found, expected = turn.gram(jpfq.Gram.from_data(X, Xq)), jpfq.Gram.from_data(X @ R, Xq @ R)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert_close(a, b)
    alone = turn.gram(jpfq.Gram.from_data(X))
    assert alone.C is None
    assert_close(alone.H, R.T @ X.T @ X @ R)


def test_a_rotated_solve(x64):
    """The codes are those of R^T W on the inputs X R; the kernel that comes out is in the coordinates that went in.

    A dead input, which the rotation would let any other outvote, is taken to have been seen with mean energy.
    """
    X, Xq, W = case()
    W = W.copy()
    W[5, 2] = 30  # an outlier, which the rotation spreads over eight inputs
    turn = jpfq.Hadamard(seed=2)
    settings = PLAIN | {"method": jpfq.GPFQ(), "grid": GRID, "scale": jpfq.scale.AbsMax()}
    tensor, info = jpfq.solve(W, jpfq.Gram.from_data(X, Xq), rotation=turn, **settings)
    R = np.asarray(turn.unrotate(jnp.eye(N)))
    levels = jpfq.scale.AbsMax()(jnp.asarray(R.T @ W), GRID)
    seen = np.eye(N)[list(DEAD)] * np.sqrt((Xq**2).sum() / (N - len(DEAD)))
    expected = gpfq.gpfq_state(
        R.T @ W, np.vstack([X, seen]) @ R, np.vstack([Xq, seen]) @ R, level_lists(levels, W.shape)
    )
    assert_codes_equal(tensor.codes, expected.index - 4)
    assert_close(tensor.dequantize(), R @ expected.q)
    assert_close(info.relative_error, gpfq.relative_error(X, W, Xq, tensor.dequantize()))
    _, straight = jpfq.solve(W, jpfq.Gram.from_data(X, Xq), **settings)
    assert info.relative_error < straight.relative_error

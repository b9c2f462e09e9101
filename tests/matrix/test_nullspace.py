"""MalySaab: the walk keeps Xq w, ends with at most m weights between two levels, and stays in every cell."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from jpfq.matrix import bounds
from jpfq.matrix.nullspace import REFACTOR, kernel_walk
from jpfq.scalar import ScaledGrid
from tests.helpers import PLAIN, assert_close, assert_on_grid
from tests.reference import maly_saab as reference

M, N, OUT = 8, 2 * REFACTOR + 9, 5  # two renewals of the basis, and a rest

walk = jax.jit(jax.vmap(kernel_walk, (1, None, 1, 1), 1))
prepared = jax.jit(jpfq.prepare.MalySaab())


def problem(seed, *, drift=0.0, dead=(), rank=M):
    """Few rows; their rank may be smaller still, and columns may be 0."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((M, rank)) @ rng.standard_normal((rank, N)) / np.sqrt(rank)
    X[:, list(dead)] = 0
    Xq = X + drift * rng.standard_normal((M, N)) if drift else X
    if drift:
        Xq[:, list(dead)] = 0
    return X, Xq, rng.uniform(-1, 1, (N, OUT))


def cells(W, codes):
    """Levels over +-max |w|, and the cell of every weight."""
    step = 2 * np.abs(W).max(0, keepdims=True) / (codes - 1)
    zero, top = (codes - 1) / 2, codes - 1
    levels = ScaledGrid(
        *(jnp.asarray(x) for x in (np.broadcast_to(step, W.shape), np.full(W.shape, zero), 0.0, float(top)))
    )
    below = np.clip(np.floor(W / step + zero), 0, top - 1)
    return levels, step * (below - zero), step * (below + 1 - zero)


def inside(z, low, high):
    """How many weights of each neuron are strictly inside their cells."""
    width = 1e-9 * (high - low)
    return ((z > low + width) & (z < high - width)).sum(0)


@pytest.mark.parametrize("codes", [2, 5])
@pytest.mark.parametrize(("dead", "rank"), [((), M), ((3, 70), M), ((), 5)], ids=["full", "dead", "low rank"])
def test_the_walk(x64, codes, dead, rank):
    X, _, W = problem(1, dead=dead, rank=rank)
    _, low, high = cells(W, codes)
    z = np.asarray(walk(W, X, low, high))
    assert np.abs(X @ (z - W)).max() < 1e-10
    assert (z >= low - 1e-12).all()
    assert (z <= high + 1e-12).all()
    free = inside(z, low, high)
    assert (free <= rank).all()
    assert free.sum() > 0
    assert (inside(W, low, high) > M).all()
    theirs = np.stack([reference.kernel_walk_boxes(W[:, o], X, low[:, o], high[:, o]) for o in range(OUT)], axis=1)
    assert np.abs(X @ (theirs - W)).max() < 1e-10
    assert (inside(theirs, low, high) <= M).all()


def test_weights_at_or_outside_their_ends_stay(x64):
    X, _, W = problem(2)
    low, high = np.full(W.shape, -0.5), np.full(W.shape, 0.5)
    W[::7] = 0.5
    z = np.asarray(walk(W, X, low, high))
    stays = np.abs(W) >= 0.5
    np.testing.assert_array_equal(z[stays], W[stays])
    assert np.abs(X @ (z - W)).max() < 1e-10
    assert (inside(z, low, high) <= M).all()


def test_inputs_that_are_all_zero(x64):
    _, _, W = problem(3)
    _, low, high = cells(W, 2)
    z = np.asarray(walk(W, np.zeros((M, N)), low, high))
    assert np.isfinite(z).all()
    assert (inside(z, low, high) == 0).all()


@pytest.mark.parametrize("drift", [0.0, 0.1])
@pytest.mark.parametrize("codes", [2, 5])
def test_prepared_weights(x64, drift, codes):
    """With mismatch the weights first take the smallest change to Xq v = X w, and the walk keeps that."""
    X, Xq, W = problem(4, drift=drift, dead=(11,))
    levels, *_ = cells(W, codes)
    rows = jpfq.Rows(jnp.asarray(X), jnp.asarray(Xq) if drift else None)
    z, data = prepared(W, rows, levels)
    assert_close(Xq @ np.asarray(z), X @ W, scale=100)
    assert data.Xq is None
    np.testing.assert_array_equal(data.X, Xq)
    start = W + np.linalg.pinv(Xq) @ ((X - Xq) @ W)
    position = np.asarray(levels.position(np.asarray(z)))
    between = (np.abs(position - np.round(position)) > 1e-6) & (position > 0) & (position < codes - 1)
    assert (between.sum(0) <= M).all()
    outside = np.abs(start) > np.abs(W).max(0)  # moved off the grid by the alignment
    np.testing.assert_allclose(np.asarray(z)[outside], start[outside], rtol=1e-10)


@pytest.mark.parametrize("codes", [2, 5])
def test_the_error_of_rounding_what_is_left(x64, codes):
    """At most half a step for each of m weights: below step / 2 times the sum of the m largest inputs."""
    X, _, W = problem(7)
    levels, low, high = cells(W, codes)
    z = walk(W, X, low, high)
    error = np.linalg.norm(X @ (W - np.asarray(levels.decode(levels.encode(z)))), axis=0)
    step = np.asarray(levels.step)[0]
    bound = np.array([bounds.kernel_walk_error(jpfq.Rows(jnp.asarray(X)), x) for x in step])
    assert_close(bound, np.sort(np.linalg.norm(X, axis=0))[-M:].sum() * step / 2)
    assert (error <= bound).all()
    assert (error > bound / 20).all()


def test_float32_is_stable():
    X, _, W = (np.float32(x) for x in problem(5))
    _, low, high = (np.asarray(x, np.float32) for x in (0, *cells(np.float64(W), 2)[1:]))
    z = np.asarray(walk(W, X, low, high))
    assert np.abs(X @ (z - W)).max() < 1e-3
    assert (((z > low + 1e-4) & (z < high - 1e-4)).sum(0) <= M).all()


@pytest.mark.slow
@pytest.mark.parametrize("grid", [jpfq.Binary(), jpfq.Symmetric(2)], ids=str)
def test_the_published_method(x64, grid):
    """The walk, then rounding: on one bit the error is far below that of rounding alone."""
    X, Xq, W = problem(6, drift=0.05)
    settings = PLAIN | {
        "grid": grid,
        "scale": jpfq.scale.AbsMax(),
        "method": jpfq.MSQ(),
        "order": jpfq.order.Descending(),
    }
    rows = jpfq.Rows(jnp.asarray(X), jnp.asarray(Xq))
    tensor, info = jpfq.solve(W, rows, prepare=jpfq.prepare.MalySaab(), **settings)
    assert_on_grid(tensor)
    error = np.linalg.norm(X @ W - Xq @ np.asarray(tensor.dequantize())) / np.linalg.norm(X @ W)
    assert_close(info.relative_error, error)
    levels = jpfq.scale.AbsMax()(jnp.asarray(W), grid)
    alone = X @ W - Xq @ np.asarray(levels.decode(levels.encode(W)))
    assert error < 0.7 * np.linalg.norm(alone) / np.linalg.norm(X @ W)

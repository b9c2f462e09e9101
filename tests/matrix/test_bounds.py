"""Bounds hold on simulated data: errors of every method without an end of the grid, random errors with probability."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from jpfq.matrix import bounds
from jpfq.scalar import ScaledGrid
from tests.helpers import PLAIN, assert_close, problem, recursed

N, OUT, STEP = 40, 6, 0.4
METHODS = {
    "MSQ": jpfq.MSQ(),
    "GPFQ": jpfq.GPFQ(),
    "UNI": jpfq.UNI(),
    "UNI(4)": jpfq.UNI(4.0),
    "OPTQ": jpfq.OPTQ(),
    "QEP": jpfq.QEP(),
    "Qronos": jpfq.Qronos(),
    "Qronos exact": jpfq.Qronos(exact=True),
}


def endless(out, step=STEP):
    return ScaledGrid(jnp.full((1, out), step), jnp.zeros((1, out)), *(jnp.asarray(x) for x in (-(2.0**20), 2.0**20)))


@pytest.mark.parametrize(
    "rounding", [jpfq.rounding.Nearest(), jpfq.rounding.Stochastic()], ids=["nearest", "stochastic"]
)
@pytest.mark.parametrize("name", METHODS)
def test_square_bound(x64, name, rounding):
    """||Xq (W0 - q)||^2 of every neuron, W0 what a grid of step 0 would give."""
    shares = []
    for seed, dead in ((1, ()), (2, (3, 17)), (3, ())):
        X, Xq, W = problem(seed, n=N, out=OUT, drift=0.3, dead=dead)
        system = METHODS[name](jnp.asarray(W), jpfq.Gram.from_data(X, Xq))
        q = recursed(system, endless(OUT), rounding=rounding, key=jax.random.key(seed)).q
        error = ((Xq @ np.asarray(bounds.target(system) - q)) ** 2).sum(0)
        bound = np.asarray(bounds.square_bound(system.cost, rounding.error(endless(OUT))))
        assert (error <= bound).all()
        shares.append(error.sum() / bound.sum())
    assert np.mean(shares) > 0.002  # not empty words


def test_energy_step(x64):
    """The identity behind the bound of GPFQ, at every step of a walk."""
    X, _, W = problem(4, n=N, out=1, drift=0)
    system = jpfq.GPFQ()(jnp.asarray(W), jpfq.Gram.from_data(X))
    q = np.asarray(recursed(system, endless(1)).q)[:, 0]
    u = np.zeros(len(X))
    for t in range(N):
        x = X[:, t]
        argument = W[t, 0] + x @ u / (x @ x)
        after = u + (W[t, 0] - q[t]) * x
        assert_close(bounds.energy_step(jnp.asarray(u), jnp.asarray(x), argument - q[t]), after @ after)
        u = after


def test_steady_error():
    """Many random inputs: the residual keeps the size that is foreseen."""
    rng, m, n, out = np.random.default_rng(5), 20, 1500, 32
    X, W = rng.standard_normal((n, m)), rng.uniform(-1, 1, (n, out))
    u, squares = np.zeros((m, out)), []
    for x, w in zip(X, W, strict=True):
        a = w + x @ u / (x @ x)
        u = u + np.outer(x, w - STEP * np.floor(a / STEP + 0.5))
        squares.append((u**2).sum(0).mean())
    expected = float(bounds.steady_error(STEP, m, m))
    assert 0.8 < np.mean(squares[n // 2 :]) / expected < 1.2


@pytest.mark.parametrize("scaling", [1.0, 4.0, 16.0])
def test_covariance_and_largest_error(x64, scaling):
    """Of unbiased rounding, over many draws for one neuron; the constant is loose by about ten."""
    draws, m, rng = 400, 8, np.random.default_rng(6)
    X = rng.standard_normal((m, N)) / np.sqrt(m)
    W = np.repeat(rng.uniform(-1, 1, (N, 1)), draws, 1)
    for method in (jpfq.UNI(scaling), jpfq.OPTQ(jpfq.damping.MeanDiagonal(0.1))):
        system = method(jnp.asarray(W), jpfq.Gram.from_data(X))
        if isinstance(method, jpfq.OPTQ):
            if scaling > 1:
                continue
            cost = system.cost
        else:
            cost = jnp.sum(jnp.asarray(X) ** 2, 0)
        q = recursed(system, endless(draws), rounding=jpfq.rounding.Stochastic(), key=jax.random.key(0)).q
        u = X @ (W - np.asarray(q))
        assert (np.abs(u.mean(1)) < 5 * u.std(1) / np.sqrt(draws)).all()  # unbiased
        largest = np.linalg.eigvalsh(u @ u.T / draws)[-1]
        beta = float(bounds.covariance(STEP, cost, scaling))
        assert beta / 60 < largest < beta
        for p in (0.5, 1.0, 2.0):
            within = (np.abs(u).max(0) <= float(bounds.max_error(STEP, cost, p, scaling))).mean()
            assert within >= float(bounds.confidence(m, N, p))
    assert_close(bounds.max_error(STEP, cost, 2.0), STEP * np.sqrt(4 * np.pi * np.log(N) * cost.max()))


def test_confidence():
    assert_close(bounds.confidence(8, 100, 2.0), 1 - np.sqrt(2) * 8 / 1e4, scale=1)
    assert bounds.confidence(8, 100, 3.0) > bounds.confidence(8, 100, 2.0) > bounds.confidence(80, 100, 2.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{"method": jpfq.GPFQ()}, {"prepare": jpfq.prepare.LeastSquares(), "method": jpfq.UNI(2.0)}, {}],
    ids=str,
)
def test_figures_of_a_solve(x64, settings):
    """relative_floor is the error without rounding, and where nothing saturates the bound holds beforehand."""
    X, Xq, W = problem(8, n=N, out=OUT, drift=0.2, dead=(5,))
    gram, method = jpfq.Gram.from_data(X, Xq), settings.get("method", jpfq.Qronos())
    settings = PLAIN | {"scale": jpfq.scale.AbsMax(1.3), "method": method} | settings
    tensor, info = jpfq.solve(W, gram, bits=5, **settings)
    assert info.saturation == 0
    ready = settings["prepare"](jnp.asarray(W), gram, None) if "prepare" in settings else (jnp.asarray(W), gram)
    system = method(*ready)
    free = np.asarray(bounds.target(system))
    scale = np.linalg.norm(X @ W)
    assert_close(info.relative_floor, np.linalg.norm(X @ W - Xq @ free) / scale)
    reach = np.broadcast_to(np.asarray(tensor.step) / 2, W.shape)
    bound = np.sqrt(np.asarray(bounds.square_bound(system.cost, reach)).sum()) / scale
    assert_close(info.relative_bound, info.relative_floor + bound)
    assert 0 < info.relative_floor < info.relative_error <= info.relative_bound

"""OPTQ, QEP, GPTAQ and Qronos: the published codes exactly, what they have in common, and the geometry of the factor."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from jpfq.matrix import bounds
from jpfq.matrix.damping import factor, top_eigenvalue
from jpfq.scalar import ScaledGrid
from tests.helpers import PLAIN, assert_close, assert_codes_equal, level_lists, problem, recursed
from tests.reference import gpfq, optq, qronos

N, OUT, SIZE = 40, 6, 8
DEAD = (0, 7, 39)
NONE = jpfq.damping.MeanDiagonal(0.0)


def share(Xq, x=0.01):
    """lam of MeanDiagonal(x), by the columns that are not 0."""
    return x * (Xq**2).sum() / Xq.any(0).sum()


# What a grid and an order are: symmetric per neuron as it comes; asymmetric in groups, in another order.
CASES = {
    "X = Xq": (0, (), jpfq.Integer(3), jpfq.scale.PerChannel(), False),
    "X = Xq, groups": (0, (), jpfq.Asymmetric(3), jpfq.scale.PerGroup(SIZE), True),
    "apart": (0.3, (), jpfq.Asymmetric(3), jpfq.scale.PerChannel(), False),
    "apart, dead": (0.3, DEAD, jpfq.Integer(3), jpfq.scale.PerChannel(), False),
    "apart, dead, groups": (0.3, DEAD, jpfq.Asymmetric(3), jpfq.scale.PerGroup(SIZE), True),
}
each_case = pytest.mark.parametrize("name", CASES)

# The method, and its reference (W, X, Xq, levels, lam) where lam is what the default damping of 1 % adds.
METHODS = {
    "OPTQ": (jpfq.OPTQ(), lambda W, X, Xq, levels, lam: optq.optq(W, Xq, levels, lam)),
    "QEP": (jpfq.QEP(), functools.partial(qronos.qep, alpha=0.5)),
    "QEP at 1": (jpfq.QEP(1.0), functools.partial(qronos.qep, alpha=1)),
    "GPTAQ": (jpfq.GPTAQ(), functools.partial(qronos.gptaq, alpha=0.25)),
    "GPTAQ at 1": (jpfq.GPTAQ(1.0), functools.partial(qronos.gptaq, alpha=1)),
    "Qronos": (jpfq.Qronos(), qronos.qronos_ls),
    "Qronos exact": (jpfq.Qronos(exact=True), qronos.qronos_brevitas),
}


@functools.cache
def case(name):
    """A problem in the order p of the recursion, and the grid over its weights."""
    drift, dead, grid, per, permuted = CASES[name]
    X, Xq, W = problem(61, n=N, out=OUT, drift=drift, dead=dead)
    with jax.enable_x64(True):
        levels = jpfq.scale.AbsMax(0.8, per)(jnp.asarray(W), grid)
        p = np.argsort(-(Xq**2).sum(0), kind="stable") if permuted else np.arange(N)
        return X[:, p], Xq[:, p], W[p], p, levels, level_lists(levels, W.shape)[p]


def codes_of(method, W, gram, levels, p=None, block=None):
    return np.asarray(recursed(method(jnp.asarray(W), gram), levels, p, block=block).codes)


@each_case
@pytest.mark.parametrize("method", METHODS)
def test_codes_are_the_published_ones(x64, method, name):
    X, Xq, W, p, levels, lists = case(name)
    method, reference = METHODS[method]
    expected = reference(W, X, Xq, lists, share(Xq))
    gram = jpfq.Gram.from_data(Xq) if "=" in name else jpfq.Gram.from_data(X, Xq)
    assert_codes_equal(codes_of(method, W, gram, levels, p), expected.index + int(levels.lo))


@pytest.mark.parametrize("name", ["apart", "apart, dead"])
def test_other_dampings(x64, name):
    X, Xq, W, p, levels, lists = case(name)
    gram = jpfq.Gram.from_data(X, Xq)
    for damping, lam in (
        (jpfq.damping.MeanDiagonal(0.3), share(Xq, 0.3)),
        (jpfq.damping.TopEigenvalue(1e-3), 1e-3 * float(top_eigenvalue(gram.H))),
    ):
        for method, reference in (
            (jpfq.OPTQ(damping), METHODS["OPTQ"][1]),
            (jpfq.Qronos(damping=damping), qronos.qronos_ls),
            (jpfq.Qronos(exact=True, damping=damping), qronos.qronos_brevitas),
        ):
            expected = reference(W, X, Xq, lists, lam)
            assert_codes_equal(codes_of(method, W, gram, levels, p), expected.index + int(levels.lo))


@pytest.mark.parametrize("name", ["X = Xq", "apart"])
def test_qronos_is_its_definition(x64, name):
    """Least squares over all that follows, coordinate by coordinate; where the networks agree OPTQ is the same."""
    X, Xq, W, _, levels, lists = case(name)
    expected = qronos.qronos(W, X, Xq, lists).index + int(levels.lo)
    gram = jpfq.Gram.from_data(X, Xq)
    assert_codes_equal(codes_of(jpfq.Qronos(exact=True, damping=NONE), W, gram, levels), expected)
    if name == "X = Xq":
        assert_codes_equal(codes_of(jpfq.OPTQ(NONE), W, gram, levels), expected)
        return
    # the least squares form may round the first coordinate elsewhere, and is the same if it does not
    near = codes_of(jpfq.Qronos(damping=NONE), W, gram, levels)
    same = near[0] == expected[0]
    assert_codes_equal(near[:, same], expected[:, same])
    assert same.any()


@pytest.mark.parametrize("method", ["OPTQ", "GPTAQ", "Qronos", "Qronos exact"])
def test_blocks_change_nothing(x64, method):
    X, Xq, W, p, levels, _ = case("apart, dead")
    gram = jpfq.Gram.from_data(X, Xq)
    plain = codes_of(METHODS[method][0], W, gram, levels, p)
    for block in (7, 16):
        assert_codes_equal(codes_of(METHODS[method][0], W, gram, levels, p, block), plain)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_groups_refit_on_the_way(x64, kind):
    """Each group's grid is fitted to what its weights have become when the recursion reaches it."""
    grid = {"symmetric": jpfq.Integer(3, narrow=True), "asymmetric": jpfq.Asymmetric(3)}[kind]
    codes = gpfq.integer(3, narrow=True)[0] if kind == "symmetric" else gpfq.unsigned(3)[0]
    fit = optq.fit_absmax(codes) if kind == "symmetric" else optq.fit_minmax(3)
    settings = PLAIN | {"scale": jpfq.scale.AbsMax(per=jpfq.scale.PerGroup(SIZE, refit=True)), "grid": grid}
    for drift, dead in ((0, ()), (0.3, DEAD)):
        X, Xq, W = problem(62, n=N, out=OUT, drift=drift, dead=dead)
        lam = share(Xq)
        target = qronos.least_squares(W, X, Xq, lam)
        expected, steps, zeros = optq.optq_groups_refit(target, Xq, codes, SIZE, lam, fit)
        tensor, info = jpfq.solve(W, jpfq.Gram.from_data(X, Xq), method=jpfq.Qronos(), **settings)
        assert_codes_equal(tensor.codes, expected.index + codes[0])
        assert_close(tensor.step, steps)
        assert_codes_equal(tensor.zero, zeros)
        assert_close(tensor.dequantize(), expected.q)
        assert_close(info.relative_error, gpfq.relative_error(X, W, Xq, expected.q))
        fixed = np.abs(W.reshape(-1, SIZE, OUT)).max(1) / 3
        assert kind == "asymmetric" or np.abs(steps[1:] / fixed[1:] - 1).max() > 0.01


# What the methods have in common


def assert_systems_close(found, expected):
    assert_close(found.A, expected.A, scale=10)
    assert_close(found.L, expected.L, scale=10)


def test_relations(x64):
    X, Xq, W, *_ = case("apart, dead")
    W, gram = jnp.asarray(W), jpfq.Gram.from_data(X, Xq)
    assert_systems_close(jpfq.QEP(1.0)(W, gram), jpfq.Qronos()(W, gram))
    assert_systems_close(jpfq.QEP(0.0)(W, gram), jpfq.OPTQ()(W, gram))
    assert_systems_close(jpfq.GPTAQ(0.0)(W, gram), jpfq.OPTQ()(W, gram))
    for alpha in (1.0, 0.4):
        moved, aligned = jpfq.prepare.LeastSquares(alpha)(W, gram, None)
        assert aligned.C is None
        assert_systems_close(jpfq.OPTQ()(moved, aligned), jpfq.QEP(alpha)(W, gram))
    same = jpfq.Gram.from_data(Xq)
    for method in (jpfq.QEP(), jpfq.GPTAQ(), jpfq.Qronos(), jpfq.Qronos(exact=True)):
        assert_systems_close(method(W, same), jpfq.OPTQ()(W, same))


def test_damping_is_more_rows(x64):
    """lam on the diagonal is as good as rows sqrt(lam) I in both networks."""
    X, Xq, W, *_ = case("apart")
    lam = share(Xq)
    more = [np.concatenate([x, np.sqrt(lam) * np.eye(N)]) for x in (X, Xq)]
    for method in (jpfq.OPTQ, lambda damping: jpfq.Qronos(damping=damping), lambda d: jpfq.GPTAQ(damping=d)):
        damped = method(jpfq.damping.MeanDiagonal(0.01))(jnp.asarray(W), jpfq.Gram.from_data(X, Xq))
        assert_systems_close(damped, method(NONE)(jnp.asarray(W), jpfq.Gram.from_data(*more)))


def test_limits(x64):
    X, Xq, W, *_ = case("apart")
    W, gram = jnp.asarray(W), jpfq.Gram.from_data(X, Xq)
    system = jpfq.OPTQ(jpfq.damping.MeanDiagonal(1e14))(W, gram)  # much damping: rounding to nearest
    assert_close(system.A, W)
    assert_close(system.L, np.zeros((N, N)), scale=1)
    orthogonal = jpfq.Gram.from_data(np.linalg.qr(np.asarray(X))[0] * np.linspace(1, 3, N))
    for method in (jpfq.OPTQ(), jpfq.Qronos(), jpfq.GPTAQ(), jpfq.GPFQ()):
        system = method(W, orthogonal)
        assert_close(system.A, W)
        assert_close(system.L, np.zeros((N, N)), scale=1)


@pytest.mark.parametrize("name", ["X = Xq", "apart, dead"])
def test_without_rounding(x64, name):
    """Where the networks agree the weights come back; otherwise those of Qronos are the least squares ones."""
    X, Xq, W, *_ = case(name)
    gram = jpfq.Gram.from_data(X, Xq)
    wanted = {"OPTQ": W, "Qronos": qronos.least_squares(W, X, Xq, share(Xq))}
    if name == "X = Xq":
        wanted["GPTAQ at 1"] = W
    step = 2.0**-20
    fine = ScaledGrid(jnp.full((1, OUT), step), jnp.zeros((1, OUT)), jnp.asarray(-(2.0**24)), jnp.asarray(2.0**24))
    for method, expected in wanted.items():
        system = METHODS[method][0](jnp.asarray(W), gram)
        assert_close(bounds.target(system), expected)
        q = np.asarray(recursed(system, fine).q)
        off = np.abs(np.linalg.inv(np.eye(N) + np.asarray(system.L))).sum(1, keepdims=True) * step / 2
        assert (np.abs(q - expected) <= off * (1 + 1e-6)).all()
        assert off.max() < 1e-4


# The factor


@pytest.mark.parametrize("dead", [(), DEAD])
def test_the_factor(x64, dead):
    _, Xq, W = problem(63, n=N, out=OUT, dead=dead)
    lam, alive = share(Xq), Xq.any(0)
    damped = Xq.T @ Xq + np.diag(np.where(alive, lam, 1))
    found = factor(jpfq.Gram.from_data(Xq).H, jpfq.damping.MeanDiagonal(0.01))
    V = np.asarray(found.V)
    assert_close(V @ V.T, damped)
    assert not np.tril(V, -1).any()
    assert_close(found.diagonal[alive] ** 2, optq.pivots(Xq[:, alive], lam))
    assert_close(found.diagonal[~alive], np.ones((~alive).sum()))
    assert_close(found.solve(jnp.asarray(W)), np.linalg.solve(damped, W))
    T = np.eye(N) + np.asarray(found.L)
    assert_close(found.feedback(jnp.asarray(W)), T @ np.linalg.solve(damped, W))


@pytest.mark.parametrize("name", ["X = Xq", "apart, dead"])
def test_error_identity_and_babai(x64, name):
    """||[Xq; sqrt(lam) I] (w - q)||^2 = sum_t e_t^2 V_tt^2, at most a quarter of sum_t step^2 V_tt^2 without an end."""
    X, Xq, W, _, levels, lists = case(name)
    lam, alive = share(Xq), Xq.any(0)
    target = qronos.least_squares(W, X, Xq, lam)
    system = jpfq.Qronos()(jnp.asarray(W), jpfq.Gram.from_data(X, Xq))
    q = np.asarray(recursed(system, levels).q)
    off = (target - q) * alive[:, None]
    squares = ((Xq @ off) ** 2).sum(0) + lam * (off**2).sum(0)
    error = np.asarray(system.A) - np.asarray(system.L) @ q - q
    assert_close(np.asarray(system.cost)[alive] @ error[alive] ** 2, squares)
    if alive.all():
        assert_close(optq.babai(qronos.qronos_ls(W, X, Xq, lists, lam), Xq, lam), squares)

    endless = ScaledGrid(levels.step, levels.zero, *(jnp.asarray(x) for x in (-(2.0**20), 2.0**20)))
    error = ((Xq @ (target - np.asarray(recursed(system, endless).q))) ** 2).sum(0)
    bound = np.asarray(bounds.square_bound(system.cost, jnp.broadcast_to(levels.step / 2, (N, OUT))))
    assert (error <= bound).all()
    assert 0.2 < error.sum() / bound.sum() < 0.5  # a third on average


def test_dampings(x64):
    _, Xq, _ = problem(64, n=N, out=OUT, dead=DEAD)
    H = jpfq.Gram.from_data(Xq).H
    assert_close(jpfq.damping.MeanDiagonal(0.1)(H), share(Xq, 0.1))
    largest = np.linalg.eigvalsh(np.asarray(H))[-1]
    found = float(jpfq.damping.TopEigenvalue(0.5)(H))
    assert 0.49 * largest < found <= 0.5 * largest * (1 + 1e-12)
    assert jpfq.damping.TopEigenvalue()(jnp.zeros((4, 4))) == jpfq.damping.MeanDiagonal()(jnp.zeros((4, 4))) == 0
    one = np.outer(np.arange(5.0), np.arange(5.0))
    assert_close(top_eigenvalue(jnp.asarray(one)), 30.0)
    for method in (jpfq.OPTQ(), jpfq.QEP(), jpfq.GPTAQ(), jpfq.Qronos()):
        assert method.damping == jpfq.damping.MeanDiagonal(0.01)

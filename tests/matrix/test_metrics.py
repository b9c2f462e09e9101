"""Figures of a solve are those of its codes, in float64: of weights and inputs of any size, and where much cancels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from jpfq.matrix import recipe_of, solve_all
from tests.helpers import PLAIN, problem

GRIDS = (
    *(jpfq.Integer(b) for b in (2, 3, 4, 6, 8)),
    *(jpfq.Binary(), jpfq.Ternary(), jpfq.Symmetric(5), jpfq.Asymmetric(4), jpfq.Asymmetric(8)),
)
FIGURES = ("relative_error", "relative_floor", "relative_bound", "relative_rounding")


def truth(X, Xq, W, tensor):
    """The relative error of codes, in float64."""
    X, Xq, W, step, zero, codes = (
        np.asarray(x, np.float64) for x in (X, Xq, W, tensor.step, tensor.zero, tensor.codes)
    )
    outputs = X @ W
    return np.linalg.norm(outputs - Xq @ (step * (codes - zero))) / np.linalg.norm(outputs)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [PLAIN | {"method": jpfq.GPFQ()}, {}], ids=["GPFQ", "best"])
def test_weights_and_inputs_of_any_size(settings):
    """Powers of two change nothing but the unit: neither codes nor relative figures, though squares leave float32."""
    X, Xq, W = (np.asarray(x, np.float32) for x in problem(3, n=16, out=4, m=24))
    plain, info = jpfq.solve(W, jpfq.Gram.from_data(X, Xq), bits=4, **settings)
    assert info.exponent == 0
    assert float(info.relative_error) == pytest.approx(truth(X, Xq, W, plain), rel=1e-4)
    for w, x in ((60, 0), (-66, 0), (80, -20), (-90, 40), (0, 50), (0, -45), (60, 20)):
        scaled = [np.ldexp(a, k) for a, k in ((X, x), (Xq, x), (W, w))]
        tensor, found = jpfq.solve(scaled[2], jpfq.Gram.from_data(*scaled[:2]), bits=4, **settings)
        np.testing.assert_array_equal(tensor.codes, plain.codes)
        np.testing.assert_allclose(tensor.step, np.ldexp(plain.step, w), rtol=1e-6)
        for name in FIGURES:
            np.testing.assert_allclose(getattr(found, name), getattr(info, name), rtol=1e-4, err_msg=f"{w} {x} {name}")
        energy = np.float64(found.energy) * 4.0 ** int(found.exponent)
        exact = [np.asarray(a, np.float64) for a in scaled]
        assert energy == pytest.approx(((exact[0] @ exact[2]) ** 2).sum(), rel=1e-5)


def test_weights_at_the_ends_of_float32():
    """No figure of 0 where there is an error, also where squares of the weights overflow or vanish."""
    X, _, W = (np.asarray(x, np.float32) for x in problem(3, n=16, out=4, m=24, drift=0))
    for size in (1e18, 1e-20, 3e30, 1e-33):
        tensor, info = jpfq.solve(W * np.float32(size), jpfq.Gram.from_data(X), bits=3)
        assert float(info.relative_error) == pytest.approx(truth(X, X, W * np.float32(size), tensor), rel=1e-4)
        assert 0 < info.relative_error < info.relative_bound


def test_inputs_too_small_to_be_squared():
    """They are squared in units of their own; a Gram whose squares are lost already is refused."""
    X, _, W = (np.asarray(x, np.float32) for x in problem(3, n=16, out=4, m=24, drift=0))
    small = X * np.float32(1e-20)
    tensor, info = jpfq.solve(W, jpfq.Gram.from_data(small), bits=3)
    assert float(info.relative_error) == pytest.approx(truth(small, small, W, tensor), rel=1e-4)
    with pytest.raises(ValueError, match="underflow"):
        jpfq.solve(W, jax.jit(jpfq.Gram.from_data)(small), bits=3)


def test_an_energy_without_end_is_no_small_error():
    made = jpfq.Info(*map(jnp.asarray, (1.0, np.inf, 0.0, 0, 0.0, 0.0, 0, 0.0, 1.0, 0)))
    assert np.isnan(made.relative_error)
    assert np.isnan(jpfq.Info.join([made, made]).relative_error)


def test_parts_of_different_units_join():
    """A kernel of parts of which one is far larger: its figures are those of the sum."""
    W, rng = np.asarray(problem(3, n=8, out=4)[2], np.float32), np.random.default_rng(0)
    parts, error, energy = [], 0.0, 0.0
    for k in (0, 60, 62, -70):
        X = np.asarray(rng.standard_normal((12, 8)), np.float32)
        tensor, info = jpfq.solve(np.ldexp(W, k), jpfq.Gram.from_data(X), bits=3, **PLAIN)
        exact, made = (np.asarray(x, np.float64) for x in (np.ldexp(W, k), tensor.dequantize()))
        error, energy = error + ((X @ (exact - made)) ** 2).sum(), energy + ((X @ exact) ** 2).sum()
        parts.append(info)
    joined = jpfq.Info.join(parts)
    assert float(joined.relative_error) == pytest.approx(np.sqrt(error / energy), rel=1e-4)
    assert float(joined.energy) * 4.0 ** int(joined.exponent) == pytest.approx(energy, rel=1e-4)


@functools.partial(jax.jit, static_argnames="bits")
def solved(W, X, Xq, bits):
    """Many problems by one program."""
    recipe = recipe_of(bits, None)
    one = lambda W, X, Xq: solve_all(W[None], jax.tree.map(lambda x: x[None], jpfq.Gram.from_data(X, Xq)), recipe, None)
    return jax.lax.map(lambda x: one(*x), (W, X, Xq))


@pytest.mark.slow
@pytest.mark.parametrize(("m", "n", "out"), [(1, 8, 1), (2, 8, 2)])
def test_figures_where_much_cancels(m, n, out):
    """Codes that fit one row or two almost exactly: the error is known to within its rounding, and no bound is below it."""
    rng = np.random.default_rng(m)
    X, W, noise = (np.asarray(rng.standard_normal((400, *s)), np.float32) for s in ((m, n), (n, out), (m, n)))
    Xq = X + np.float32(0.1) * noise
    made = solved(W, X, Xq, 8)
    step, codes = (np.asarray(x, np.float64)[:, 0] for x in (made.step, made.codes))
    exact = [np.asarray(x, np.float64) for x in (X, Xq, W)]
    outputs = exact[0] @ exact[2]
    norm = lambda x: np.sqrt((x**2).sum((1, 2)))
    true = norm(outputs - exact[1] @ (step * codes)) / norm(outputs)
    found, bound, rounding = (
        np.asarray(getattr(made.info, name), np.float64)
        for name in ("relative_error", "relative_bound", "relative_rounding")
    )
    assert (np.abs(found**2 - true**2) <= rounding**2).all()
    sharp = true > 50 * rounding
    assert sharp.mean() > 0.3
    np.testing.assert_allclose(found[sharp], true[sharp], rtol=1e-3)
    assert not (bound < true).any()
    assert np.isfinite(bound).mean() > 0.5
    assert (found > np.where(np.isfinite(bound), np.inf, 0)).sum() == np.isnan(bound).sum()


@pytest.mark.slow
def test_960_problems():
    """Of rows from 1 to twice the inputs, on ten grids, with and without drift."""
    shapes = ((3, 2), (8, 3), (24, 6))
    for i in range(960):
        rng = np.random.default_rng(i)
        n, out = shapes[i // 10 % 3]
        m, drift = int(rng.integers(1, 2 * n + 1)), rng.choice([0, 0, 1e-3, 0.03, 0.1, 0.3, 1])
        X = rng.standard_normal((m, n)) @ (np.eye(n) + 0.4 * rng.standard_normal((n, n)) / np.sqrt(n)) + rng.choice(
            [0, 0.2, 3]
        )
        X, noise, W = (
            np.asarray(x, np.float32) for x in (X, rng.standard_normal((m, n)), rng.standard_normal((n, out)))
        )
        Xq = X + np.float32(drift) * noise
        tensor, info = jpfq.solve(W, jpfq.Gram.from_data(X, Xq), grid=GRIDS[i % 10])
        true, found, rounding = truth(X, Xq, W, tensor), float(info.relative_error), float(info.relative_rounding)
        assert abs(found**2 - true**2) <= rounding**2, i
        assert found == pytest.approx(true, rel=1e-3) or true < 50 * rounding, i
        assert not float(info.relative_bound) < true, i

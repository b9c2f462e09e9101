"""Accumulators: no input whatsoever takes a sum beyond its bits, whatever method chose the codes, in whatever order."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jpfq
from jpfq.matrix import Recursion, substitute
from jpfq.scalar import Accumulator, EPInit, ScaledGrid, datatype_bits, width_of
from jpfq.scalar.accumulator import _l1_threshold
from jpfq.scalar.integer_sums import quotient
from tests.helpers import assert_codes_equal, problem
from tests.reference import axe as reference

N, OUT, CASES = 24, 4, 48
INPUTS = [(0, 1), (0, 15), (0, 255), (-8, 7), (-128, 127), (-1, 0), (-7, 7), (-3, 200), (0, 65535), (-32768, 32767)]
METHODS = {"GPFQ": jpfq.GPFQ(), "OPTQ": jpfq.OPTQ(), "Qronos": jpfq.Qronos(), "MSQ": jpfq.MSQ()}


def reached(k, inputs, T):
    """By brute force of signs: the largest and less the least sum of each tile (tiles, ..) over all inputs."""
    (mu, nu), k = inputs, np.asarray(k, np.int64)
    tiles = [k[t : t + T] for t in range(0, len(k), T)]
    most = np.stack([np.maximum(nu * x, mu * x).sum(0) for x in tiles])
    least = np.stack([np.minimum(nu * x, mu * x).sum(0) for x in tiles])
    return most, -least


def assert_fits(k, inputs, P, T):
    """No sum of a tile leaves +-(2^(P-1) - 1)."""
    worst = max(x.max() for x in reached(k, inputs, T))
    assert worst <= 2 ** (int(P) - 1) - 1, f"a sum reaches {worst}, beyond {P} bits"


@functools.partial(jax.jit, static_argnames="T")
def rounded(A, L, about, order, step, top, P, lo, hi, T, how):
    """Codes (cases, in, out) of many problems, each with bits, input codes and grid of its own. `how` picks a rounding."""

    def one(A, L, about, order, step, top, P, lo, hi, key):
        guard = Accumulator(P, T) if how is None else how(P, T)
        rounding = guard.around(jpfq.rounding.Stochastic() if how is None else jpfq.rounding.Nearest(), (lo, hi))
        levels = ScaledGrid(step, jnp.zeros_like(step), -top - 1, top)
        recursion = Recursion(levels, order, OUT, rounding, key)
        carry, inputs_of = rounding.init_all(about, order)
        recursion = recursion._replace(carry=carry)
        path = substitute(A, L, recursion, block=8, about=about, inputs=inputs_of(recursion.spread()))
        return jnp.zeros_like(path.codes).at[order].set(path.codes)

    keys = jax.random.split(jax.random.key(0), CASES)
    return jax.vmap(one)(A, L, about, order, step, top, P, lo, hi, keys)


@functools.cache
def roundings():
    """A compiled function from problems to codes for each kind of rounding, by tile."""
    return {
        "soft": jax.tree_util.Partial(lambda P, T: Accumulator(P, T)),
        "hard": jax.tree_util.Partial(lambda P, T: Accumulator(P, T, soft=False)),
        "drawn": None,
        "EP-init": jax.tree_util.Partial(lambda P, T: EPInit(P, T)),
    }


@functools.cache
def systems():
    """A pool of systems of all methods, natural and in an order of their own: (A, L, about, order) each (pool, ..)."""
    found = []
    for seed in range(8):
        X, Xq, W = (
            jnp.asarray(x, jnp.float32) for x in problem(seed, m=48, n=N, out=OUT, dead=(3,) if seed % 2 else ())
        )
        order = jnp.arange(N) if seed < 3 else jnp.asarray(np.random.default_rng(seed).permutation(N))
        gram = jpfq.Gram.from_data(X, Xq).permute(order)
        for method in METHODS.values():
            base, L, about, _ = method(W[order], gram)
            L = jnp.zeros((N, N), jnp.float32) if L is None else L
            found.append((base, L, base if about is None else about, order))
    return tuple(np.stack(x) for x in zip(*found, strict=True))


def cases(seed, plain=False):
    """Problems of the pool (of MSQ alone, if plain) with random bits, inputs, grids and steps; some sums bind."""
    rng = np.random.default_rng(seed)
    pick = rng.choice(np.flatnonzero(~systems()[1].any((1, 2))) if plain else len(systems()[0]), CASES)
    A, L, about, order = (x[pick] for x in systems())
    P = rng.integers(8, 33, CASES)
    lo, hi = np.array([INPUTS[i] for i in rng.integers(len(INPUTS), size=CASES)]).T
    top = 2.0 ** (rng.integers(2, 9, CASES) - 1) - 1
    step = 10.0 ** rng.uniform(-2.5, 0, (CASES, 1, OUT))
    f32, i32 = (lambda x: jnp.asarray(x, jnp.float32)), (lambda x: jnp.asarray(x, jnp.int32))
    return (f32(A), f32(L), f32(about), i32(order), f32(step), f32(top), i32(P), i32(lo), i32(hi))


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "T"), [("soft", 7), ("hard", 1), ("drawn", None), ("EP-init", 5)])
@settings(deadline=None, derandomize=True, max_examples=25)
@given(st.integers(0, 2**31))
def test_no_input_overflows_any_sum(kind, T, seed):
    """1200 problems each, of all methods, ordered and not, with 8 to 32 bits, inputs of one sign and of both."""
    drawn = cases(seed, plain=kind == "EP-init")
    k = np.asarray(rounded(*drawn, T, roundings()[kind]))
    assert (k == np.round(k)).all()
    for codes, P, lo, hi, top in zip(k, *drawn[6:], drawn[5], strict=True):
        assert_fits(codes, (int(lo), int(hi)), P, T or N)
        assert codes.min() >= -top - 1
        assert codes.max() <= top


@pytest.mark.slow
def test_without_the_constraint_the_check_fails():
    drawn = cases(0)
    free = jax.tree_util.Partial(lambda P, T: Free())
    k = np.asarray(rounded(*drawn, 7, free))
    beyond = 0
    for codes, P, lo, hi in zip(k, *drawn[6:], strict=True):
        most, least = reached(codes, (int(lo), int(hi)), 7)
        beyond += max(most.max(), least.max()) > 2 ** (int(P) - 1) - 1
    assert beyond > CASES // 10
    with pytest.raises(AssertionError, match="beyond 8 bits"):
        assert_fits(np.full((7, 1), 7), (0, 255), 8, 7)


class Free:
    """A guard that guards nothing."""

    def around(self, rounding, inputs):
        return rounding


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.integers(0, 2**31))
def test_no_sum_on_the_way_goes_further(seed):
    """What `reached` says of a tile, no input and no order of summation exceeds, and one input attains it."""
    rng = np.random.default_rng(seed)
    k, (mu, nu) = rng.integers(-8, 8, 9), INPUTS[rng.integers(len(INPUTS))]
    most, least = (int(x[0, 0]) for x in reached(k[:, None], (mu, nu), 9))
    x = rng.integers(mu, nu + 1, (64, 9))
    p = np.stack([rng.permutation(9) for _ in range(64)])
    sums = np.cumsum(np.take_along_axis(k * x, p, 1), 1)
    assert sums.max() <= most
    assert sums.min() >= -least
    assert int(np.where(k > 0, nu, mu) @ k) == most
    assert -int(np.where(k > 0, mu, nu) @ k) == least


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.integers(0, 2**31))
def test_the_quotient_is_exact(seed):
    rng = np.random.default_rng(seed)
    d = rng.integers(1, 2 ** rng.integers(1, 17), 500).astype(np.int32)
    q = rng.integers(0, 2 ** rng.integers(1, 18), 500)
    x = np.minimum(q * d + rng.integers(-1, 2, 500), 2**31 - 1).clip(0).astype(np.int32)
    assert_codes_equal(quotient(x, d), x // d)
    assert (np.asarray(quotient(np.full(500, 2**31 - 1, np.int32), d)) <= (2**31 - 1) // d).all()


quotient = jax.jit(quotient)


def test_nothing_divides_by_zero():
    assert (np.asarray(quotient(jnp.array([0, 5], jnp.int32), jnp.zeros(2, jnp.int32))) >= 2**19).all()


def test_the_threshold_is_that_of_the_projection(x64):
    """Shrunk by it, weights sum up to the radius; within the ball it is 0; and it equals the one found by sorting."""
    W = np.random.default_rng(0).standard_normal((40, 6))
    step = np.full(6, 0.1)
    for P, T in ((9, 40), (9, 16), (12, 16), (20, 16)):
        tiles = -(-40 // T)
        padded = np.zeros((tiles * T, 6))
        padded[:40] = W
        own = padded.reshape(tiles, T, 6)
        radius = (2**P - 2) / 255 * 0.1
        found = np.asarray(_l1_threshold(np.abs(own - own.mean(1, keepdims=True)), np.full((tiles, 6), radius)))
        expected = reference.thresholds(W, step, (0, 255), P, T)
        assert np.abs(found - expected).max() <= 1e-12
        assert (found == 0).all() == (P == 20)


@pytest.mark.slow
@pytest.mark.parametrize("T", [16, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("inputs", "P"), [((0, 255), 13), ((-128, 127), 14), ((0, 15), 8), ((0, 255), 32)])
def test_codes_are_those_of_brevitas(x64, inputs, P, T):
    """GPFQ, OPTQ with its own feedback and with ours: natural and in descending order, the last tile not full."""
    X, Xq, W = problem(3, m=80, n=40, out=5, dead=(7,))
    step = np.abs(W).max(0) / 7
    parts = {
        "grid": jpfq.Integer(4),
        "scale": jpfq.scale.Fixed(step),
        "inputs": inputs,
        "finish": None,
        "shrinkage": None,
    }
    for order in (jpfq.order.Natural(), jpfq.order.Descending()):
        p = np.arange(40)
        solve = lambda data, method, **how: np.asarray(
            jpfq.solve(jnp.asarray(W), data, method=method, order=order, accumulator=Accumulator(P, T, **how), **parts)[
                0
            ].codes
        )
        gram = jpfq.Gram.from_data(jnp.asarray(X), jnp.asarray(Xq))
        if isinstance(order, jpfq.order.Descending):
            p = np.argsort(-np.diag(Xq.T @ Xq), kind="stable")
        given = (step, (-8, 7), inputs, P, T or 40, p)
        assert_codes_equal(solve(gram, jpfq.GPFQ()), reference.gpfq(W, X, Xq, *given))
        own = jpfq.Gram.from_data(jnp.asarray(Xq))
        lam = 0.01 * np.mean(np.diag(Xq.T @ Xq))
        for feedback in ("shrunk", "argument"):
            expected = reference.optq(W, Xq, *given, lam, feedback)
            method = jpfq.OPTQ(jpfq.damping.MeanDiagonal(0.01))
            assert_codes_equal(solve(own, method, feedback=feedback), expected)


def test_the_bound_of_the_types():
    """Exact: no codes of these types go beyond, some need it; the published bound is this or one bit more."""
    for n, M, N_ in [(128, 4, 4), (1, 2, 1), (576, 4, 8), (2048, 8, 8), (9, 3, 5), (4096, 4, 4)]:
        for signed in (False, True):
            if signed and N_ == 1:
                continue
            inputs = jpfq.Integer(N_) if signed else jpfq.Asymmetric(N_)
            found = datatype_bits(n, jpfq.Integer(M), inputs)
            worst = n * 2 ** (M - 1) * (2 ** (N_ - 1) if signed else 2**N_ - 1)
            assert 2 ** (found - 2) - 1 < worst <= 2 ** (found - 1) - 1
            alpha = np.log2(n) + N_ + M - 1 - signed
            published = int(np.ceil(alpha + np.log2(1 + 2**-alpha) + 1))
            assert published - 1 <= found <= published
    assert [width_of(x) for x in (0, 1, 127, 128)] == [1, 2, 8, 9]


@pytest.mark.parametrize("bits", [1, 33, 8.5, True, "16", float("nan")])
def test_bits_that_are_no_width_are_refused(bits):
    for guard in (Accumulator, EPInit):
        with pytest.raises(ValueError, match="from 2 to 32"):
            guard(bits)


@pytest.mark.parametrize("tile", [0, -4, 2.0, True])
def test_a_tile_that_is_no_number_of_inputs_is_refused(tile):
    with pytest.raises(ValueError, match="tile is a positive number"):
        Accumulator(16, tile)


def test_other_settings_are_checked():
    with pytest.raises(ValueError, match="'argument' or 'shrunk'"):
        Accumulator(16, feedback="brevitas")
    assert str(Accumulator(16, 64)) == "Accumulator(16, 64)"

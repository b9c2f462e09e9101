"""Scales: steps and zero points equal plain loops per tensor, channel and group; bad input; scales as pytrees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jpfq
from tests.helpers import assert_close
from tests.reference import gpfq as reference

N, OUT, SIZE = 12, 4, 3
PER = {"tensor": jpfq.scale.PerTensor(), "channel": jpfq.scale.PerChannel(), "group": jpfq.scale.PerGroup(SIZE)}
GRIDS = {
    "integer": (jpfq.Integer(4), reference.integer(4), 7),
    "equispaced": (jpfq.Equispaced(4), reference.equispaced(4), 1.5),
    "asymmetric": (jpfq.Asymmetric(3), reference.unsigned(3), None),
    "offset": (jpfq.Offset(3), reference.unsigned(3), None),
}

lay = jax.jit(lambda scale, *args: scale(*args))


def weights(seed=0, dtype=np.float64):
    """Uneven neurons, shifted off 0 so that low and high ends differ."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((N, OUT)) * [0.1, 1, 3, 0.5] + 0.1).astype(dtype)


def intervals(rule, W, per, symmetric):
    """{(group, channel): (low, high)} by plain loops, for rules that read an interval off the weights."""
    if rule == "quantile" and per == "tensor":
        if symmetric:
            radius = 1.1 * reference.mean_of_quantiles(W, 0.8)
            return {(0, 0): (-radius, radius)}
        ends = [[reference.quantile(W[:, o], p) for o in range(OUT)] for p in (1 - 0.8, 0.8)]
        return {(0, 0): tuple(1.1 * sum(end) / OUT for end in ends)}
    radius = {
        "absmax": lambda w: reference.absmax(w, 0.9),
        "quantile": lambda w: 1.1 * reference.quantile(np.abs(w), 0.8),
        "median": lambda w: reference.median(w, 2.5),
    }[rule]
    two_ends = {
        "absmax": lambda w: (0.9 * w.min(), 0.9 * w.max()),
        "quantile": lambda w: (1.1 * reference.quantile(w, 1 - 0.8), 1.1 * reference.quantile(w, 0.8)),
    }
    ends = (lambda w: (-radius(w), radius(w))) if symmetric else two_ends[rule]
    return {at: ends(w) for at, w in reference.sets(W, per, SIZE).items()}


def step_and_zero(low, high, grid):
    """The grid laid over one interval. An offset is given in steps."""
    _, (codes, zero), reach = GRIDS[grid]
    if grid == "offset":
        step = (max(high, 0) - min(low, 0)) / (len(codes) - 1)
        return step, -min(low, 0) / step
    return (high / reach, zero) if zero is not None else reference.minmax(low, high, int(np.log2(len(codes))))


def assert_zero(levels, at, step, zero):
    """The zero point, or the offset in steps."""
    if levels.offset:
        assert_close(levels.zero[at], zero * step)
    else:
        assert levels.zero[at] == zero


SCALES = {
    "absmax": lambda per: jpfq.scale.AbsMax(0.9, per=per),
    "quantile": lambda per: jpfq.scale.Quantile(0.8, 1.1, per=per),
    "median": lambda per: jpfq.scale.Median(2.5, per=per),
}


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize(
    ("rule", "grid"), [(r, g) for r in SCALES for g in GRIDS if (r, GRIDS[g][2]) != ("median", None)]
)
def test_scale_is_the_plain_loop(x64, rule, per, grid):
    W = weights()
    levels = lay(SCALES[rule](PER[per]), jnp.asarray(W), GRIDS[grid][0])
    expected = intervals(rule, W, per, symmetric=GRIDS[grid][2] is not None)
    assert levels.step.shape == levels.zero.shape == {"tensor": (1, 1), "channel": (1, OUT), "group": (4, OUT)}[per]
    assert levels.step.dtype == jnp.float64
    for at, (low, high) in expected.items():
        step, zero = step_and_zero(low, high, grid)
        assert_close(levels.step[at], step)
        assert_zero(levels, at, step, zero)
    assert len(expected) == levels.step.size
    codes = GRIDS[grid][1][0]
    assert (levels.lo, levels.hi) == (codes[0], codes[-1])


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("per", PER)
def test_minmse_is_the_plain_search(x64, per, grid):
    W, norm = weights(1), 2.4
    codes, zero = GRIDS[grid][1]
    levels = lay(jpfq.scale.MinMSE(norm, candidates=20, least=0.3, per=PER[per]), jnp.asarray(W), GRIDS[grid][0])
    shares = []
    for at, w in reference.sets(W, per, SIZE).items():
        low, high = (w.min(), w.max()) if zero is None else (-reference.absmax(w), reference.absmax(w))
        lay_over = lambda p: step_and_zero(p * low, p * high, grid)
        p = reference.mse_search(w, lambda p: reference.values(codes, *lay_over(p)), 20, 0.3, norm)
        assert_close(levels.step[at], lay_over(p)[0])
        assert_zero(levels, at, *lay_over(p))
        shares.append(p)
    assert min(shares) < 1 or per == "tensor"  # something was searched


@pytest.mark.slow
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("per", PER)
def test_weighted_minmse_is_the_plain_search(x64, per, grid):
    """As above, each square error times the importance of its weight."""
    W, (codes, zero) = weights(1), GRIDS[grid][1]
    importance = np.random.default_rng(2).exponential(size=W.shape) ** 2
    scale = jpfq.scale.MinMSE(candidates=20, least=0.3, per=PER[per], weighted=True)
    levels = lay(scale, jnp.asarray(W), GRIDS[grid][0], jnp.asarray(importance))
    weight = reference.sets(importance, per, SIZE)
    for at, w in reference.sets(W, per, SIZE).items():
        low, high = (w.min(), w.max()) if zero is None else (-reference.absmax(w), reference.absmax(w))
        least = np.inf
        for p in 1 - np.arange(20) * 0.7 / 19:
            step, zeros = step_and_zero(p * low, p * high, grid)
            values = reference.values(codes, step, zeros)
            errors = [x - values[reference.nearest(x, values)] for x in np.ravel(w)]
            cost = np.ravel(weight[at]) @ np.square(errors)
            if cost < least:
                least, best = cost, (step, zeros)
        assert_close(levels.step[at], best[0])
        assert_zero(levels, at, *best)
    plain = lay(jpfq.scale.MinMSE(candidates=20, least=0.3, per=PER[per]), jnp.asarray(W), GRIDS[grid][0])
    assert per == "tensor" or (np.asarray(levels.step) != np.asarray(plain.step)).any()


def test_weights_need_an_importance():
    with pytest.raises(ValueError, match=r"weighted=True\) needs the importance of each weight"):
        jpfq.scale.MinMSE(weighted=True)(jnp.asarray(weights(1, np.float32)), jpfq.Integer(4))


def test_minmse_error_is_at_most_absmax_error():
    W = jnp.asarray(weights(2, np.float32))
    grid = jpfq.Integer(3)
    error = {}
    for scale in (jpfq.scale.AbsMax(), jpfq.scale.MinMSE()):
        levels = lay(scale, W, grid)
        error[type(scale)] = np.sum((W - levels.decode(levels.encode(W))) ** 2, axis=0)
    assert (error[jpfq.scale.MinMSE] <= error[jpfq.scale.AbsMax]).all()
    assert (error[jpfq.scale.MinMSE] < error[jpfq.scale.AbsMax]).any()


@pytest.mark.parametrize("grid", [jpfq.Integer(4), jpfq.Symmetric(4), jpfq.Equispaced(5), jpfq.Binary()], ids=str)
def test_absmax_puts_the_largest_weight_on_the_top_level(x64, grid):
    W = jnp.asarray(np.abs(weights(3)))
    levels = lay(jpfq.scale.AbsMax(), W, grid)
    assert not levels.saturates(W).any()
    top = levels.decode(levels.encode(W.max(0, keepdims=True)))
    assert_close(top, W.max(0, keepdims=True))
    assert (levels.encode(W.max(0, keepdims=True)) == levels.hi).all()


@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.integers(0, 10**6), st.floats(-3, 3))
def test_asymmetric_represents_zero_and_clips_nothing(seed, shift):
    """Whatever the signs of the weights: the zero point is a code, and no weight is more than half a step outside."""
    W = jnp.asarray(weights(seed, np.float32) + np.float32(shift))
    levels = lay(jpfq.scale.AbsMax(), W, jpfq.Asymmetric(3))
    assert (levels.zero == jnp.round(levels.zero)).all()
    assert ((levels.zero >= 0) & (levels.zero <= 7)).all()
    assert (levels.decode(levels.encode(jnp.zeros_like(W))) == 0).all()
    error = jnp.abs(W - levels.decode(levels.encode(W)))
    assert (error <= levels.step * (1 + 1e-5)).all()


@pytest.mark.parametrize(
    "scale", [jpfq.scale.AbsMax(), jpfq.scale.Quantile(0.9), jpfq.scale.Median(), jpfq.scale.MinMSE()], ids=repr
)
def test_steps_follow_the_units_of_the_weights(x64, scale):
    W = jnp.asarray(weights(4))
    assert_close(lay(scale, 8 * W, jpfq.Integer(4)).step, 8 * lay(scale, W, jpfq.Integer(4)).step)
    np.testing.assert_array_equal(lay(scale, -W, jpfq.Ternary()).step, lay(scale, W, jpfq.Ternary()).step)


def test_fixed_broadcasts_its_step():
    W = jnp.asarray(weights(5, np.float32))
    for step in (0.25, np.float32([0.1, 0.2, 0.3, 0.4]), np.full((3, OUT), 0.5, np.float32), np.full((2, 1), 0.5)):
        levels = jpfq.scale.Fixed(np.asarray(step, np.float32))(W, jpfq.Infinite())
        shown = np.atleast_2d(np.asarray(step, np.float32))
        np.testing.assert_array_equal(levels.step, shown)
        assert levels.zero.shape == shown.shape
        assert (levels.zero == 0).all()


def test_quantile_one_per_channel_is_absmax(x64):
    W = jnp.asarray(weights(6))
    quantile = lay(jpfq.scale.Quantile(1.0, per=jpfq.scale.PerChannel()), W, jpfq.Integer(4))
    np.testing.assert_array_equal(quantile.step, lay(jpfq.scale.AbsMax(), W, jpfq.Integer(4)).step)


@pytest.mark.parametrize(
    "scale", [jpfq.scale.AbsMax(), jpfq.scale.Quantile(0.9), jpfq.scale.Median(), jpfq.scale.MinMSE()], ids=repr
)
def test_zero_weights_have_a_zero_step(scale):
    levels = lay(scale, jnp.zeros((N, OUT)), jpfq.Integer(4))
    assert (levels.step == 0).all()
    assert (levels.decode(levels.encode(jnp.zeros((N, OUT)))) == 0).all()


def test_zero_weights_on_the_fitted_grid():
    levels = lay(jpfq.scale.MinMSE(), jnp.zeros((N, OUT)), jpfq.Asymmetric(3))
    assert (levels.step == 0).all()
    assert jnp.isfinite(levels.zero).all()


@pytest.mark.parametrize("value", [0, 0.0, -1, "1"])
@pytest.mark.parametrize(
    "make",
    [jpfq.scale.AbsMax, lambda c: jpfq.scale.Quantile(c=c), jpfq.scale.Median, jpfq.scale.MinMSE, jpfq.scale.Fixed],
)
def test_factors_are_positive(make, value):
    with pytest.raises(ValueError, match="must be a positive number; got"):
        make(value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jpfq.scale.Quantile(0), r"share p in \(0, 1\]; got 0"),
        (lambda: jpfq.scale.Quantile(1.01), r"share p in \(0, 1\]; got 1.01"),
        (lambda: jpfq.scale.MinMSE(candidates=1), "two candidates or more; got 1"),
        (lambda: jpfq.scale.MinMSE(candidates=2.5), "two candidates or more; got 2.5"),
        (lambda: jpfq.scale.MinMSE(least=1.0), r"least share in \(0, 1\); got 1"),
        (lambda: jpfq.scale.MinMSE(least=0), r"least share in \(0, 1\); got 0"),
        (lambda: jpfq.scale.MinError(candidates=1), "two candidates or more; got 1"),
        (lambda: jpfq.scale.MinError(rounds=0), "one round or more; got 0"),
        (lambda: jpfq.scale.MinError(least=0), "a multiple must be a positive number; got 0"),
        (lambda: jpfq.scale.MinError(least=1.0, most=0.5), "from least to most; got 1.0 to 0.5"),
        (lambda: jpfq.scale.MinError(jpfq.scale.MinError()), "multiples of a plain scale, not of another search"),
        (lambda: jpfq.scale.AbsMax(jpfq.scale.PerGroup(4)), "the factor c must be a positive number; got PerGroup"),
        (lambda: jpfq.scale.PerBlock(4, 0), "positive numbers of inputs and of neurons; got neurons=0"),
        (lambda: jpfq.scale.PerGroup(0), "positive number of input coordinates; got 0"),
        (lambda: jpfq.scale.PerGroup(2.5), "positive number of input coordinates; got 2.5"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("scale", "grid", "message"),
    [
        (
            jpfq.scale.AbsMax(per=jpfq.scale.PerGroup(5)),
            jpfq.Integer(4),
            r"PerGroup\(5\) does not divide its 12 inputs.*PerChannel",
        ),
        (
            jpfq.scale.AbsMax(per=jpfq.scale.PerBlock(4, 3)),
            jpfq.Integer(4),
            r"PerBlock\(4, 3\) does not divide its 12 inputs by 4 neurons.*PerChannel",
        ),
        (jpfq.scale.Median(), jpfq.Asymmetric(4), "Asymmetric needs two ends: use AbsMax, Quantile or MinMSE"),
        (jpfq.scale.AbsMax(), jpfq.Infinite(), r"Infinite has no largest level.*Fixed\(step\)"),
        (jpfq.scale.MinMSE(), jpfq.Infinite(), r"Infinite has no largest level.*Fixed\(step\)"),
        (jpfq.scale.Quantile(), jpfq.Infinite(), r"Infinite has no largest level.*Fixed\(step\)"),
        (jpfq.scale.Fixed(0.1), jpfq.Asymmetric(4), "no zero point, which Asymmetric needs"),
        (jpfq.scale.Fixed(np.ones(3, np.float32)), jpfq.Integer(4), r"step of shape \(3,\); a kernel of 4 neurons"),
        (jpfq.scale.Fixed(np.ones((1, 1, 4), np.float32)), jpfq.Integer(4), r"step of shape \(1, 1, 4\)"),
        (jpfq.scale.Fixed(np.ones((5, 4), np.float32)), jpfq.Integer(4), "5 groups, which do not divide 12"),
    ],
)
def test_what_does_not_fit_together(scale, grid, message):
    with pytest.raises(ValueError, match=message):
        scale(jnp.asarray(weights(7, np.float32)), grid)


def test_one_trace_serves_all_numbers():
    traces = []

    @jax.jit
    def steps(scale, W, grid):
        traces.append(scale)
        return scale(W, grid).step

    W = jnp.asarray(weights(8, np.float32))
    found = np.stack([steps(jpfq.scale.AbsMax(c), W, jpfq.Integer(bits)) for c, bits in ((1.0, 4), (0.5, 4), (0.5, 8))])
    assert len(traces) == 1
    np.testing.assert_allclose(found[1], found[0] / 2, rtol=1e-6)
    np.testing.assert_allclose(found[2], found[1] * 7 / 127, rtol=1e-6)
    steps(jpfq.scale.AbsMax(1.0, per=jpfq.scale.PerTensor()), W, jpfq.Integer(4))
    assert len(traces) == 2  # which weights share a step is a size, not a number


@pytest.mark.parametrize(
    ("make", "numbers"),
    [
        (lambda c: (jpfq.scale.AbsMax(c), jpfq.Integer(4)), jnp.array([0.5, 1.0, 2.0])),
        (lambda c: (jpfq.scale.Median(c), jpfq.Ternary()), jnp.array([0.5, 1.0, 2.0])),
        (lambda p: (jpfq.scale.Quantile(p), jpfq.Integer(4)), jnp.array([0.5, 0.9, 1.0])),
        (lambda p: (jpfq.scale.MinMSE(least=p), jpfq.Integer(4)), jnp.array([0.2, 0.5])),
        (lambda bits: (jpfq.scale.MinMSE(), jpfq.Integer(bits)), jnp.array([2, 3, 8])),
        (lambda bits: (jpfq.scale.AbsMax(), jpfq.Asymmetric(bits)), jnp.array([1, 3, 8])),
        (lambda K: (jpfq.scale.AbsMax(), jpfq.Symmetric(K)), jnp.array([1, 4])),
        (lambda M: (jpfq.scale.AbsMax(), jpfq.Equispaced(M)), jnp.array([2, 3, 16])),
    ],
    ids=["AbsMax c", "Median c", "Quantile p", "MinMSE least", "bits", "Asymmetric bits", "K", "M"],
)
def test_vmap_over_numbers_is_the_loop(make, numbers):
    W = jnp.asarray(weights(9, np.float32))

    @jax.jit
    def laid(x):
        scale, grid = make(x)
        return scale(W, grid)

    mapped = jax.jit(jax.vmap(laid))(numbers)
    for i, x in enumerate(numbers):
        alone = laid(x)
        assert_close(mapped.step[i], alone.step)
        np.testing.assert_array_equal(mapped.zero[i], alone.zero)
        assert (mapped.lo[i], mapped.hi[i]) == (alone.lo, alone.hi)


@pytest.mark.parametrize("scale", [jpfq.scale.AbsMax, jpfq.scale.MinMSE, jpfq.scale.Quantile, jpfq.scale.Median])
def test_a_block_has_the_step_of_its_weights_alone(scale):
    """PerBlock(size, neurons): that of one tensor of size by neurons weights."""
    W = jnp.asarray(np.random.default_rng(0).standard_normal((12, 6)), jnp.float32)
    steps = scale(per=jpfq.scale.PerBlock(4, 3))(W, jpfq.Integer(4)).step
    one = scale(per=jpfq.scale.PerBlock(4, 3)) if scale is jpfq.scale.Quantile else scale(per=jpfq.scale.PerTensor())
    assert steps.shape == (3, 2)
    for i, j in np.ndindex(3, 2):
        block = W[4 * i : 4 * i + 4, 3 * j : 3 * j + 3]
        np.testing.assert_allclose(steps[i, j], one(block, jpfq.Integer(4)).step[0, 0], rtol=3e-7)

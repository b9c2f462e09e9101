"""Finishers: the published descents exactly, free scales, and an error that never grows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from jpfq.matrix import Recursion
from tests.helpers import assert_close, assert_codes_equal, level_lists, problem, recursed
from tests.reference import finish as reference

N, OUT, SIZE = 40, 6, 8
DEAD = (0, 7, 39)
GRIDS = {
    "Integer(3)": (jpfq.Integer(3), jpfq.scale.PerChannel()),
    "Ternary, tensor": (jpfq.Ternary(), jpfq.scale.PerTensor()),
    "Asymmetric(2), groups": (jpfq.Asymmetric(2), jpfq.scale.PerGroup(SIZE)),
    "Offset(2), groups": (jpfq.Offset(2), jpfq.scale.PerGroup(SIZE)),
    "Binary": (jpfq.Binary(), jpfq.scale.PerChannel()),
    "E2M1": (jpfq.E2M1(), jpfq.scale.PerChannel()),
}
DESCENTS = {
    "Descend": (jpfq.finish.Descend, reference.coordinate_descent),
    "Cosine": (jpfq.finish.CosineDescend, reference.cosine_descent),
}


@functools.partial(jax.jit, static_argnames="block")
def finished(finish, W, gram, codes, levels, order, block=None):
    recursion = Recursion(levels, order, W.shape[1], jpfq.rounding.Nearest())
    codes, levels = finish(W, gram, codes, recursion, block)
    return codes, levels, recursion._replace(levels=levels).values(codes)


def case(name, seed=81, *, drift=0.2, dead=DEAD, permuted=False):
    """X, Xq, W in the order p, their Gram, levels, and the codes that GPFQ starts from."""
    X, Xq, W = problem(seed, n=N, out=OUT, drift=drift, dead=dead)
    grid, per = GRIDS[name]
    levels = jpfq.scale.AbsMax(0.7, per)(jnp.asarray(W), grid)
    p = np.random.default_rng(seed).permutation(N) if permuted else np.arange(N)
    X, Xq, W = X[:, p], Xq[:, p], jnp.asarray(W[p])
    gram = jpfq.Gram.from_data(X, Xq) if drift else jpfq.Gram.from_data(Xq)
    return X, Xq, W, gram, levels, recursed(jpfq.GPFQ()(W, gram), levels, p).codes, p


@pytest.mark.parametrize("permuted", [False, True], ids=["natural", "permuted"])
@pytest.mark.parametrize("drift", [0, 0.2])
# The cosine is about a step of each neuron's own.
@pytest.mark.parametrize(
    ("descent", "name"), [(d, name) for d in DESCENTS for name in GRIDS if (d, name) != ("Cosine", "Ternary, tensor")]
)
def test_descents_are_the_published_ones(x64, descent, name, drift, permuted):
    """Three passes, one by one. Both keep what every code means up to one factor per neuron."""
    X, Xq, W, gram, levels, codes, p = case(name, drift=drift, permuted=permuted)
    make, passes = DESCENTS[descent]
    lists = level_lists(levels, W.shape)[p]
    value = lambda codes: np.take_along_axis(lists, np.asarray(codes - levels.lo, int)[..., None], -1)[..., 0]
    expected = passes(value(codes), W, X, Xq, lists, 3)
    found, now = codes, levels
    for _ in range(3):
        found, now, _ = finished(make(1), W, gram, found, now, p)
    np.testing.assert_allclose(value(found), expected, atol=1e-12)
    assert (np.asarray(found) != np.asarray(codes)).any()
    if descent == "Descend":
        np.testing.assert_array_equal(now.step, levels.step)
    else:
        assert_close(
            now.step / levels.step, np.broadcast_to(reference.free_scale(expected, W, X, Xq), levels.step.shape)
        )


@pytest.mark.parametrize("descent", DESCENTS)
def test_passes_are_turns_of_one_loop(x64, descent):
    *_, W, gram, levels, codes, p = case("Integer(3)")
    make, _ = DESCENTS[descent]
    at_once = finished(make(3), W, gram, codes, levels, p)
    for block in (None, 16):
        found, now = codes, levels
        for _ in range(3):
            found, now, values = finished(make(1), W, gram, found, now, p, block)
        assert_codes_equal(found, at_once[0])
        assert_close(values, at_once[2])


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("descent", DESCENTS)
def test_the_error_never_grows(x64, descent, name):
    make, _ = DESCENTS[descent]
    for seed in range(5):
        X, Xq, W, gram, levels, codes, p = case(name, seed, drift=0.3)
        q = Recursion(levels, p, OUT, jpfq.rounding.Nearest()).values(codes)
        errors = [np.linalg.norm(X @ W - Xq @ np.asarray(q), axis=0)]
        for _ in range(4):
            codes, levels, q = finished(make(1), W, gram, codes, levels, p)
            errors.append(np.linalg.norm(X @ W - Xq @ np.asarray(q), axis=0))
        total = np.linalg.norm(errors, axis=1)
        assert (np.diff(total) <= 1e-10 * total[0]).all()
        if name != "Ternary, tensor" or descent == "Descend":  # a step of its own for each neuron, or none that moves
            assert (np.diff(errors, axis=0) <= 1e-10 * total[0]).all()
        assert total[-1] < 0.99 * total[0]


@pytest.mark.parametrize("name", GRIDS)
def test_refit(x64, name):
    X, Xq, W, gram, levels, codes, p = case(name, permuted=True)
    same, now, values = finished(jpfq.finish.Refit(), W, gram, codes, levels, p)
    assert_codes_equal(same, codes)
    q = np.asarray(Recursion(levels, p, OUT, jpfq.rounding.Nearest()).values(codes))
    factor = reference.free_scale(q, W, X, Xq)
    if levels.step.shape[1] == 1:  # one factor for all neurons
        factor = ((X @ np.asarray(W)) * (Xq @ q)).sum() / ((Xq @ q) ** 2).sum()
    assert_close(now.step, np.broadcast_to(np.asarray(levels.step) * factor, levels.step.shape))
    assert_close(values, q * factor)
    if levels.offset:
        assert_close(now.zero / levels.zero, now.step / levels.step)
    else:
        np.testing.assert_array_equal(now.zero, levels.zero)


def test_a_step_that_should_be_negative_stays(x64):
    *_, W, gram, levels, codes, p = case("Integer(3)", drift=0, dead=())
    flipped = codes.at[:, 2].multiply(-1)
    _, now, _ = finished(jpfq.finish.Refit(), W, gram, flipped, levels, p)
    assert now.step[0, 2] == levels.step[0, 2]
    assert now.step[0, 3] != levels.step[0, 3]
    nothing = finished(jpfq.finish.Refit(), W, gram, 0 * codes, levels, p)[1]
    np.testing.assert_array_equal(nothing.step, levels.step)


@pytest.mark.parametrize("descent", DESCENTS)
def test_a_neuron_of_zeros_is_revived(x64, descent):
    X, Xq, W, gram, levels, codes, p = case("Ternary, tensor", drift=0.2)
    codes = codes.at[:, 3].set(0)
    make, _ = DESCENTS[descent]
    found, _, q = finished(make(1), W, gram, codes, levels, p)
    assert (np.asarray(found)[:, 3] != 0).any()
    error = np.linalg.norm(X @ np.asarray(W) - Xq @ np.asarray(q), axis=0) / np.linalg.norm(X @ np.asarray(W), axis=0)
    assert error[3] < 0.9


@pytest.mark.parametrize("descent", DESCENTS)
def test_after_stochastic_rounding(x64, descent):
    """Codes that were drawn are settled by the nearest level: dead coordinates and all end on the grid, and lower."""
    X, Xq, W, gram, levels, *_, p = case("Integer(3)")
    drawn = recursed(jpfq.GPFQ()(W, gram), levels, p, jpfq.rounding.Stochastic(), jax.random.key(0))
    make, _ = DESCENTS[descent]
    codes, _, q = finished(make(3), W, gram, drawn.codes, levels, p)
    assert ((codes >= levels.lo) & (codes <= levels.hi) & (codes == jnp.round(codes))).all()
    error = lambda q: np.linalg.norm(X @ np.asarray(W) - Xq @ np.asarray(q), axis=0)
    assert (error(q) < error(drawn.q)).all()
    assert np.linalg.norm(error(q)) < 0.8 * np.linalg.norm(error(drawn.q))


def test_what_a_finisher_changes():
    changes = {
        jpfq.finish.Refit(): (False, True),
        jpfq.finish.Descend(): (True, False),
        jpfq.finish.CosineDescend(): (True, True),
    }
    for finish, expected in changes.items():
        assert (finish.descends, finish.frees_step) == expected

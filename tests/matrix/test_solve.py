"""solve: the published codes end to end, exactly in float64 and but for ties in float32; Info, forms, edges."""

import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from jpfq.matrix import recipe_of
from tests.helpers import (
    PLAIN,
    Dither,
    assert_close,
    assert_codes_equal,
    assert_codes_equal_but_for_ties,
    problem,
    problem32,
)
from tests.reference import gpfq as reference

N, OUT, SIZE = 40, 6, 8
DEAD = (3, 17)
GPFQ = PLAIN | {"method": jpfq.GPFQ()}

# grid, (codes, zero) and reach of the reference
GRIDS = {
    "Symmetric(8)": (jpfq.Symmetric(8), reference.symmetric(8), 8),
    "Integer(3)": (jpfq.Integer(3), reference.integer(3), 3),
    "Integer(3, narrow)": (jpfq.Integer(3, narrow=True), reference.integer(3, narrow=True), 3),
    "Ternary": (jpfq.Ternary(), reference.ternary(), 1),
    "Binary": (jpfq.Binary(), reference.binary(), 0.5),
    "Equispaced(4)": (jpfq.Equispaced(4), reference.equispaced(4), 1.5),
    "Asymmetric(3)": (jpfq.Asymmetric(3), reference.unsigned(3), None),
}
each_grid = pytest.mark.parametrize("name", GRIDS)
each_form = pytest.mark.parametrize("form", ["gram", "data"])


def laid(W, name, per, c):
    """Steps, zeros and level lists of AbsMax(c), by plain loops."""
    _, (codes, zero), reach = GRIDS[name]
    sets = reference.sets(W, per, SIZE)
    shape = tuple(1 + max(at[axis] for at in sets) for axis in (0, 1))
    step, zeros = np.zeros(shape), np.full(shape, np.nan if zero is None else zero)
    for at, w in sets.items():
        if zero is None:
            step[at], zeros[at] = reference.minmax(c * w.min(), c * w.max(), int(np.log2(len(codes))))
        else:
            step[at] = reference.absmax(w, c) / reach
    return step, zeros, reference.level_lists(W.shape, step, codes, zeros)


def data_of(X, Xq, form):
    rows = jpfq.Rows(jnp.asarray(X), None if Xq is X else jnp.asarray(Xq))
    return rows if form == "data" else rows.gram()


@each_form
@each_grid
def test_codes_are_the_published_ones(x64, name, form):
    X, Xq, W = problem(21, n=N, out=OUT, dead=DEAD)
    step, zeros, levels = laid(W, name, "channel", 0.8)
    expected = reference.gpfq_state(W, X, Xq, levels)
    settings = GPFQ | {"grid": GRIDS[name][0], "scale": jpfq.scale.AbsMax(0.8), "form": form, "block": 16}
    tensor, info = jpfq.solve(W, data_of(X, Xq, form), **settings)
    assert_codes_equal(tensor.codes, expected.index + GRIDS[name][1][0][0])
    assert_close(tensor.dequantize(), expected.q)
    assert_close(tensor.step, step)
    assert_codes_equal(tensor.zero, zeros)
    assert_close(info.relative_error, reference.relative_error(X, W, Xq, expected.q))
    assert_close(info.square_error, ((X @ W - Xq @ expected.q) ** 2).sum())
    assert_close(info.energy, ((X @ W) ** 2).sum())
    lowest, highest = levels[..., 0], levels[..., -1]
    width = np.broadcast_to(step, W.shape)
    beyond = (expected.argument < lowest - width / 2) | (expected.argument > highest + width / 2)
    assert_close(info.saturation, beyond.mean(), scale=1)
    assert 0 < info.saturation < 1
    assert_close(info.sparsity, (expected.q == 0).mean(), scale=1)
    assert_close(info.entropy, reference.entropy(expected.index), scale=1)
    assert info.dead == len(DEAD)
    assert info.zero_steps == 0


@each_form
@pytest.mark.parametrize("name", ["Symmetric(8)", "Binary"])
def test_where_the_networks_agree(x64, name, form):
    X, _, W = problem(22, n=N, out=OUT, drift=0)
    expected = reference.gpfq_state(W, X, X, laid(W, name, "tensor", 0.7)[2])
    settings = GPFQ | {
        "grid": GRIDS[name][0],
        "scale": jpfq.scale.AbsMax(0.7, per=jpfq.scale.PerTensor()),
        "form": form,
    }
    tensor, info = jpfq.solve(W, data_of(X, X, form), **settings)
    assert_codes_equal(tensor.codes, expected.index + GRIDS[name][1][0][0])
    assert_close(info.relative_error, reference.relative_error(X, W, X, expected.q))
    assert form == "data" or info.relative_floor == 0


@pytest.mark.slow
@each_form
def test_descending_is_the_permuted_problem_put_back(x64, form):
    """Each coordinate keeps the step of its own group: that of its place in the kernel."""
    X, Xq, W = problem(23, n=N, out=OUT, dead=DEAD)
    _, _, levels = laid(W, "Integer(3)", "group", 0.8)
    p = np.argsort(-(Xq**2).sum(0), kind="stable")
    expected = reference.in_order(reference.gpfq_state, p, W, X, Xq, levels=levels)
    settings = {
        "grid": jpfq.Integer(3),
        "scale": jpfq.scale.AbsMax(0.8, per=jpfq.scale.PerGroup(SIZE)),
        "form": form,
        "block": 16,
    }
    settings = GPFQ | settings
    tensor, info = jpfq.solve(W, data_of(X, Xq, form), **settings | {"order": jpfq.order.Descending()})
    assert_codes_equal(tensor.codes, expected.index - 4)
    assert_close(tensor.dequantize(), expected.q)
    assert_close(info.relative_error, reference.relative_error(X, W, Xq, expected.q))
    natural, _ = jpfq.solve(W, data_of(X, Xq, form), **settings)
    assert_codes_equal(natural.codes, reference.gpfq_state(W, X, Xq, levels).index - 4)
    assert (np.asarray(natural.codes) != np.asarray(tensor.codes)).mean() > 0.1


def test_msq_does_not_read_the_data(x64):
    X, Xq, W = problem(24, n=N, out=OUT, dead=DEAD)
    expected = reference.msq(W, laid(W, "Integer(3)", "group", 0.8)[2])
    settings = {
        "grid": jpfq.Integer(3),
        "scale": jpfq.scale.AbsMax(0.8, per=jpfq.scale.PerGroup(SIZE)),
        "method": jpfq.MSQ(),
        "finish": None,
    }
    for order in (jpfq.order.Natural(), jpfq.order.Descending()):
        tensor, info = jpfq.solve(W, data_of(X, Xq, "gram"), order=order, **settings)
        assert_codes_equal(tensor.codes, expected.index - 4)
        assert_close(info.relative_error, reference.relative_error(X, W, Xq, expected.q))


@each_form
def test_a_fine_grid_returns_the_weights(x64, form):
    X, _, W = problem(25, n=N, out=OUT, drift=0)
    settings = GPFQ | {"grid": jpfq.Infinite(), "scale": jpfq.scale.Fixed(2.0**-20), "form": form, "block": 16}
    tensor, info = jpfq.solve(W, data_of(X, X, form), **settings)
    L = np.tril(X.T @ X, -1) / (X**2).sum(0)[:, None]
    error = np.abs(np.linalg.inv(np.eye(N) + L)).sum(1, keepdims=True) * 2.0**-21  # of e = r - L e with |r| <= step / 2
    assert (np.abs(np.asarray(tensor.dequantize()) - W) <= error * (1 + 1e-6)).all()
    assert error.max() < 1e-5
    assert info.saturation == 0


# Float32


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "order"), [("gram", jpfq.order.Natural()), ("data", jpfq.order.Descending())], ids=["gram", "data"]
)
def test_float32_differs_at_ties_alone(form, order):
    X, Xq, W = (np.float32(x) for x in problem(26, m=256, n=96, out=16, dead=(5,)))
    W64 = np.float64(W)
    step, _, levels = laid(W64, "Symmetric(8)", "channel", 1.0)
    p = (
        np.arange(96)
        if isinstance(order, jpfq.order.Natural)
        else np.argsort(-(np.float64(Xq) ** 2).sum(0), kind="stable")
    )
    expected = reference.in_order(reference.gpfq_state, p, W64, X, Xq, levels=levels)
    settings = GPFQ | {"grid": jpfq.Symmetric(8), "scale": jpfq.scale.AbsMax(), "order": order, "form": form}
    tensor, info = jpfq.solve(W, data_of(X, Xq, form), **settings)
    assert_codes_equal_but_for_ties(tensor.codes, expected.index - 8, expected.argument / step, order=p)
    direct = reference.relative_error(X, W, Xq, tensor.dequantize())
    assert_close(info.relative_error, direct)


def test_the_helper_for_ties_sees_errors():
    codes, position = np.zeros((1000, 1)), np.full((1000, 1), 0.2)
    wrong = codes.copy()
    wrong[5:] = 1
    with pytest.raises(AssertionError, match="steps from a tie"):
        assert_codes_equal_but_for_ties(wrong, codes, position)
    position[5] = 0.5 - 1e-6
    assert_codes_equal_but_for_ties(wrong, codes, position)
    with pytest.raises(AssertionError, match="more than one level"):
        assert_codes_equal_but_for_ties(2 * wrong, codes, position)
    with pytest.raises(AssertionError, match="met a tie"):
        assert_codes_equal_but_for_ties(wrong[:100], codes[:100], position[:100])


@pytest.mark.slow
@each_form
def test_low_precision_data_are_widened_first(form):
    X, Xq, W = problem(27, n=N, out=OUT)
    X, Xq = jnp.asarray(X, jnp.bfloat16), jnp.asarray(Xq, jnp.bfloat16)
    low, _ = jpfq.solve(np.float32(W), data_of(X, Xq, form), bits=4, form=form, **GPFQ)
    wide = data_of(X.astype(jnp.float32), Xq.astype(jnp.float32), form)
    assert_codes_equal(low.codes, jpfq.solve(np.float32(W), wide, bits=4, form=form, **GPFQ)[0].codes)


# What path following is for


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("grid", [jpfq.Ternary(), jpfq.Integer(3)], ids=str)
def test_path_following_has_less_output_error_and_more_weight_error(seed, grid):
    W, gram = problem32(40 + seed, m=4 * N)
    output, weight = {}, {}
    for method in (jpfq.GPFQ(), jpfq.MSQ()):
        tensor, info = jpfq.solve(W, gram, grid=grid, **PLAIN, method=method)
        output[type(method)] = info.relative_error
        weight[type(method)] = jnp.sum((W - tensor.dequantize()) ** 2)
    assert output[jpfq.GPFQ] < output[jpfq.MSQ]
    assert weight[jpfq.MSQ] < weight[jpfq.GPFQ]


def test_more_bits_have_less_error():
    X, _, W = (jnp.asarray(x, jnp.float32) for x in problem(45, n=N, out=OUT, drift=0))
    gram = jpfq.Gram.from_data(X)
    errors = [float(jpfq.solve(W, gram, bits=bits, **GPFQ)[1].relative_error) for bits in (2, 3, 4, 6, 8)]
    assert all(b < 0.75 * a for a, b in itertools.pairwise(errors))


# Forms


@pytest.mark.slow
def test_many_more_inputs_than_rows_take_the_data_form(monkeypatch):
    X, Xq, W = (jnp.asarray(x, jnp.float32) for x in problem(50, m=8, n=128, out=4))
    rows = jpfq.Rows(X, Xq)
    module, taken = importlib.import_module("jpfq.matrix.stages"), []
    for name in ("follow", "substitute"):
        true = getattr(module, name)
        noted = lambda *args, _name=name, _true=true, **settings: (taken.append(_name), _true(*args, **settings))[1]
        monkeypatch.setattr(module, name, noted)
    by_rows, info = jpfq.solve(W, rows, bits=4, block=16, **GPFQ)
    assert taken == ["follow"]
    by_gram, gram_info = jpfq.solve(W, rows.gram(), bits=4, block=16, **GPFQ)
    assert taken == ["follow", "substitute"]
    assert_codes_equal(by_rows.codes, by_gram.codes)
    assert_close(info.relative_error, gram_info.relative_error)


def test_many_more_rows_than_inputs_take_the_gram_form():
    recipe = lambda **settings: recipe_of(4, None, **GPFQ | {"block": 16} | settings)
    assert recipe().prefers_rows(8, 128, 4)
    assert not recipe().prefers_rows(4096, 128, 4)
    assert recipe(form="data").prefers_rows(4096, 128, 4)
    assert not recipe(form="gram").prefers_rows(8, 128, 4)
    for part in ({"method": jpfq.OPTQ()}, {"finish": jpfq.finish.Refit()}, {"scale": jpfq.scale.MinError()}):
        assert not recipe(**part).prefers_rows(8, 128, 4)


# Edges


@pytest.mark.slow
@each_form
def test_a_neuron_of_zeros_gives_zeros(form):
    X, Xq, W = (np.float32(x) for x in problem(51, n=N, out=OUT))
    W = W.copy()
    W[:, 2] = 0
    for grid in (jpfq.Integer(4), jpfq.Asymmetric(4), jpfq.Binary()):
        tensor, info = jpfq.solve(W, data_of(X, Xq, form), grid=grid, form=form, **GPFQ)
        q = np.asarray(tensor.dequantize())
        assert np.isfinite(q).all()
        assert not q[:, 2].any()
        assert q[:, 3].any()
        assert np.isfinite(info.relative_error)


@pytest.mark.parametrize("settings", [GPFQ, {}], ids=["GPFQ", "recommended"])
def test_inputs_that_are_all_zero_are_refused(settings):
    W = np.float32(problem(52, n=N, out=OUT)[2])
    with pytest.raises(ValueError, match="show nothing: all its inputs are 0"):
        jpfq.solve(W, jpfq.Gram.from_data(np.zeros((64, N), np.float32)), bits=4, **settings)


def test_a_random_rounding_needs_a_key():
    W, gram = problem32(54)
    with pytest.raises(ValueError, match="random numbers: pass key="):
        jpfq.solve(W, gram, bits=4, rounding=Dither())
    settings = {"bits": 4, "scale": jpfq.scale.AbsMax(), "rounding": Dither(), "method": jpfq.MSQ()}
    first, _ = jpfq.solve(W, gram, key=jax.random.key(0), **settings)
    again, _ = jpfq.solve(W, gram, key=jax.random.key(0), order=jpfq.order.Descending(), **settings)
    other, _ = jpfq.solve(W, gram, key=jax.random.key(1), **settings)
    assert_codes_equal(first.codes, again.codes)
    assert (np.asarray(first.codes) != np.asarray(other.codes)).mean() > 0.1

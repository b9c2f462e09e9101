"""solve: the published codes end to end, exactly in float64 and but for ties in float32; sweeps, Info, forms, bad input."""

import importlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from jpfq.matrix import Recipe, solve_all
from tests.helpers import (
    Dither,
    assert_close,
    assert_codes_equal,
    assert_codes_equal_but_for_ties,
    problem,
)
from tests.reference import gpfq as reference

N, OUT, SIZE = 40, 6, 8
DEAD = (3, 17)

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
    tensor, info = jpfq.solve(W, data_of(X, Xq, form), grid=GRIDS[name][0], scale=jpfq.AbsMax(0.8), form=form, block=16)
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
    settings = {"grid": GRIDS[name][0], "scale": jpfq.AbsMax(0.7, per=jpfq.PerTensor()), "form": form}
    tensor, info = jpfq.solve(W, data_of(X, X, form), **settings)
    assert_codes_equal(tensor.codes, expected.index + GRIDS[name][1][0][0])
    assert_close(info.relative_error, reference.relative_error(X, W, X, expected.q))


@each_form
def test_descending_is_the_permuted_problem_put_back(x64, form):
    """Each coordinate keeps the step of its own group: that of its place in the kernel."""
    X, Xq, W = problem(23, n=N, out=OUT, dead=DEAD)
    _, _, levels = laid(W, "Integer(3)", "group", 0.8)
    p = np.argsort(-(Xq**2).sum(0), kind="stable")
    expected = reference.in_order(reference.gpfq_state, p, W, X, Xq, levels=levels)
    settings = {"grid": jpfq.Integer(3), "scale": jpfq.AbsMax(0.8, per=jpfq.PerGroup(SIZE)), "form": form, "block": 16}
    tensor, info = jpfq.solve(W, data_of(X, Xq, form), order=jpfq.Descending(), **settings)
    assert_codes_equal(tensor.codes, expected.index - 4)
    assert_close(tensor.dequantize(), expected.q)
    assert_close(info.relative_error, reference.relative_error(X, W, Xq, expected.q))
    natural, _ = jpfq.solve(W, data_of(X, Xq, form), **settings)
    assert_codes_equal(natural.codes, reference.gpfq_state(W, X, Xq, levels).index - 4)
    assert (np.asarray(natural.codes) != np.asarray(tensor.codes)).mean() > 0.1


def test_msq_does_not_read_the_data(x64):
    X, Xq, W = problem(24, n=N, out=OUT, dead=DEAD)
    expected = reference.msq(W, laid(W, "Integer(3)", "group", 0.8)[2])
    settings = {"grid": jpfq.Integer(3), "scale": jpfq.AbsMax(0.8, per=jpfq.PerGroup(SIZE)), "method": jpfq.MSQ()}
    for order in (jpfq.Natural(), jpfq.Descending()):
        tensor, info = jpfq.solve(W, data_of(X, Xq, "gram"), order=order, **settings)
        assert_codes_equal(tensor.codes, expected.index - 4)
        assert_close(info.relative_error, reference.relative_error(X, W, Xq, expected.q))


@each_form
def test_a_fine_grid_returns_the_weights(x64, form):
    X, _, W = problem(25, n=N, out=OUT, drift=0)
    tensor, info = jpfq.solve(
        W, data_of(X, X, form), grid=jpfq.Infinite(), scale=jpfq.Fixed(2.0**-20), form=form, block=16
    )
    L = np.tril(X.T @ X, -1) / (X**2).sum(0)[:, None]
    error = np.abs(np.linalg.inv(np.eye(N) + L)).sum(1, keepdims=True) * 2.0**-21  # of e = r - L e with |r| <= step / 2
    assert (np.abs(np.asarray(tensor.dequantize()) - W) <= error * (1 + 1e-6)).all()
    assert error.max() < 1e-5
    assert info.saturation == 0


# Float32


@pytest.mark.parametrize(
    ("form", "order"), [("gram", jpfq.Natural()), ("data", jpfq.Descending())], ids=["gram", "data"]
)
def test_float32_differs_at_ties_alone(form, order):
    X, Xq, W = (np.float32(x) for x in problem(26, m=256, n=96, out=16, dead=(5,)))
    W64 = np.float64(W)
    step, _, levels = laid(W64, "Symmetric(8)", "channel", 1.0)
    p = np.arange(96) if isinstance(order, jpfq.Natural) else np.argsort(-(np.float64(Xq) ** 2).sum(0), kind="stable")
    expected = reference.in_order(reference.gpfq_state, p, W64, X, Xq, levels=levels)
    tensor, info = jpfq.solve(
        W, data_of(X, Xq, form), grid=jpfq.Symmetric(8), scale=jpfq.AbsMax(), order=order, form=form
    )
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


@each_form
def test_low_precision_data_are_widened_first(form):
    X, Xq, W = problem(27, n=N, out=OUT)
    X, Xq = jnp.asarray(X, jnp.bfloat16), jnp.asarray(Xq, jnp.bfloat16)
    low, _ = jpfq.solve(np.float32(W), data_of(X, Xq, form), bits=4, form=form)
    wide = data_of(X.astype(jnp.float32), Xq.astype(jnp.float32), form)
    assert_codes_equal(low.codes, jpfq.solve(np.float32(W), wide, bits=4, form=form)[0].codes)


# Sweeps, jit, compilations


def problem32(seed=30, **kwargs):
    X, Xq, W = (jnp.asarray(x, jnp.float32) for x in problem(seed, n=N, out=OUT, **kwargs))
    return W, jpfq.Gram.from_data(X, Xq)


def test_vmap_over_numbers_is_the_loop():
    """Over the width of the grid and the factor of the scale at once."""
    W, gram = problem32()
    run = lambda bits, c: jpfq.solve(W, gram, grid=jpfq.Integer(bits), scale=jpfq.AbsMax(c))
    numbers = [(2, 1.0), (3, 0.5), (3, 1.0), (8, 0.9)]
    tensors, infos = jax.vmap(run)(*(jnp.array(x) for x in zip(*numbers, strict=True)))
    for i, (bits, c) in enumerate(numbers):
        tensor, info = run(bits, c)
        assert_codes_equal(tensors.codes[i], tensor.codes)
        assert_close(tensors.step[i], tensor.step)
        assert_close(infos.relative_error[i], info.relative_error)


def test_several_matrices_at_once_are_the_loop():
    cases = [problem32(seed) for seed in (31, 32, 33)]
    W, grams = jax.tree.map(lambda *x: jnp.stack(x), *cases)
    recipe = Recipe(jpfq.Integer(3))
    together = solve_all(W, grams, recipe, None)
    alone = [jpfq.solve(W, gram, bits=3) for W, gram in cases]
    for i, (tensor, _) in enumerate(alone):
        assert_codes_equal(together.codes[i], tensor.codes)
        assert_close(together.step[i], tensor.step)
    joined = jpfq.Info.join([info for _, info in alone])
    for name in ("square_error", "energy", "saturation", "dead", "sparsity"):
        assert_close(getattr(together.info, name).astype(jnp.float32), getattr(joined, name))
    assert_close(together.info.entropy, reference.entropy(together.codes), scale=1)


def test_matrices_share_a_step_per_tensor():
    cases = [problem32(seed) for seed in (31, 32, 33)]
    W, grams = jax.tree.map(lambda *x: jnp.stack(x), *cases)
    recipe = Recipe(jpfq.Integer(3), scale=jpfq.AbsMax(per=jpfq.PerTensor()))
    found = solve_all(W, grams, recipe, None)
    assert found.step.shape == (1, 1, 1)
    assert_close(found.step, np.abs(W).max().reshape(1, 1, 1) / 3)
    assert_close(found.q, found.step * found.codes)


def test_jit_of_solve():
    W, gram = problem32()
    tensor, info = jax.jit(lambda W, gram: jpfq.solve(W, gram, bits=4))(W, gram)
    expected, expected_info = jpfq.solve(W, gram, bits=4)
    assert_codes_equal(tensor.codes, expected.codes)
    assert (tensor.codes.dtype, tensor.dtype) == (expected.codes.dtype, expected.dtype)
    assert_close(info.relative_error, expected_info.relative_error)


def test_one_compilation_serves_equal_shapes():
    compiled = importlib.import_module("jpfq.matrix.solve")._solve_all
    W, gram = problem32()
    jpfq.solve(W, gram, bits=4, scale=jpfq.AbsMax())
    before = compiled._cache_size()
    other_W, other_gram = problem32(34)
    for c, grid in ((0.5, jpfq.Integer(2)), (1.0, jpfq.Integer(8)), (0.9, jpfq.Ternary()), (1.1, jpfq.Equispaced(4))):
        jpfq.solve(other_W, other_gram, grid=grid, scale=jpfq.AbsMax(c))
    jpfq.solve(W.astype(jnp.bfloat16), gram, bits=3, scale=jpfq.AbsMax())
    assert compiled._cache_size() == before
    jpfq.solve(W, gram, bits=4, scale=jpfq.AbsMax(), block=7)
    assert compiled._cache_size() == before + 1


# What path following is for


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("grid", [jpfq.Ternary(), jpfq.Integer(3)], ids=str)
def test_path_following_has_less_output_error_and_more_weight_error(seed, grid):
    W, gram = problem32(40 + seed, m=4 * N)
    output, weight = {}, {}
    for method in (jpfq.GPFQ(), jpfq.MSQ()):
        tensor, info = jpfq.solve(W, gram, grid=grid, method=method)
        output[type(method)] = info.relative_error
        weight[type(method)] = jnp.sum((W - tensor.dequantize()) ** 2)
    assert output[jpfq.GPFQ] < output[jpfq.MSQ]
    assert weight[jpfq.MSQ] < weight[jpfq.GPFQ]


def test_more_bits_have_less_error():
    X, _, W = (jnp.asarray(x, jnp.float32) for x in problem(45, n=N, out=OUT, drift=0))
    gram = jpfq.Gram.from_data(X)
    errors = [float(jpfq.solve(W, gram, bits=bits)[1].relative_error) for bits in (2, 3, 4, 6, 8)]
    assert all(b < 0.75 * a for a, b in itertools.pairwise(errors))


# Forms


def test_many_more_inputs_than_rows_take_the_data_form(monkeypatch):
    X, Xq, W = (jnp.asarray(x, jnp.float32) for x in problem(50, m=8, n=128, out=4))
    rows = jpfq.Rows(X, Xq)
    module, taken = importlib.import_module("jpfq.matrix.solve"), []
    for name in ("follow", "substitute"):
        true = getattr(module, name)
        noted = lambda *args, _name=name, _true=true, **settings: (taken.append(_name), _true(*args, **settings))[1]
        monkeypatch.setattr(module, name, noted)
    by_rows, info = jpfq.solve(W, rows, bits=4, block=16)
    assert taken == ["follow"]
    by_gram, gram_info = jpfq.solve(W, rows.gram(), bits=4, block=16)
    assert taken == ["follow", "substitute"]
    assert_codes_equal(by_rows.codes, by_gram.codes)
    assert_close(info.relative_error, gram_info.relative_error)


def test_many_more_rows_than_inputs_take_the_gram_form():
    recipe = Recipe(jpfq.Integer(4), block=16)
    assert recipe.prefers_rows(8, 128, 4)
    assert not recipe.prefers_rows(4096, 128, 4)
    assert not Recipe(jpfq.Integer(4), method=jpfq.MSQ()).prefers_rows(8, 128, 4)
    assert Recipe(jpfq.Integer(4), form="data").prefers_rows(4096, 128, 4)
    assert not Recipe(jpfq.Integer(4), form="gram").prefers_rows(8, 128, 4)


# Edges


@each_form
def test_a_neuron_of_zeros_gives_zeros(form):
    X, Xq, W = (np.float32(x) for x in problem(51, n=N, out=OUT))
    W = W.copy()
    W[:, 2] = 0
    for grid in (jpfq.Integer(4), jpfq.Asymmetric(4), jpfq.Binary()):
        tensor, info = jpfq.solve(W, data_of(X, Xq, form), grid=grid, form=form)
        q = np.asarray(tensor.dequantize())
        assert np.isfinite(q).all()
        assert not q[:, 2].any()
        assert q[:, 3].any()
        assert np.isfinite(info.relative_error)


def test_inputs_that_are_all_zero():
    W = np.float32(problem(52, n=N, out=OUT)[2])
    tensor, info = jpfq.solve(W, jpfq.Gram.from_data(np.zeros((64, N), np.float32)), bits=4)
    assert not np.asarray(tensor.dequantize()).any()
    assert info.relative_error == 0
    assert info.dead == N


def test_a_median_of_zero_under_other_weights():
    W, gram = problem32(53)
    W = W.at[: N - 5].set(0)
    with pytest.raises(ValueError, match=r"Median.*step of zero under weights of the matrix.*AbsMax\(\)"):
        jpfq.solve(W, gram, bits=4, scale=jpfq.Median())


def test_a_random_rounding_needs_a_key():
    W, gram = problem32(54)
    with pytest.raises(ValueError, match="random numbers: pass key="):
        jpfq.solve(W, gram, bits=4, rounding=Dither())
    settings = {"bits": 4, "scale": jpfq.AbsMax(), "rounding": Dither(), "method": jpfq.MSQ()}
    first, _ = jpfq.solve(W, gram, key=jax.random.key(0), **settings)
    again, _ = jpfq.solve(W, gram, key=jax.random.key(0), order=jpfq.Descending(), **settings)
    other, _ = jpfq.solve(W, gram, key=jax.random.key(1), **settings)
    assert_codes_equal(first.codes, again.codes)
    assert (np.asarray(first.codes) != np.asarray(other.codes)).mean() > 0.1


NAN = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c | {"W": c["W"].at[1, 2].set(NAN)}, "W holds NaN or infinity"),
        (lambda c: c | {"W": c["W"].at[1, 2].set(jnp.inf)}, "W holds NaN or infinity"),
        (lambda c: c | {"W": c["W"].astype(jnp.int32)}, r"real floating matrix.*int32"),
        (lambda c: c | {"W": c["W"].astype(jnp.complex64)}, r"real floating matrix.*complex64"),
        (lambda c: c | {"W": c["W"][0]}, r"matrix \(in, out\); got shape \(6,\)"),
        (lambda c: c | {"W": c["W"][:-1]}, "W has 39 input coordinates.*the data have 40"),
        (lambda c: c | {"data": c["X"]}, r"jpfq\.Gram or jpfq\.Rows.*from_data\(X, Xq\)"),
        (lambda c: c | {"data": jpfq.Gram.from_data(c["X"].at[0, 0].set(NAN))}, "holds NaN or infinity"),
        (lambda c: c | {"data": jpfq.Rows(c["X"].at[0, 0].set(NAN))}, "holds NaN or infinity"),
        (
            lambda c: c | {"data": jpfq.Gram.from_data(c["X"].at[0, 0].set(NAN), c["X"])},
            "The Gram holds NaN or infinity",
        ),
        (lambda c: c | {"data": jpfq.Gram.from_data(c["X"] * 1e25)}, "infinity"),
        (lambda c: c | {"data": jpfq.Rows(c["X"].astype(jnp.complex64))}, "real numbers; got complex64"),
        (lambda c: c | {"bits": None}, "bits=... or grid=..., one of them"),
        (lambda c: c | {"grid": jpfq.Ternary()}, "bits=... or grid=..., one of them"),
        (lambda c: c | {"bits": 17}, "from 1 to 16; got 17"),
        (lambda c: c | {"bits": None, "grid": jpfq.Ternary}, r"grid takes a Grid.*did you mean jpfq\.Ternary\(\)"),
        (lambda c: c | {"bits": None, "grid": 4}, r"grid takes a Grid, such as jpfq\.Ternary\(\); got 4"),
        (lambda c: c | {"scale": jpfq.Median}, r"scale takes a Scale.*did you mean jpfq\.Median\(\)"),
        (lambda c: c | {"scale": 0.5}, r"scale takes a Scale, such as jpfq\.AbsMax\(\); got 0\.5"),
        (lambda c: c | {"method": jpfq.GPFQ}, r"method takes a Method.*did you mean jpfq\.GPFQ\(\)"),
        (lambda c: c | {"method": "GPFQ"}, r"method takes a Method, such as jpfq\.GPFQ\(\); got 'GPFQ'"),
        (lambda c: c | {"order": jpfq.Descending}, r"order takes an Order.*did you mean jpfq\.Descending\(\)"),
        (lambda c: c | {"rounding": jpfq.Nearest}, r"rounding takes a Rounding.*did you mean jpfq\.Nearest\(\)"),
        (lambda c: c | {"form": "data"}, r"form='data' needs the calibration rows: pass jpfq\.Rows\(X, Xq\)"),
        (lambda c: c | {"form": "data", "method": jpfq.MSQ(), "data": jpfq.Rows(c["X"])}, "MSQ.*no data form"),
        (lambda c: c | {"form": "rows"}, "form is 'auto', 'gram' or 'data'; got 'rows'"),
        (lambda c: c | {"block": 0}, "block is a positive number of coordinates, or None.*got 0"),
        (lambda c: c | {"block": 2.5}, "block is a positive number of coordinates, or None.*got 2.5"),
        (lambda c: c | {"scale": jpfq.AbsMax(per=jpfq.PerGroup(7))}, r"PerGroup\(7\) does not divide the 40"),
        (lambda c: c | {"bits": None, "grid": jpfq.Asymmetric(4), "scale": jpfq.Median()}, "Asymmetric needs two ends"),
        (lambda c: c | {"bits": None, "grid": jpfq.Infinite()}, r"Infinite has no largest level.*Fixed\(step\)"),
    ],
)
def test_mistakes_are_named(change, message):
    W, gram = problem32(55)
    X = jnp.asarray(problem(55, n=N, out=OUT)[0], jnp.float32)
    call = change({"W": W, "data": gram, "bits": 4, "X": X})
    del call["X"]
    with pytest.raises(ValueError, match=message):
        jpfq.solve(call.pop("W"), call.pop("data"), **call)

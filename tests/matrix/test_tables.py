"""Tables through the recursion: codes are those of the published loops over the table's levels; what follows keeps them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from jpfq.matrix.stages import _solve_all
from tests.helpers import PLAIN, assert_close, assert_codes_equal, assert_on_grid, problem, problem32
from tests.reference import axe, optq, qronos
from tests.reference import gpfq as reference

N, OUT, SIZE = 40, 6, 8
DEAD = (3, 17)
TABLES = {
    "Levels": jpfq.Levels([-4, -1.5, 0, 0.25, 1, 5]),
    "no zero": jpfq.Levels([-3, -1, 1, 2]),
    "E2M1": jpfq.E2M1(),
    "E4M3": jpfq.E4M3(),
    "NF4": jpfq.NF4(),
    "PowersOfTwo": jpfq.PowersOfTwo(3),
}
SCALES = {
    "channel": jpfq.scale.AbsMax(0.8),
    "tensor": jpfq.scale.AbsMax(0.7, per=jpfq.scale.PerTensor()),
    "group": jpfq.scale.AbsMax(per=jpfq.scale.PerGroup(SIZE)),
}
SHARE = 0.02
damping = jpfq.damping.MeanDiagonal(SHARE)
METHODS = {
    "MSQ": (jpfq.MSQ(), lambda W, X, Xq, levels, lam: reference.msq(W, levels)),
    "GPFQ": (jpfq.GPFQ(), lambda W, X, Xq, levels, lam: reference.gpfq_state(W, X, Xq, levels)),
    "OPTQ": (jpfq.OPTQ(damping=damping), lambda W, X, Xq, levels, lam: optq.optq(W, Xq, levels, lam)),
    "Qronos": (jpfq.Qronos(damping=damping), qronos.qronos_ls),
}
# Every table with one method, every method and scale with one table: a program is compiled for each.
CASES = [(name, "GPFQ", "channel") for name in TABLES]
CASES += [
    pytest.param("E2M1", method, scale, marks=() if (method, scale) == ("Qronos", "group") else pytest.mark.slow)
    for method in METHODS
    for scale in SCALES
    if (method, scale) != ("GPFQ", "channel")
]
FEW = pytest.mark.parametrize("name", [pytest.param("Levels", marks=pytest.mark.slow), "E2M1"])


@pytest.mark.parametrize(("name", "method", "scale"), CASES)
def test_codes_are_the_published_ones(x64, name, method, scale):
    X, Xq, W = problem(21, n=N, out=OUT, dead=DEAD if method in ("MSQ", "GPFQ") else ())
    grid, (part, loop) = TABLES[name], METHODS[method]
    gram = jpfq.Gram.from_data(jnp.asarray(X), jnp.asarray(Xq))
    tensor, info = jpfq.solve(jnp.asarray(W), gram, **PLAIN | {"grid": grid, "scale": SCALES[scale], "method": part})
    radius = np.abs(W.reshape(-1, SIZE, OUT)).max(1)
    radius = radius if scale == "group" else radius.max(0 if scale == "channel" else None, keepdims=True)
    assert_close(tensor.step, SCALES[scale].c * radius / max(map(abs, grid.values)))
    levels = reference.level_lists(W.shape, np.asarray(tensor.step), np.array(grid.values), np.zeros(tensor.step.shape))
    expected = loop(W, X, Xq, levels, SHARE * np.mean((Xq**2).sum(0)))
    assert_codes_equal(tensor.codes, expected.index)
    assert_close(tensor.dequantize(), expected.q)
    assert_close(info.relative_error, reference.relative_error(X, W, Xq, expected.q))
    assert_on_grid(tensor)
    packed = jpfq.Packed.of(tensor)
    np.testing.assert_array_equal(packed.unpack().codes, tensor.codes)
    np.testing.assert_array_equal(packed.dequantize(), tensor.dequantize())
    assert_close(tensor.bits_per_weight, grid.storage_bits + (32 * tensor.step.size + grid.table_bits) / W.size)


@pytest.mark.slow
@FEW
def test_data_form_and_blocks_are_the_gram_form(x64, name):
    X, Xq, W = problem(22, n=N, out=OUT)
    rows = jpfq.Rows(jnp.asarray(X), jnp.asarray(Xq))
    settings = PLAIN | {"grid": TABLES[name], "scale": SCALES["channel"], "method": jpfq.GPFQ()}
    whole, _ = jpfq.solve(jnp.asarray(W), rows.gram(), **settings, block=None)
    for data, form, block in ((rows.gram(), "gram", 8), (rows, "data", 16)):
        part, _ = jpfq.solve(jnp.asarray(W), data, **settings, form=form, block=block)
        assert_codes_equal(part.codes, whole.codes)


@pytest.mark.slow
@FEW
def test_the_recommended_recipe_lowers_the_error(name):
    """Search, descent and free steps on a table: better than plain rounding, and no worse than GPFQ alone."""
    W, gram = problem32(23, n=N, out=OUT)
    grid = TABLES[name]
    plain, alone, best = (
        jpfq.solve(W, gram, grid=grid, **settings)[1].relative_error
        for settings in ({"plain": True, "method": jpfq.MSQ()}, {"plain": True}, {"shrinkage": None})
    )
    assert best < alone * 1.001
    assert best < 0.9 * plain


@pytest.mark.slow
@pytest.mark.parametrize("T", [None, 10])
@pytest.mark.parametrize("P", [13, 16])
def test_accumulators_hold_on_the_integers_of_a_table(x64, P, T):
    """E2M1 is half of 0, 1, 2, 3, 4, 6, 8, 12: AXE's loop over those, the step being that of the integer 1."""
    X, Xq, W = problem(24, n=N, out=OUT)
    gram, inputs = jpfq.Gram.from_data(jnp.asarray(X), jnp.asarray(Xq)), (0, 255)
    settings = PLAIN | {"grid": jpfq.E2M1(), "scale": SCALES["channel"], "method": jpfq.GPFQ()}
    tensor, info = jpfq.solve(jnp.asarray(W), gram, **settings, accumulator=jpfq.Accumulator(P, T), inputs=inputs)
    whole = np.int64(2 * np.array(jpfq.E2M1().values))
    expected = axe.gpfq(W, X, Xq, np.asarray(tensor.step)[0] / 2, whole.tolist(), inputs, P, T or N, range(N))
    k = whole[np.asarray(tensor.codes)]
    np.testing.assert_array_equal(k, expected)
    tiles = np.array([k[t : t + (T or N)].clip(0).sum(0) for t in range(0, N, T or N)])
    assert (tiles * 255).max() <= 2 ** (P - 1) - 1
    assert info.reach.bits <= P
    with pytest.raises(ValueError, match="no whole multiples of one number"):
        jpfq.solve(
            jnp.asarray(W), gram, **settings | {"grid": jpfq.NF4()}, accumulator=jpfq.Accumulator(16), inputs=inputs
        )


@pytest.mark.slow
def test_tables_of_one_size_share_a_program():
    W, gram = problem32(25, n=N, out=OUT)
    solve = lambda grid: jpfq.solve(W, gram, grid=grid, **PLAIN, method=jpfq.GPFQ())
    solve(jpfq.Levels([-2, -1, 0, 3]))
    before = _solve_all._cache_size()
    solve(jpfq.Levels([-1, 0, 0.5, 1]))
    assert _solve_all._cache_size() == before


@pytest.mark.slow
@FEW
def test_draws_are_unbiased(x64, name):
    """The mean over draws of the values is the weight itself, for weights within the grid."""
    grid = TABLES[name]
    W = jnp.asarray(np.full((4, 4000), 0.3))
    gram = jpfq.Gram.from_data(jnp.eye(4))
    settings = {"scale": jpfq.scale.Fixed(0.5), "method": jpfq.MSQ(), "rounding": jpfq.rounding.Stochastic()}
    tensor, _ = jpfq.solve(W, gram, grid=grid, plain=True, **settings, key=jax.random.key(0))
    q = np.asarray(tensor.dequantize())
    assert len(np.unique(q)) == (1 if 0.6 in grid.values else 2)
    assert abs(q.mean() - 0.3) < 5 * q.std() / np.sqrt(q.size) + 1e-12


@pytest.mark.slow
@FEW
def test_gradients_pass_straight_through(name):
    """`straight` gives the values of `rounded`, with a derivative of one within the grid and none beyond."""
    grid = TABLES[name]
    W, gram = problem32(26, n=N, out=OUT)
    tensor, _ = jpfq.solve(W, gram, grid=grid, plain=True, scale=jpfq.scale.AbsMax(0.3))
    np.testing.assert_allclose(tensor.straight(W), tensor.rounded(W).dequantize(), rtol=2e-6, atol=1e-7)
    inside = ~tensor.levels.saturates(W)
    np.testing.assert_array_equal(jax.grad(lambda W: tensor.straight(W).sum())(W), np.float32(inside))

"""Tables: rounding is brute force over the levels, and that of ml_dtypes but for ties; what a table may be."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jpfq
from jpfq.scalar import ScaledGrid, Table, datatype_bits
from jpfq.scalar.scale import levels_of
from tests.reference import gpfq as reference

TABLES = {
    "Levels": jpfq.Levels([-4, -1.5, 0, 0.25, 1, 5]),
    "no zero": jpfq.Levels([-3, -1, 1, 2]),
    "two": jpfq.Levels([-1, 3]),
    "E2M1": jpfq.E2M1(),
    "E2M3": jpfq.E2M3(),
    "E3M2": jpfq.E3M2(),
    "E4M3": jpfq.E4M3(),
    "E5M2": jpfq.E5M2(),
    "NF4": jpfq.NF4(),
    "PowersOfTwo": jpfq.PowersOfTwo(4),
    "TwoRanges": jpfq.TwoRanges(4, fine=5, ratio=4),
}
FLOATS = {
    "E2M1": ml_dtypes.float4_e2m1fn,
    "E2M3": ml_dtypes.float6_e2m3fn,
    "E3M2": ml_dtypes.float6_e3m2fn,
    "E4M3": ml_dtypes.float8_e4m3fn,
    "E5M2": ml_dtypes.float8_e5m2,
}
each_table = pytest.mark.parametrize("name", TABLES)
few = settings(deadline=None, derandomize=True, max_examples=20)
SIZE = 32

encode, decode, between, toward_zero, saturates = (
    jax.jit(getattr(ScaledGrid, name)) for name in ("encode", "decode", "between", "toward_zero", "saturates")
)


def laid(grid: Table, step: float, dtype=jnp.float32) -> ScaledGrid:
    lo, hi, zero, _ = grid.alphabet()
    return ScaledGrid(*(jnp.asarray(x, dtype) for x in (step, zero, lo, hi)), *levels_of(grid, dtype))


def halfway(values):
    """Levels, the points halfway between them, those next to both in float32, and those far beyond."""
    t = np.float32(values)
    points = np.concatenate([t, (t[1:] + t[:-1]) / 2, 3 * t[[0, -1]]])
    points = np.concatenate(
        [points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(-np.inf))]
    )
    return points[(points == 0) | (np.abs(points) > np.finfo(np.float32).tiny)]  # subnormal numbers are 0 to XLA


@each_table
def test_rounding_is_brute_force_with_ties_up(name):
    """In float64, which holds the midpoints of all of them exactly."""
    grid = TABLES[name]
    v, levels = np.float64(halfway(grid.values)), np.float64(grid.values)
    with jax.enable_x64(True):
        codes = encode(laid(grid, 1.0, jnp.float64), jnp.asarray(v))
        np.testing.assert_array_equal(codes, [reference.nearest(x, levels) for x in v])
        np.testing.assert_array_equal(decode(laid(grid, 2.0, jnp.float64), codes), levels[np.int64(codes)] * 2)


@each_table
@few
@given(st.integers(-6, 6), st.lists(st.floats(-2, 2, width=32), min_size=SIZE, max_size=SIZE))
def test_no_level_is_nearer(name, exponent, shares):
    """Of points spread over twice the range, at steps that are powers of two."""
    grid, step = TABLES[name], 2.0**exponent
    v = np.float32(np.array(shares) * max(map(abs, grid.values)) * step)
    q = np.float64(decode(laid(grid, step), encode(laid(grid, step), jnp.asarray(v))))
    levels = step * np.float64(np.float32(grid.values))
    best = np.abs(levels[:, None] - np.float64(v)).min(0)
    np.testing.assert_allclose(np.abs(q - np.float64(v)), best, rtol=0, atol=1e-6 * max(abs(levels)))


@pytest.mark.parametrize("name", FLOATS)
def test_floating_point_formats_round_as_ml_dtypes_but_for_ties(name):
    """Bit for bit wherever a value is nearer to one level; halfway ours goes up, the standard's to the even mantissa."""
    grid, dtype = TABLES[name], FLOATS[name]
    values = np.float64(grid.values)
    assert values.max() == float(ml_dtypes.finfo(dtype).max)
    random = np.random.default_rng(0).uniform(values.min(), values.max(), 20_000)
    small = random * 2.0 ** -np.random.default_rng(1).integers(0, 20, random.size)
    v = np.float32(np.concatenate([random, small, halfway(values[1:-1])]))
    v = v[np.abs(v) <= values.max()]
    ours = np.asarray(decode(laid(grid, 1.0), encode(laid(grid, 1.0), jnp.asarray(v))))
    theirs = v.astype(dtype).astype(np.float32)
    midpoints = (values[1:] + values[:-1]) / 2
    tie = np.isin(np.float64(v), midpoints)
    np.testing.assert_array_equal(ours[~tie], theirs[~tie])
    assert tie.sum() >= len(midpoints) - 2
    below = np.searchsorted(values, np.float64(v[tie]))
    np.testing.assert_array_equal(ours[tie], values[below])
    even = np.array([int(x.astype(dtype).view(np.uint8)) % 2 == 0 for x in np.float32(values)])
    np.testing.assert_array_equal(theirs[tie], np.where(even[below - 1], values[below - 1], values[below]))


@each_table
def test_between_names_the_level_below_and_the_share_of_the_way(name):
    grid = TABLES[name]
    t = np.float32(grid.values)
    inside = np.float32(np.random.default_rng(2).uniform(t[0], t[-1], 500))
    below, share = (np.asarray(x) for x in between(laid(grid, 1.0), jnp.asarray(inside)))
    k = np.int64(below)
    np.testing.assert_array_equal(k, np.searchsorted(t[1:-1], inside, side="right"))
    np.testing.assert_allclose(t[k] + share * (t[k + 1] - t[k]), inside, atol=1e-6 * np.abs(t).max())
    assert (between(laid(grid, 1.0), t[-1:] * 2 + 1)[1] > 1).all()  # beyond the grid a draw is sure of its end
    assert (between(laid(grid, 1.0), t[:1] * 2 - 1)[1] < 0).all()


@pytest.mark.parametrize("name", [name for name in TABLES if TABLES[name].has_zero])
def test_towards_zero_never_grows(name):
    grid = TABLES[name]
    t = np.float32(grid.values)
    v = np.concatenate([halfway(t), np.float32(np.random.default_rng(3).uniform(2 * t[0], 2 * t[-1], 300))])
    q = np.asarray(decode(laid(grid, 1.0), toward_zero(laid(grid, 1.0), jnp.asarray(v))))
    clipped = np.clip(v, t[0], t[-1])
    expected = [t[(t <= x) & (t >= 0)].max() if x >= 0 else t[(t >= x) & (t <= 0)].min() for x in clipped]
    np.testing.assert_array_equal(q, expected)


@each_table
def test_saturation_begins_half_a_gap_beyond_the_ends(name):
    grid = TABLES[name]
    t = np.float64(grid.values)
    low, high = t[0] - (t[1] - t[0]) / 2, t[-1] + (t[-1] - t[-2]) / 2
    v = jnp.asarray([low * 1.001 - 0.001, low, high, high * 1.001 + 0.001], jnp.float32)
    assert saturates(laid(grid, 1.0), v).tolist() == [True, False, False, True]


def test_levels_are_counted_and_stored_in_whole_bits():
    counted = {name: (grid.levels, grid.storage_bits) for name, grid in TABLES.items()}
    assert counted == {
        "Levels": (6, 3),
        "no zero": (4, 2),
        "two": (2, 1),
        "E2M1": (15, 4),
        "E2M3": (63, 6),
        "E3M2": (63, 6),
        "E4M3": (253, 8),
        "E5M2": (247, 8),
        "NF4": (16, 4),
        "PowersOfTwo": (15, 4),
        "TwoRanges": (16, 4),
    }
    assert [name for name, grid in TABLES.items() if not grid.has_zero] == ["no zero", "two"]


def test_long_tables_are_named_by_their_ends():
    """They are a column of summaries and plans."""
    assert str(jpfq.Levels(np.linspace(-0.87654321, 1, 16))) == "Levels(16 from -0.877 to 1)"
    assert str(jpfq.Levels([-1, 2], reach=3)) == "Levels(values=(-1.0, 2.0), reach=3)"


def test_the_unit_makes_integers_of_all_levels():
    """E2M1 is half of 0, 1, 2, 3, 4, 6, 8, 12; NF4 has no unit, nor has a format of too many exponents."""
    units = {name: grid.unit for name, grid in TABLES.items()}
    assert units["E2M1"] == 0.5
    assert units["PowersOfTwo"] == 2.0**-6
    assert units["Levels"] == 0.25
    assert units["NF4"] is units["E5M2"] is None
    for name, unit in units.items():
        if unit is not None:
            whole = np.float64(TABLES[name].values) / unit
            np.testing.assert_array_equal(whole, np.round(whole))
            assert math.gcd(*np.int64(whole).tolist()) == 1
    assert datatype_bits(128, jpfq.E2M1(), jpfq.Asymmetric(8)) == (128 * 12 * 255).bit_length() + 1
    with pytest.raises(ValueError, match="no whole multiples of one number"):
        datatype_bits(128, jpfq.NF4(), jpfq.Asymmetric(8))
    with pytest.raises(ValueError, match="inputs that are summed are runs of integers"):
        datatype_bits(128, jpfq.Integer(4), jpfq.E2M1())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "from 2 to 256 numbers; got 1"),
        (range(257), "from 2 to 256 numbers; got 257"),
        ([0, math.nan, 1], "finite numbers up to 2\\^64; entry 1 is nan"),
        ([0, 1, math.inf], "entry 2 is inf"),
        ([0, 2, 1], r"ascending, distinct numbers; entry 2 \(1.0\) is below entry 1 \(2.0\)"),
        ([0, 1, 1], r"entry 2 \(1.0\) is equal to entry 1 \(1.0\)"),
        ([1, 1 + 1e-12], "distinct in float32"),
        (4, "takes a list of numbers, such as"),
        (["a", "b"], "takes a list of numbers, such as"),
    ],
)
def test_what_is_no_table_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        jpfq.Levels(values)


@pytest.mark.parametrize("bits", [1, 7, 2.0, True, "4"])
def test_powers_of_two_of_other_widths_are_refused(bits):
    with pytest.raises(ValueError, match="PowersOfTwo takes from 2 to 6 bits"):
        jpfq.PowersOfTwo(bits)


def test_a_table_is_a_setting_that_programs_are_made_for():
    """Equal by value, hashable, without leaves: what a program is compiled for goes by its size alone (`Codes`)."""
    assert jpfq.Levels([0, 1]) == jpfq.Levels((0.0, 1.0))
    assert hash(jpfq.Levels([0, 1])) == hash(jpfq.Levels((0.0, 1.0)))
    assert jax.tree.leaves(jpfq.Levels([0, 1])) == jax.tree.leaves(jpfq.E2M1()) == []
    assert jax.tree.structure(jpfq.E2M1()) != jax.tree.structure(jpfq.E4M3())
    with pytest.raises(ValueError, match="vmap cannot sweep over it"):
        jax.jit(lambda x: jpfq.Levels(x))(jnp.arange(3.0))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 12), st.booleans())
def test_fitted_levels_are_the_means_of_their_numbers(seed, count, weighted):
    """Lloyd's conditions: each level is the weighted mean of the numbers that are nearest to it."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((30, 10)) ** 3
    w = rng.exponential(size=(30, 1)) if weighted else np.ones((30, 1))
    grid = jpfq.Levels.fit(x, count, w if weighted else None)
    levels, w = np.array(grid.values), np.broadcast_to(w, x.shape)
    assert (grid.levels, grid.alphabet().reach) == (count, 1)
    nearest = np.abs(x[..., None] - levels).argmin(-1)
    for k in set(nearest.flat):
        own = nearest == k
        np.testing.assert_allclose(levels[k], np.average(x[own], weights=w[own]), rtol=1e-9, atol=1e-12)


def test_fitted_levels_err_less_than_others_of_their_number():
    x = np.random.default_rng(0).standard_normal(20_000)
    error = lambda levels: np.min((x[:, None] - np.asarray(levels)) ** 2, 1).mean()
    found = error(jpfq.Levels.fit(x, 16).values)
    assert found == pytest.approx(0.009497, rel=0.03)  # of a normal distribution, Max 1960, table I: N = 16
    uniform = min(error(r * np.linspace(-1, 1, 16)) for r in np.linspace(1.5, 4, 40))
    assert found < 0.85 * uniform


@pytest.mark.parametrize("zeros", [0, 990])
def test_as_many_levels_as_numbers_are_the_numbers(zeros):
    """Also where most weights are 0, as after pruning."""
    x = np.concatenate([np.zeros(zeros + 1), np.arange(1.0, 11)])
    np.testing.assert_array_equal(jpfq.Levels.fit(x, 11).values, np.arange(11.0))


def test_a_scale_puts_its_radius_on_the_reach_of_levels():
    grid = jpfq.Levels([-1.0, 0.0, 2.0], reach=4.0)
    W = np.array([[3.0], [-8.0]], np.float32)
    levels = jpfq.scale.AbsMax()(W, grid)
    assert levels.step == 2
    np.testing.assert_array_equal(levels.decode(levels.encode(W)), [[4.0], [-2.0]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jpfq.Levels([0, 1], reach=0), "reach is a positive number of steps; got 0"),
        (lambda: jpfq.Levels.fit(np.ones(9), 3), "3 levels, but there are 1 different numbers"),
        (lambda: jpfq.Levels.fit(np.arange(9.0), 1), "from 2 to 256 levels; got 1"),
        (lambda: jpfq.Levels.fit([1.0, np.nan], 2), "takes finite numbers"),
        (lambda: jpfq.Levels.fit([1.0, 2.0], 2, [-1, 1]), "nowhere below 0"),
    ],
)
def test_what_no_levels_are_fitted_to(make, message):
    with pytest.raises(ValueError, match=message):
        make()

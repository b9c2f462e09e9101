"""Grids: encoding is brute force over all levels with ties up; counts and bits of each; bad input; grids as pytrees."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jpfq
from jpfq.scalar import ScaledGrid, grid_of_bits
from tests.reference import gpfq as reference

few = settings(deadline=None, derandomize=True, max_examples=15)

ASYMMETRIC_ZERO = 5

# grid, (codes, zero) of the reference
GRIDS = {
    "Integer(2)": (jpfq.Integer(2), reference.integer(2)),
    "Integer(4)": (jpfq.Integer(4), reference.integer(4)),
    "Integer(3, narrow)": (jpfq.Integer(3, narrow=True), reference.integer(3, narrow=True)),
    "Asymmetric(3)": (jpfq.Asymmetric(3), (reference.unsigned(3)[0], ASYMMETRIC_ZERO)),
    "Offset(3)": (jpfq.Offset(3), (reference.unsigned(3)[0], ASYMMETRIC_ZERO)),  # with an offset of so many steps
    "Symmetric(8)": (jpfq.Symmetric(8), reference.symmetric(8)),
    "Equispaced(3)": (jpfq.Equispaced(3), reference.equispaced(3)),
    "Equispaced(4)": (jpfq.Equispaced(4), reference.equispaced(4)),
    "Ternary": (jpfq.Ternary(), reference.ternary()),
    "Binary": (jpfq.Binary(), reference.binary()),
    "Infinite": (jpfq.Infinite(), (list(range(-60, 61)), 0)),  # the test values lie in +-50 steps
}
each_grid = pytest.mark.parametrize("name", GRIDS)

encode = jax.jit(lambda levels, v: levels.encode(v))
decode = jax.jit(lambda levels, code: levels.decode(code))
saturates = jax.jit(lambda levels, v: levels.saturates(v))

SIZE = 16
exponents = st.integers(-8, 8)
eighths = st.lists(st.integers(-400, 400), min_size=SIZE, max_size=SIZE)
reals = st.lists(st.floats(-50, 50, width=32), min_size=SIZE, max_size=SIZE)


def laid(name, step):
    """The levels of a grid at a step, in float32."""
    grid = GRIDS[name][0]
    lo, hi, zero, _ = grid.alphabet()
    number = lambda x: jnp.asarray(x, jnp.float32)
    zero = number(ASYMMETRIC_ZERO if zero is None else zero)
    zero = zero * number(step) if grid.offset else zero
    return ScaledGrid(number(step), zero, number(lo), number(hi), offset=grid.offset)


@each_grid
@few
@given(exponents, eighths)
def test_encode_is_brute_force_with_ties_up(name, exponent, numbers):
    """On multiples of 1/8 step float32 is exact, and one value in eight is a tie or a level."""
    step = 2.0**exponent
    v = np.array(numbers) / 8 * step
    codes, zero = GRIDS[name][1]
    levels = reference.values(codes, step, zero)
    expected = [codes[reference.nearest(x, levels)] for x in v]
    found = encode(laid(name, step), jnp.asarray(v, jnp.float32))
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(decode(laid(name, step), found), [step * (k - zero) for k in expected])


@each_grid
@few
@given(st.floats(0.0078125, 8, width=32), reals)
def test_no_level_is_nearer(name, step, numbers):
    levels, v = laid(name, step), jnp.asarray(np.array(numbers) * step, jnp.float32)
    q = np.asarray(decode(levels, encode(levels, v)), np.float64)
    codes, zero = GRIDS[name][1]
    best = [np.abs(reference.values(codes, np.float32(step), zero) - x).min() for x in np.asarray(v, np.float64)]
    excess = np.abs(q - np.asarray(v, np.float64)) - best
    assert excess.max() <= 1e-5 * step  # ulp of 50 steps in float32


@each_grid
@few
@given(st.floats(0.0078125, 8, width=32), reals)
def test_encode_undoes_decode_and_is_monotone(name, step, numbers):
    levels, v = laid(name, step), jnp.asarray(np.sort(numbers) * step, jnp.float32)
    codes = encode(levels, v)
    np.testing.assert_array_equal(encode(levels, decode(levels, codes)), codes)
    assert (np.diff(codes) >= 0).all()


@each_grid
@few
@given(exponents, eighths)
def test_saturates_beyond_half_a_step(name, exponent, numbers):
    step = 2.0**exponent
    v = np.array(numbers) / 8 * step
    codes, zero = GRIDS[name][1]
    levels = reference.values(codes, step, zero)
    far = [np.abs(levels - x).min() > step / 2 for x in v]
    np.testing.assert_array_equal(saturates(laid(name, step), jnp.asarray(v, jnp.float32)), far)


@each_grid
def test_a_zero_step_gives_zero_for_every_weight(name):
    levels = laid(name, 0.0)
    v = jnp.linspace(-2, 2, SIZE)
    np.testing.assert_array_equal(decode(levels, encode(levels, v)), np.zeros(SIZE))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_encode_rounds_once(x64, dtype):
    """floor(x + 1/2) would round a number just below 1/2 up, and shift odd codes where x + 1/2 is not a float."""
    big = 2.0**23 + 1 if dtype == jnp.float32 else 2.0**52 + 1
    levels = ScaledGrid(*(jnp.asarray(x, dtype) for x in (1, 0, -(2.0**60), 2.0**60)))
    v = np.array([np.nextafter(dtype(0.5), dtype(0)), big, -big, 0.5, -0.5, -1.5])
    np.testing.assert_array_equal(levels.encode(jnp.asarray(v, dtype)), [0, big, -big, 1, 0, -1])


@pytest.mark.parametrize(
    ("grid", "levels", "log2", "storage"),
    [
        (jpfq.Integer(2), 4, 2, 2),
        (jpfq.Integer(8), 256, 8, 8),
        (jpfq.Integer(16), 65536, 16, 16),
        (jpfq.Integer(2, narrow=True), 3, math.log2(3), 2),
        (jpfq.Integer(4, narrow=True), 15, math.log2(15), 4),
        (jpfq.Asymmetric(1), 2, 1, 1),
        (jpfq.Asymmetric(4), 16, 4, 4),
        (jpfq.Offset(4), 16, 4, 4),
        (jpfq.Symmetric(1), 3, math.log2(3), 2),
        (jpfq.Symmetric(8), 17, math.log2(17), 5),
        (jpfq.Equispaced(3), 3, math.log2(3), 2),
        (jpfq.Equispaced(16), 16, 4, 4),
        (jpfq.Ternary(), 3, 1.584962500721156, 2),
        (jpfq.Binary(), 2, 1, 1),
    ],
    ids=str,
)
def test_bits(grid, levels, log2, storage):
    assert grid.levels == levels
    assert grid.log2_levels == pytest.approx(log2, abs=1e-14)
    assert grid.storage_bits == storage


def test_infinite_has_no_rate():
    assert jpfq.Infinite().log2_levels == math.inf
    assert jpfq.Infinite().storage_bits == 32


@pytest.mark.parametrize("name", [n for n in GRIDS if n != "Infinite"])
def test_alphabet_is_the_reference_list(name):
    lo, hi, zero, reach = GRIDS[name][0].alphabet()
    codes, reference_zero = GRIDS[name][1]
    assert (lo, hi) == (codes[0], codes[-1])
    assert zero is None or zero == reference_zero
    assert reach == (hi - lo if zero is None else hi - zero)


def test_bare_bits():
    assert grid_of_bits(1) == jpfq.Binary()
    assert grid_of_bits(4) == jpfq.Integer(4)


@pytest.mark.parametrize("bits", [0, -1, 17, 2.5, "4", True])
@pytest.mark.parametrize("make", [jpfq.Integer, jpfq.Asymmetric, grid_of_bits])
def test_bad_bits(make, bits):
    with pytest.raises(ValueError, match=r"integer number of bits from [12] to 16; got"):
        make(bits)


def test_one_bit_integer_names_the_remedy():
    with pytest.raises(ValueError, match=r"from 2 to 16; got 1\. For one bit use jpfq\.Binary"):
        jpfq.Integer(1)


@pytest.mark.parametrize(
    ("make", "count", "least"),
    [(jpfq.Symmetric, 0, 1), (jpfq.Symmetric, 1.5, 1), (jpfq.Symmetric, "8", 1), (jpfq.Symmetric, True, 1)]
    + [(jpfq.Equispaced, 1, 2), (jpfq.Equispaced, 3.5, 2), (jpfq.Equispaced, -4, 2)],
)
def test_bad_counts(make, count, least):
    with pytest.raises(ValueError, match=f"{make.__name__} takes an integer of at least {least}; got"):
        make(count)


def test_grids_are_values():
    assert str(jpfq.Integer(4)) == "Integer(4)"
    assert str(jpfq.Ternary()) == "Ternary()"
    assert {jpfq.Symmetric(8), jpfq.Symmetric(8)} == {jpfq.Symmetric(8)}
    with pytest.raises(dataclasses.FrozenInstanceError):
        jpfq.Integer(4).bits = 5
    assert jax.tree.leaves((jpfq.Integer(4, narrow=True), jpfq.Symmetric(7), jpfq.Equispaced(5))) == [4, 7, 5]


def test_one_trace_serves_every_width_and_vmap_is_the_loop():
    traces = []

    @jax.jit
    def ends(grid):
        traces.append(grid)
        return jnp.asarray(grid.alphabet()[:2])

    def mapped(grids):
        return jax.vmap(lambda grid: jnp.asarray(grid.alphabet()[:2]))(grids)

    widths = [2, 3, 8, 16]
    one_by_one = np.stack([ends(jpfq.Integer(bits)) for bits in widths])
    assert len(traces) == 1
    np.testing.assert_array_equal(one_by_one, [[-(2 ** (b - 1)), 2 ** (b - 1) - 1] for b in widths])
    np.testing.assert_array_equal(mapped(jpfq.Integer(jnp.array(widths))), one_by_one)

"""QTensor: values and sizes of a quantized kernel. Info: what its making was like."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from jpfq.matrix import code_dtype
from jpfq.matrix.qtensor import entropy
from tests.helpers import assert_close
from tests.reference import gpfq as reference


def tensor(shape, step_shape, grid, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    lo, hi, zero, _ = grid.alphabet()
    codes = jnp.asarray(rng.integers(lo, hi + 1, shape), code_dtype(grid))
    step = jnp.asarray(rng.uniform(0.1, 1, step_shape), jnp.float32)
    zeros = rng.integers(lo, hi + 1, step_shape) if zero is None else np.full(step_shape, zero)
    return jpfq.QTensor(codes, step, jnp.asarray(zeros, jnp.float32), grid, np.dtype(dtype))


@pytest.mark.parametrize(
    ("shape", "step_shape"),
    [
        ((12, 4), (1, 1)),
        ((12, 4), (1, 4)),
        ((12, 4), (3, 4)),
        ((12, 4), (12, 1)),
        ((4, 12), (4, 3)),
        ((3, 3, 4, 6), (1, 1, 1, 6)),
        ((3, 3, 4, 6), (1, 1, 2, 3)),
        ((2, 12, 4), (2, 3, 4)),
    ],
)
@pytest.mark.parametrize("grid", [jpfq.Integer(4), jpfq.Asymmetric(3), jpfq.Binary()], ids=str)
def test_each_step_serves_its_block_of_codes(shape, step_shape, grid):
    quantized = tensor(shape, step_shape, grid)
    found = quantized.dequantize()
    assert found.shape == quantized.shape == shape
    codes, step, zero = (np.asarray(x, np.float64) for x in (quantized.codes, quantized.step, quantized.zero))
    expected = np.zeros(shape)
    for at in np.ndindex(*shape):
        block = tuple(i * here // full for i, here, full in zip(at, step_shape, shape, strict=True))
        expected[at] = step[block] * (codes[at] - zero[block])
    assert_close(found, expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_has_the_dtype_of_its_kernel(dtype):
    quantized = tensor((12, 4), (1, 4), jpfq.Integer(4), dtype)
    assert quantized.dequantize().dtype == dtype
    exact = tensor((12, 4), (1, 4), jpfq.Integer(4)).dequantize()
    np.testing.assert_array_equal(quantized.dequantize(), exact.astype(dtype))


@pytest.mark.parametrize(
    ("grid", "step_shape", "nbytes"),
    [
        (jpfq.Integer(4), (1, 4), 24 + 16),  # 48 codes of 4 bits, 4 steps of 32
        (jpfq.Integer(3), (1, 1), 18 + 4),
        (jpfq.Symmetric(8), (1, 1), 30 + 4),  # 17 levels take five bits
        (jpfq.Ternary(), (3, 4), 12 + 48),
        (jpfq.Binary(), (1, 4), 6 + 16),
        (jpfq.Asymmetric(4), (3, 4), 24 + 48 + 6),  # fitted zero points are stored too
        (jpfq.Asymmetric(1), (1, 1), 7 + 4),  # 48 + 1 bits are not whole bytes
    ],
    ids=str,
)
def test_size(grid, step_shape, nbytes):
    quantized = tensor((12, 4), step_shape, grid)
    assert quantized.nbytes == nbytes
    assert quantized.bits_per_weight == 8 * nbytes / 48


def test_it_passes_through_jit():
    quantized = tensor((12, 4), (3, 4), jpfq.Asymmetric(3))
    again = jax.jit(lambda t: t)(quantized)
    assert again.dtype == quantized.dtype
    np.testing.assert_array_equal(jax.jit(lambda t: t.dequantize())(quantized), quantized.dequantize())


@pytest.mark.parametrize(
    ("grid", "dtype"),
    [
        (jpfq.Integer(2), np.int8),
        (jpfq.Integer(8), np.int8),
        (jpfq.Integer(9), np.int16),
        (jpfq.Asymmetric(8), np.uint8),
        (jpfq.Asymmetric(16), np.uint16),
        (jpfq.Symmetric(128), np.int16),
        (jpfq.Equispaced(256), np.uint8),
        (jpfq.Ternary(), np.int8),
        (jpfq.Binary(), np.int8),
        (jpfq.Infinite(), np.int32),
    ],
    ids=str,
)
def test_codes_take_the_smallest_integers_that_hold_them(grid, dtype):
    assert code_dtype(grid) == dtype
    lo, hi, *_ = grid.alphabet()
    assert np.iinfo(dtype).min <= lo <= hi <= np.iinfo(dtype).max


def test_a_swept_width_takes_int32():
    seen = []
    jax.vmap(lambda bits: (seen.append(code_dtype(jpfq.Integer(bits))), bits)[1])(jnp.array([2, 8]))
    assert seen == [np.int32]


def test_entropy_is_that_of_the_shares():
    rng = np.random.default_rng(0)
    for codes in (rng.integers(-8, 8, 300), np.zeros(300), np.arange(300) % 2, rng.geometric(0.3, 300)):
        assert_close(entropy(jnp.asarray(codes, jnp.float32)), reference.entropy(codes), scale=1)
    assert entropy(jnp.arange(16.0)) == 4
    assert entropy(jnp.full(5, 7.0)) == 0


def info(**values):
    zero = dict.fromkeys((field.name for field in dataclasses.fields(jpfq.Info) if field.name != "reach"), 0.0)
    return jpfq.Info(**{name: jnp.asarray(x) for name, x in (zero | values).items()})


@pytest.mark.parametrize(("square", "energy", "expected"), [(4, 16, 0.5), (0, 9, 0), (0, 0, 0), (1, 0, np.inf)])
@pytest.mark.parametrize("name", ["error", "floor", "bound"])
def test_relative_figures(name, square, energy, expected):
    made = info(energy=float(energy), **{f"square_{name}": float(square)})
    np.testing.assert_allclose(getattr(made, f"relative_{name}"), expected, rtol=1e-6)


def test_joined_parts_sum_their_errors_and_average_their_shares():
    parts = [info(square_error=1.0, energy=4.0, dead=2, sparsity=0.5, entropy=2.0, saturation=0.1, square_bound=2.0)]
    parts += [info(square_error=3.0, energy=12.0, dead=1, sparsity=0.0, entropy=3.0, saturation=0.3, square_bound=5.0)]
    joined = jpfq.Info.join(parts)
    assert (joined.square_error, joined.energy, joined.dead) == (4, 16, 3)
    assert (joined.sparsity, joined.entropy) == (0.25, 2.5)
    assert_close(joined.saturation, 0.2)
    assert_close(joined.relative_error, 0.5)
    assert joined.square_bound == 7

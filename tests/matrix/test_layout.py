"""Layouts: rows @ matrices is the product of the program, for dot_general and for convolutions of every kind."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jpfq.matrix.layout import ConvLayout, DotLayout
from tests.reference.gpfq import im2col

# x shape, W shape, (data_contract, contract), (data_batch, batch), B, in, out
DOTS = {
    "dense": ((5, 3), (3, 4), ((1,), (0,)), ((), ()), (1, 3, 4)),
    "kernel transposed": ((5, 3), (4, 3), ((1,), (1,)), ((), ()), (1, 3, 4)),
    "sequence": ((2, 5, 3), (3, 4), ((2,), (0,)), ((), ()), (1, 3, 4)),
    "heads out": ((2, 5, 6), (6, 3, 4), ((2,), (0,)), ((), ()), (1, 6, 12)),
    "heads in": ((2, 5, 3, 4), (3, 4, 6), ((2, 3), (0, 1)), ((), ()), (1, 12, 6)),
    "contracted in another order": ((3, 2, 4), (4, 6, 3), ((2, 0), (0, 2)), ((), ()), (1, 12, 6)),
    "experts": ((3, 5, 2), (3, 2, 4), ((2,), (1,)), ((0,), (0,)), (3, 2, 4)),
    "experts inside": ((5, 3, 2), (2, 4, 3), ((2,), (0,)), ((1,), (2,)), (3, 2, 4)),
    "two batch axes": ((2, 3, 5, 4), (3, 4, 2), ((3,), (1,)), ((1, 0), (0, 2)), (6, 4, 1)),
    "a vector": ((5, 3), (3,), ((1,), (0,)), ((), ()), (1, 3, 1)),
}


def integers(shape, seed):
    """Small integers, whose products float32 sums exactly."""
    return jnp.asarray(np.random.default_rng(seed).integers(-4, 5, shape), jnp.float32)


@pytest.mark.parametrize("name", DOTS)
def test_dot_general(name):
    x_shape, W_shape, contract, batch, dims = DOTS[name]
    layout = DotLayout(W_shape, contract[1], batch[1], contract[0], batch[0], False)
    x, W = integers(x_shape, 0), integers(W_shape, 1)
    assert layout.dims == dims
    matrices, rows = layout.matrices(W), layout.rows(x)
    assert matrices.shape == dims
    assert (rows.shape[0], rows.shape[-1]) == dims[:2]
    assert rows.ndim == 2 + x.ndim - len(contract[0]) - len(batch[0])  # no two axes of rows are merged
    expected = lax.dot_general(x, W, (contract, batch))
    product = np.einsum("b...i,bio->b...o", rows, matrices)
    np.testing.assert_array_equal(product.reshape(expected.shape), expected)
    np.testing.assert_array_equal(layout.operand(matrices), W)
    assert hash(layout) == hash(DotLayout(W_shape, contract[1], batch[1], contract[0], batch[0], False))


CHANNELS_LAST = {1: ("NHC", "HIO", "NHC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NHWDC", "HWDIO", "NHWDC")}


def convolution(x, W, strides, padding, data_dilation, dilation, numbers, groups):
    """The product of the program, and the layout that stands for it."""
    numbers = lax.conv_dimension_numbers(x.shape, W.shape, numbers)
    settings = (strides, padding, data_dilation, dilation)
    layout = ConvLayout(W.shape, *settings, numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec, groups)
    y = lax.conv_general_dilated(
        x, W, *settings, dimension_numbers=numbers, feature_group_count=groups, precision="highest"
    )
    return y, layout, numbers


def assert_reproduces(x, W, settings, numbers, groups):
    y, layout, numbers = convolution(x, W, *settings, numbers, groups)
    matrices, rows = layout.matrices(W), layout.rows(x)
    out = W.shape[numbers.rhs_spec[0]]
    assert matrices.shape == layout.dims == (groups, W.size // out, out // groups)
    product = np.moveaxis(np.einsum("g...i,gio->g...o", rows, matrices), 0, -2)
    product = product.reshape(*product.shape[:-2], out)
    sample, channel, *space = numbers.out_spec
    np.testing.assert_array_equal(product, np.transpose(y, (sample, *space, channel)))
    np.testing.assert_array_equal(layout.operand(matrices), W)
    return layout, rows


# window, channels in and out, strides, padding, data_dilation, dilation, groups
CONVOLUTIONS = {
    "1-D": ((3,), 2, 4, (1,), ((1, 1),), (1,), (1,), 1),
    "1-D, dilated": ((3,), 2, 4, (2,), ((2, 1),), (1,), (2,), 1),
    "2-D": ((3, 2), 3, 4, (1, 2), ((1, 1), (0, 1)), (1, 1), (1, 1), 1),
    "2-D, groups": ((3, 3), 4, 6, (2, 1), ((1, 0), (0, 2)), (1, 1), (1, 2), 2),
    "2-D, depthwise": ((2, 2), 3, 6, (1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1), 3),
    "2-D, transposed": ((3, 2), 2, 3, (1, 1), ((2, 1), (1, 1)), (2, 3), (1, 1), 1),
    "3-D": ((2, 2, 3), 2, 2, (1, 2, 1), ((0, 1), (1, 0), (1, 1)), (1, 1, 1), (1, 1, 1), 1),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name):
    window, into, out, *settings, groups = CONVOLUTIONS[name]
    space = (6, 5, 4)[: len(window)]
    x, W = integers((2, *space, into), 2), integers((*window, into // groups, out), 3)
    layout, rows = assert_reproduces(x, W, settings, CHANNELS_LAST[len(window)], groups)
    strides, padding, data_dilation, dilation = settings
    expected = im2col(np.asarray(x), window, strides, padding, dilation, data_dilation, groups)
    np.testing.assert_array_equal(rows, expected)
    flax = np.asarray(W).reshape(-1, groups, out // groups)
    np.testing.assert_array_equal(layout.matrices(W), np.moveaxis(flax, 1, 0))


@pytest.mark.parametrize("numbers", [("NCHW", "OIHW", "NCHW"), ("HNWC", "HOWI", "CHNW"), ("CHWN", "IHWO", "NHCW")])
def test_any_order_of_axes(numbers):
    """The same numbers as with channels last, wherever the program keeps its axes."""
    window, into, out, *settings, groups = CONVOLUTIONS["2-D, groups"]
    x, W = integers((2, 6, 5, into), 2), integers((*window, into // groups, out), 3)
    move = lambda x, source, target: jnp.transpose(x, [source.index(letter) for letter in target])
    layout, rows = assert_reproduces(
        move(x, "NHWC", numbers[0]), move(W, "HWIO", numbers[1]), settings, numbers, groups
    )
    straight, straight_rows = assert_reproduces(x, W, settings, CHANNELS_LAST[2], groups)
    np.testing.assert_array_equal(rows, straight_rows)
    np.testing.assert_array_equal(layout.matrices(move(W, "HWIO", numbers[1])), straight.matrices(W))


@pytest.mark.slow
@settings(deadline=None, derandomize=True, max_examples=8)
@given(st.data())
def test_random_convolutions(data):
    draw = lambda low, high: data.draw(st.integers(low, high))
    axes = draw(1, 2)
    several = lambda low, high: tuple(draw(low, high) for _ in range(axes))
    groups = draw(1, 3)
    into, out = groups * draw(1, 2), groups * draw(1, 2)
    window, strides, data_dilation, dilation = several(1, 3), several(1, 3), several(1, 2), several(1, 2)
    padding = tuple((draw(0, 2), draw(0, 2)) for _ in range(axes))
    x, W = integers((2, *several(5, 7), into), 4), integers((*window, into // groups, out), 5)
    assert_reproduces(x, W, (strides, padding, data_dilation, dilation), CHANNELS_LAST[axes], groups)


def test_layouts_with_equal_keys_have_equal_rows():
    """Two kernels of different width on one input share rows; another stride does not."""
    x = integers((2, 6, 5, 3), 6)
    make = lambda out, stride: convolution(
        x, integers((3, 3, 3, out), 7), (stride, 1), ((1, 1), (1, 1)), (1, 1), (1, 1), CHANNELS_LAST[2], 1
    )[1]
    one, two, strided = make(4, 1), make(7, 1), make(4, 2)
    assert one.rows_key == two.rows_key != strided.rows_key
    np.testing.assert_array_equal(one.rows(x), two.rows(x))
    assert one.rows(x).shape != strided.rows(x).shape
    dense = lambda *W: DotLayout(W, (0,), (), (1,), (), False)
    assert dense(3, 4).rows_key == dense(3, 9).rows_key != DotLayout((5, 4), (0,), (), (0,), (), False).rows_key


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_rows_are_the_numbers_of_the_data(dtype):
    """No arithmetic touches them, hence no product is rounded: every entry of x comes back as it was."""
    x = jnp.asarray(np.random.default_rng(8).standard_normal((1, 4, 4, 2)), dtype)
    kernel = jnp.ones((2, 2, 2, 3), dtype)
    _, layout, _ = convolution(x, kernel, (1, 1), ((0, 0), (0, 0)), (1, 1), (1, 1), CHANNELS_LAST[2], 1)
    rows = layout.rows(x)
    assert rows.dtype == dtype
    assert rows.shape == (1, 1, 3, 3, 8)
    for i, j in np.ndindex(3, 3):
        np.testing.assert_array_equal(rows[0, 0, i, j], x[0, i : i + 2, j : j + 2].ravel())

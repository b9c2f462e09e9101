"""Patches: windows side by side equal plain slices; drawn ones are among all; any convolution, grouped and dilated too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jpfq import patches
from jpfq.matrix.layout import ConvLayout, DotLayout

DOT = DotLayout((6, 4), (0,), (), (1,), (), False)


def layout(groups=1, strides=(1, 1), dilation=(1, 1), padding=((1, 1), (0, 2))):
    """Kernel 3 x 2 on pictures (sample, height, width, 4 channels)."""
    shape = (3, 2, 4 // groups, 8)
    return ConvLayout(shape, strides, padding, (1, 1), dilation, (0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2), groups)


def pointwise(groups=1, strides=(1, 1)):
    """Kernel 1 x 1 on the same."""
    shape = (1, 1, 4 // groups, 8)
    return ConvLayout(shape, strides, ((0, 0),) * 2, (1, 1), (1, 1), (0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2), groups)


def pictures(seed=0, samples=5):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((samples, 9, 8, 4)), jnp.float32)


CONVOLUTIONS = {
    "plain": layout(),
    "grouped": layout(groups=2),
    "strided": layout(strides=(2, 3)),
    "dilated": layout(dilation=(2, 1)),
    "pointwise": pointwise(),
    "pointwise, grouped": pointwise(groups=2),
    "pointwise, strided": pointwise(strides=(1, 2)),
}


@pytest.mark.parametrize("conv", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_picked_windows_are_rows_by_number(conv):
    x = pictures()
    rows = conv.rows(x)
    flat = rows.reshape(rows.shape[0], -1, rows.shape[-1])
    numbers = jnp.asarray([0, 3, 3, flat.shape[1] - 1, 17])
    np.testing.assert_array_equal(conv.picked(x, numbers), flat[:, numbers])


def test_windows_side_by_side():
    x = pictures()
    rows = patches.NonOverlapping().layout(layout()).rows(x)
    padded = np.pad(np.asarray(x), ((0, 0), (1, 1), (0, 2), (0, 0)))
    expected = [padded[:, i : i + 3, j : j + 2].reshape(5, -1) for i in range(0, 9, 3) for j in range(0, 10, 2)]
    np.testing.assert_array_equal(rows[0].reshape(5, -1, 24), np.stack(expected, 1))
    dilated = patches.NonOverlapping().layout(layout(dilation=(2, 1)))
    assert dilated.strides == (5, 2)  # a window of 3 reaches over 5


def test_layers_that_are_no_convolutions_use_all_rows():
    key = jax.random.key(0)
    for choice in (patches.All(), patches.NonOverlapping(), patches.Random(0.5)):
        assert choice.layout(DOT) == DOT
        assert choice.pick(DOT, (7,), key) is None


def test_drawn_windows_are_a_share_of_all_and_each_as_likely():
    conv, rows = layout(), (5, 9, 9)
    numbers = patches.Random(0.5).pick(conv, rows, jax.random.key(1))
    assert numbers.shape == (round(0.5 * 405),)
    many = np.concatenate([patches.Random(1.0).pick(conv, rows, jax.random.key(i)) for i in range(50)])
    counts = np.bincount(many, minlength=405)
    assert counts.size == 405
    assert np.abs(counts - 50).max() < 5 * 50**0.5
    other = patches.Random(0.5, patches.NonOverlapping())
    assert other.layout(conv).strides == (3, 2)
    assert other.random


def test_at_most_so_many_windows_are_spread_over_all():
    conv, rows, total = layout(), (50, 9, 9), 4 * 50 * 9 * 9
    choice = patches.AtMost(10)
    for batch in range(4):
        numbers = np.asarray(choice.pick(conv, rows, None, total, batch))
        assert numbers.shape == (round(10 * 24 / 4),)  # inputs 3 x 2 x 4, a quarter of the windows in each batch
        assert len(set(numbers)) == len(numbers)
        assert np.diff(numbers, prepend=-1, append=4050).max() <= 3 * 4050 / 60  # nowhere a gap
        assert len(np.unique(numbers % 9)) == 9
        assert len(np.unique(numbers // 81)) >= 30
        np.testing.assert_array_equal(numbers, choice.pick(conv, rows, None, total, batch))
    assert choice.pick(conv, rows, None, 2 * 240) is None  # not twice as many
    assert choice.pick(DOT, (10**6,), None, 10**6) is None
    for wrong in (0, True, 2.5, "8"):
        with pytest.raises(ValueError, match="positive number of windows"):
            patches.AtMost(wrong)


def test_a_product_of_picked_windows_is_the_convolution_there():
    conv, x = layout(), pictures()
    W = jnp.asarray(np.random.default_rng(2).standard_normal(conv.shape), jnp.float32)
    y = lax.conv_general_dilated(x, W, (1, 1), conv.padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    numbers = jnp.arange(0, y[..., 0].size, 7)
    found = conv.picked(x, numbers)[0] @ conv.matrices(W)[0]
    np.testing.assert_allclose(found, y.reshape(-1, 8)[numbers], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("share", [0, 1.5, "all"])
def test_a_share_is_one(share):
    with pytest.raises(ValueError, match=r"a share of the windows in \(0, 1\]"):
        patches.Random(share)

"""Grams of convolutions from correlations equal those of their patches, in every field."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpfq.matrix import Gram
from jpfq.matrix.conv_gram import Correlations, correlates
from jpfq.model.program import trace
from jpfq.model.sites import find_sites
from tests.reference.gpfq import im2col

NHWC = ("NHWC", "HWIO", "NHWC")


def layout_of(x, window, padding, groups=1, numbers=NHWC, strides=(1, 1), dilation=(1, 1)):
    shape = (*window, 4 // groups, 6) if numbers == NHWC else (6, 4 // groups, *window)
    kernel = jax.ShapeDtypeStruct(shape, x.dtype)
    fn = lambda leaves, x: jax.lax.conv_general_dilated(
        x, *leaves, strides, padding, (1, 1), dilation, dimension_numbers=numbers, feature_group_count=groups
    )
    (site,), _ = find_sites(trace(fn, ["kernel"], [kernel], x))
    return site.layout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("window", "padding", "groups"),
    [
        ((3, 3), ((1, 1), (1, 1)), 2),
        ((3, 2), ((1, 0), (2, 1)), 1),
        ((3, 3), ((0, 0), (0, 0)), 1),
        ((2, 5), ((0, 1), (2, 2)), 1),
    ],
)
def test_the_gram_of_all_patches(x64, window, padding, groups):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 9, 8, 4))
    xq = x + 0.1 * rng.standard_normal(x.shape)
    layout = layout_of(jnp.asarray(x), window, padding, groups)
    assert correlates(layout, x.shape)
    both = jax.jit(lambda x, xq: (Correlations.of(layout, x, xq).gram(), Correlations.of(layout, xq).gram()))
    found, alone = both(x, xq)

    patches = lambda x: im2col(x, window, (1, 1), padding, (1, 1), (1, 1), groups).reshape(
        groups, -1, found.H.shape[-1]
    )
    X, Xq = patches(x), patches(xq)
    expected = [Gram.from_data(jnp.asarray(X[g]), jnp.asarray(Xq[g])) for g in range(groups)]
    expected = jax.tree.map(lambda *parts: np.stack(parts), *expected)
    for name in ("H", "C", "drift", "sum_X", "sum_Xq", "count"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-11, atol=1e-11, err_msg=name)
    np.testing.assert_allclose(alone.H, expected.H, rtol=1e-11, atol=1e-11)
    assert alone.C is None


@pytest.mark.slow
def test_sums_of_parts_are_those_of_all():
    x = jnp.asarray(np.random.default_rng(1).standard_normal((4, 5, 6, 4)), jnp.float32)
    layout = layout_of(x.transpose(0, 3, 1, 2), (3, 3), "SAME", numbers=("NCHW", "OIHW", "NCHW"))
    of = lambda x: Correlations.of(layout, x.transpose(0, 3, 1, 2))
    parts, whole = of(x[:1]).merge(of(x[1:])).gram(), of(x).gram()
    np.testing.assert_allclose(parts.H, whole.H, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(whole.H[0], whole.H[0].T, rtol=0, atol=0)
    assert parts.count == whole.count == 4 * 5 * 6


def test_what_has_no_such_form():
    """Strides, dilation, windows of one, and pictures too small to have an inside."""
    x = jnp.zeros((2, 8, 8, 4))
    assert not correlates(layout_of(x, (3, 3), "SAME", strides=(2, 1)), x.shape)
    assert not correlates(layout_of(x, (3, 3), "SAME", dilation=(2, 1)), x.shape)
    assert not correlates(layout_of(x, (1, 1), "SAME"), x.shape)
    assert not correlates(layout_of(x, (5, 5), "VALID"), x.shape)
    small = jnp.zeros((2, 2, 8, 4))
    assert not correlates(layout_of(small, (3, 3), "SAME"), small.shape)

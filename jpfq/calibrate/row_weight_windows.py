"""Rules that propagate row weights through convolutions and pooling."""

import jax.numpy as jnp
import numpy as np
from jax import lax

from ..matrix.layout import ConvLayout, pooled
from ..model.sites import product_layout
from .row_weight_ops import Lost, note


def window(eqn, w, cut):
    """The weights of a pooling."""
    p = eqn.params
    axes = [a for a, n in enumerate(w.shape) if n > 1]
    if all(p["window_dimensions"][a] == 1 for a in axes) and all(p["window_strides"][a] == 1 for a in axes):
        return w if all(p["padding"][a] == (0, 0) for a in axes) else Lost(eqn.primitive.name)
    names = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
    return _pooled(eqn, w, [p[name] for name in names], cut)


def convolution(eqn, own, cut):
    """The weights of a convolution of data with a kernel."""
    side = next(i for i, w in enumerate(own) if w is not None)
    layout = product_layout(eqn, side=1 - side)
    if not isinstance(layout, ConvLayout):
        return Lost("conv_general_dilated")
    w = own[side].transpose(layout.data_spec[0], *layout.data_spec[2:], layout.data_spec[1]).min(-1, keepdims=True)
    w = _pooled(eqn, w, layout.pooling, cut)
    return w.transpose(np.argsort((layout.out_spec[0], *layout.out_spec[2:], layout.out_spec[1])))


def _pooled(eqn, w, windows, cut):
    """The smallest weight in each window. Notes windows that would lie elsewhere if the padding were removed."""
    out = pooled(w, *windows)
    _, strides, padding, _, _ = windows
    counts = w > 0
    for axis, n in enumerate(w.shape):
        low, high = padding[axis]
        if n == 1:
            continue
        flags = []
        if strides[axis] > 1:
            flags.append(starts_late(counts, axis))
            if low > 0 or high > 0:  # the amount of padding, and so the place of the windows, depends on the length
                flags.append((~counts.all(axis) & counts.any(axis)).any())
        else:
            place = lax.broadcasted_iota(jnp.float32, w.shape, axis)
            at = lambda which, sign, place=place: pooled(jnp.where(which, sign * place, jnp.inf), *windows)
            both = jnp.isfinite(at(counts, 1)) & jnp.isfinite(at(~counts, 1))
            if high > 0:  # beyond the last row that counts; the smallest -place is the last place
                flags.append((both & (at(~counts, -1) < at(counts, -1))).any())
            if low > 0:
                flags.append((both & (at(~counts, 1) < at(counts, 1))).any())
        name = "Windows of a convolution" if eqn.primitive.name == "conv_general_dilated" else "Windows of a pooling"
        note(cut, name, flags)
    return out


def starts_late(counts, axis):
    """True if rows that count come after padding anywhere along an axis."""
    return (~lax.index_in_dim(counts, 0, axis, False) & counts.any(axis)).any()

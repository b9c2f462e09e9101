"""The Gram of a convolution of stride 1 from correlations of its input, without making patches.

A patch is the input at p + d - lo for every offset d of the window. The entry of two offsets d and d' is a sum over
positions q = p + d - lo of x(q) x(q + d' - d): it depends on the offsets only by their difference, and by which positions q
lie at an output for d. So one product of the input with its copies at all differences serves every pair of offsets; a kernel
of 3 x 3 has 25 differences for its 81 pairs, 13 where the product is symmetric. Positions near an edge are summed apart, one
region for each, because not every offset sees them.
"""

import dataclasses
import itertools
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..scalar.pytree import register_dataclass
from .each import each
from .gram import Gram, at_least_float32
from .layout import ConvLayout, Layout

_static = {"static": True}
Padding = tuple[tuple[int, int], ...]


def correlates(layout: Layout, shape: tuple[int, ...]) -> bool:
    """Whether the Gram of this product, for a data operand of that shape, can be made so, and with less arithmetic."""
    if not isinstance(layout, ConvLayout) or math.prod(layout.window) == 1:
        return False
    if any(n != 1 for n in (*layout.strides, *layout.dilation, *layout.data_dilation)):
        return False
    space = [shape[i] for i in layout.data_spec[2:]]
    edges = [_edges(k, pad) for k, pad in zip(layout.window, layout.padding, strict=True)]
    regions = math.prod(a + 1 + b for a, b in edges)
    return all(low >= 0 and high >= 0 for low, high in layout.padding) and regions <= 25 and all(
        n > a + b for n, (a, b) in zip(space, edges, strict=True)
    )  # fmt: skip


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Correlations:
    """Sums over rows, as of `Gram`, by region of the image and difference of offsets; c are channels of one group."""

    H: jax.Array  # (B, regions, c, differences that are not below 0, c)
    C: jax.Array | None  # (B, regions, c, differences, c)
    drift: jax.Array | None
    sum_X: jax.Array  # (B, regions, c)
    sum_Xq: jax.Array
    count: jax.Array  # ()
    window: tuple[int, ...] = dataclasses.field(metadata=_static)
    padding: Padding = dataclasses.field(metadata=_static)

    @classmethod
    def of(cls, layout: ConvLayout, x: jax.Array, xq: jax.Array | None = None) -> Self:
        """Those of one batch."""
        window, padding = layout.window, layout.padding
        X, Xq = (None if v is None else _grouped(layout, at_least_float32(v)) for v in (x, xq))
        assert X is not None
        quantized = X if Xq is None else Xq
        samples, space = X.shape[1], X.shape[2:-1]
        rows = math.prod(n + low + high - k + 1 for n, (low, high), k in zip(space, padding, window, strict=True))
        ahead, around = _differences(window, ahead=True), _differences(window)

        def one(X, D, Xq):
            parts = lambda x, y, differences: _correlate(x, y, differences, window, padding)
            H = parts(Xq, Xq, ahead)
            sums = [_region_sums(x, window, padding) for x in (X, Xq)]
            return (H, None, None, *sums) if D is None else (H, parts(Xq, D, around), parts(D, D, ahead), *sums)

        H, C, drift, sum_X, sum_Xq = each(one, X, None if Xq is None else X - Xq, quantized)
        return cls(H, C, drift, sum_X, sum_Xq, jnp.asarray(samples * rows, X.dtype), window, padding)

    def merge(self, other: Self) -> Self:
        """Those of both sets of rows."""
        return jax.tree.map(jnp.add, self, other)

    def gram(self) -> Gram:
        """The Gram of the patches, with a leading axis of matrices."""
        seen = jnp.asarray(_seen(self.window, self.padding), self.H.dtype)  # (offsets, regions)
        spread = lambda sums: jnp.einsum("dr,brc->bdc", seen, sums, precision="highest").reshape(sums.shape[0], -1)
        square: Any = lambda M: None if M is None else _square(seen, M, self.window)
        whole = None if self.C is None else _whole(seen, self.C, self.window)
        count = jnp.broadcast_to(self.count, self.H.shape[:1])
        return Gram(square(self.H), whole, square(self.drift), spread(self.sum_X), spread(self.sum_Xq), count)


def copies(layout: ConvLayout, networks: int) -> int:
    """How many copies of the input are made on the way."""
    around = len(_differences(layout.window))
    return around // 2 + 1 + (networks - 1) * around


def _grouped(layout, x):
    """The data operand as (groups, sample, *space, channel)."""
    x = x.transpose(layout.data_spec[0], *layout.data_spec[2:], layout.data_spec[1])
    return jnp.moveaxis(x.reshape(*x.shape[:-1], layout.groups, -1), -2, 0)


def _edges(size, padding):
    """How many positions at the beginning and at the end of an axis some offset does not see."""
    low, high = padding
    return max(0, size - 1 - low), max(0, size - 1 - high)


def _runs(n, size, padding):
    """The regions of an axis of n: each position near an edge, and the rest as one."""
    a, b = _edges(size, padding)
    return [*((i, 1) for i in range(a)), (a, n - a - b), *((n - b + i, 1) for i in range(b))]


def _seen(window, padding):
    """(offsets, regions): whether an offset sees the positions of a region."""
    axes = []
    for size, (low, high) in zip(window, padding, strict=True):
        a, b = _edges(size, (low, high))
        first = [[i >= d - low for i in range(a)] for d in range(size)]
        last = [[b - 1 - i >= size - 1 - high - d for i in range(b)] for d in range(size)]
        axes.append(np.array([[*x, True, *y] for x, y in zip(first, last, strict=True)]))
    seen = np.ones((1, 1), bool)
    for axis in axes:
        seen = np.einsum("ij,kl->ikjl", seen, axis).reshape(seen.shape[0] * axis.shape[0], -1)
    return seen


def _differences(window, ahead=False):
    """All differences of two offsets, in order; those not below 0 if `ahead`."""
    found = list(itertools.product(*(range(1 - k, k) for k in window)))
    return found[len(found) // 2 :] if ahead else found


def _correlate(x, y, differences, window, padding):
    """(regions, c, differences, c): sums over the samples and positions q of x(q) y(q + difference)."""
    space, c = x.shape[1:-1], x.shape[-1]
    y = jnp.pad(y, [(0, 0), *((k - 1, k - 1) for k in window), (0, 0)])
    parts = []
    for region in itertools.product(*(_runs(n, k, pad) for n, k, pad in zip(space, window, padding, strict=True))):
        sizes = [size for _, size in region]
        at = lambda z, shift: lax.slice(
            z, (0, *shift, 0), (z.shape[0], *(s + n for s, n in zip(shift, sizes, strict=True)), c)
        )
        own = at(x, [first for first, _ in region]).reshape(-1, c)
        shifts = [[f + s + k - 1 for (f, _), s, k in zip(region, d, window, strict=True)] for d in differences]
        copies = jnp.stack([at(y, shift) for shift in shifts], -2).reshape(own.shape[0], -1)
        parts.append(jnp.matmul(own.T, copies, precision="highest").reshape(c, len(differences), c))
    return jnp.stack(parts)


def _region_sums(x, window, padding):
    """(regions, c)"""
    space = x.shape[1:-1]
    parts = []
    for region in itertools.product(*(_runs(n, k, pad) for n, k, pad in zip(space, window, padding, strict=True))):
        cut = x[(slice(None), *(slice(first, first + size) for first, size in region))]
        parts.append(cut.sum(range(x.ndim - 1)))
    return jnp.stack(parts)


def _whole(seen, M, window):
    """The matrices (B, in, in) of correlations with all differences."""
    place = {d: i for i, d in enumerate(_differences(window))}
    offsets = list(itertools.product(*map(range, window)))
    between = np.array([[place[tuple(np.subtract(b, a))] for b in offsets] for a in offsets])
    return _laid(_by_offset(seen, M)[:, np.arange(len(offsets))[:, None], between])


def _square(seen, M, window):
    """The symmetric matrices (B, in, in) of correlations with differences that are not below 0."""
    ahead = {d: i for i, d in enumerate(_differences(window, ahead=True))}
    offsets = list(itertools.product(*map(range, window)))
    count = len(offsets)
    between = np.array([[ahead.get(tuple(np.subtract(b, a)), 0) for b in offsets] for a in offsets])
    blocks = _by_offset(seen, M)[:, np.arange(count)[:, None], between]  # (B, d, d', c, c), right for d' not before d
    upper = np.triu(np.ones((count, count), bool))[:, :, None, None]
    return _laid(jnp.where(upper, blocks, blocks.transpose(0, 2, 1, 4, 3)))


def _by_offset(seen, M):
    """(B, offsets, differences, c, c): what each offset sees of the regions."""
    return jnp.einsum("dr,brcsk->bdsck", seen, M, precision="highest")


def _laid(blocks):
    """(B, d, d', c, c) as matrices over (offset, channel)."""
    B, count, _, c, _ = blocks.shape
    return blocks.transpose(0, 1, 3, 2, 4).reshape(B, count * c, count * c)

"""The Gram of a convolution of stride 1 from correlations of its input, without making patches.

A patch is the input at p + d - lo for every offset d of the window. The entry of two offsets d and d' is a sum over
positions q = p + d - lo of x(q) x(q + d' - d): it depends on the offsets only by their difference, and by which positions q
lie at an output for d. So one product of the input with its copies at all differences serves every pair of offsets; a
kernel of 3 x 3 has 25 differences for its 81 pairs, of which 13 tell the others. Positions near an edge are summed apart,
one region for each, because not every offset sees them. Where the two networks differ, Xq and X - Xq are channels of one
input: H, C and drift are blocks of one symmetric matrix.
"""

import dataclasses
import itertools
import math
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..scalar.pytree import register_dataclass
from .arrays import at_least_float32
from .gram import Gram
from .lanes import each
from .layout import ConvLayout, Layout

PAYS = 2**35  # operations: most of a second on two cores
_static = {"static": True}
Padding = tuple[tuple[int, int], ...]


def correlates(layout: Layout, shape: tuple[int, ...]) -> bool:
    """True if the Gram of this product, for a data operand of that shape, can be made so, and with less arithmetic."""
    if not isinstance(layout, ConvLayout) or math.prod(layout.window) == 1:
        return False
    if any(n != 1 for n in (*layout.strides, *layout.dilation, *layout.data_dilation)):
        return False
    space = [shape[i] for i in layout.data_spec[2:]]
    edges = _all_edges(layout)
    return all(low >= 0 and high >= 0 for low, high in layout.padding) and _regions(layout) <= 25 and all(
        n > a + b for n, (a, b) in zip(space, edges, strict=True)
    )  # fmt: skip


def pays(layout: Layout, rows: int) -> bool:
    """True if patches of so many rows in all would take longer to multiply than a program of correlations to compile."""
    B, n, _ = layout.dims
    return 5 * B * rows * n * n > PAYS


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Correlations:
    """Sums over rows, as of `Gram`, by region of the image and difference of offsets.

    k are the channels of one group: c of Xq, then, where the networks differ, c of X - Xq.
    """

    products: jax.Array  # (B, regions, k, differences that are not below 0, k)
    sums: jax.Array  # (B, regions, k)
    count: jax.Array  # ()
    networks: int = dataclasses.field(metadata=_static)  # 2 where they differ
    window: tuple[int, ...] = dataclasses.field(metadata=_static)
    padding: Padding = dataclasses.field(metadata=_static)

    @classmethod
    def of(cls, layout: ConvLayout, x: jax.Array, xq: jax.Array | None = None) -> Self:
        """Those of one batch."""
        window, padding = layout.window, layout.padding
        X = Z = _grouped(layout, at_least_float32(x))
        if xq is not None:
            Xq = _grouped(layout, at_least_float32(xq))
            Z = jnp.concatenate([Xq, X - Xq], -1)
        samples, space = X.shape[1], X.shape[2:-1]
        rows = math.prod(n + low + high - k + 1 for n, (low, high), k in zip(space, padding, window, strict=True))
        products, sums = each(lambda z: _correlate(z, window, padding), Z)
        networks = 1 if xq is None else 2
        return cls(products, sums, jnp.asarray(samples * rows, X.dtype), networks, window, padding)

    def merge(self, other: Self) -> Self:
        """Those of both sets of rows."""
        return jax.tree.map(jnp.add, self, other)

    def gram(self) -> Gram:
        """The Gram of the patches, with a leading axis of matrices."""
        seen = jnp.asarray(_seen(self.window, self.padding), self.sums.dtype)  # (offsets, regions)
        sums = jnp.einsum("dr,brk->bdk", seen, self.sums, precision="highest")
        count = jnp.broadcast_to(self.count, sums.shape[:1])
        c = sums.shape[-1] // self.networks
        quantized, less = slice(0, c), slice(c, None)
        block = lambda left, right: self._block(seen, left, right)
        sum_q = sums[..., quantized]
        flat = lambda sums: sums.reshape(len(sums), -1)
        if self.networks == 1:
            return Gram(block(quantized, quantized), None, None, flat(sum_q), flat(sum_q), count)
        H, C, drift = block(quantized, quantized), block(quantized, less), block(less, less)
        return Gram(H, C, drift, flat(sum_q + sums[..., less]), flat(sum_q), count)

    def _block(self, seen, left, right):
        """The matrices (B, in, in) of two runs of channels."""
        ahead = {d: i for i, d in enumerate(_differences(self.window))}
        offsets = list(itertools.product(*map(range, self.window)))
        pairs = np.array([[ahead.get(tuple(np.subtract(b, a)), -1) for b in offsets] for a in offsets])

        def by_offsets(first, second):  # (B, d, d', first, second), right for d' not before d
            products = self.products[:, :, first, :, second]
            # (B, offsets, differences, ..): what each offset sees of the regions
            sums = jnp.einsum("dr,brcsk->bdsck", seen, products, precision="highest")
            return sums[:, np.arange(len(offsets))[:, None], pairs]

        below = by_offsets(right, left).transpose(0, 2, 1, 4, 3)
        blocks = jnp.where((pairs >= 0)[:, :, None, None], by_offsets(left, right), below)
        B, count, _, c, k = blocks.shape
        return blocks.transpose(0, 1, 3, 2, 4).reshape(B, count * c, count * k)


def copies(layout: ConvLayout, networks: int) -> int:
    """The number of copies of the input that are made on the way."""
    return networks * len(_differences(layout.window))


def at_a_time(layout: ConvLayout, size: int, networks: int, elements: int) -> int:
    """The number of samples of `size` elements to sum together: their copies come to `elements`, or to twice the sums."""
    k = networks * layout.shape[layout.spec[1]]
    sums = layout.groups * _regions(layout) * k * (k * copies(layout, 1) + 1)
    return max(1, max(elements, 2 * sums) // (copies(layout, networks) * size))


def _regions(layout):
    return math.prod(a + 1 + b for a, b in _all_edges(layout))


def _all_edges(layout):
    return [_edges(k, pad) for k, pad in zip(layout.window, layout.padding, strict=True)]


def _grouped(layout, x):
    """The data operand as (groups, sample, *space, channel)."""
    x = x.transpose(layout.data_spec[0], *layout.data_spec[2:], layout.data_spec[1])
    return jnp.moveaxis(x.reshape(*x.shape[:-1], layout.groups, -1), -2, 0)


def _edges(size, padding):
    """The numbers of positions at the beginning and at the end of an axis that some offset does not see."""
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


def _differences(window):
    """The differences of two offsets that are not below 0, in order: 0 and half of the others."""
    found = list(itertools.product(*(range(1 - k, k) for k in window)))
    return found[len(found) // 2 :]


def _correlate(z, window, padding):
    """Sums over the samples and the positions q of each region.

    z(q) z(q + difference), (regions, k, differences, k), and z(q), (regions, k), for z (sample, *space, k).
    """
    space, k = z.shape[1:-1], z.shape[-1]
    differences = _differences(window)
    around = jnp.pad(z, [(0, 0), *((n - 1, n - 1) for n in window), (0, 0)])
    products, sums = [], []
    for region in itertools.product(
        *(_runs(n, size, pad) for n, size, pad in zip(space, window, padding, strict=True))
    ):
        first, sizes = zip(*region, strict=True)
        at = lambda x, start: lax.slice(x, (0, *start, 0), (len(x), *np.add(start, sizes), k))
        own = at(z, first).reshape(-1, k)
        shifted = [at(around, np.add(first, d) + np.subtract(window, 1)) for d in differences]
        copies = jnp.stack(shifted, -2).reshape(len(own), -1)
        products.append(jnp.matmul(own.T, copies, precision="highest").reshape(k, len(differences), k))
        sums.append(own.sum(0))
    return jnp.stack(products), jnp.stack(sums)

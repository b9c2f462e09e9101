"""Patches: the windows of a convolution's input that are its calibration rows."""

import abc
import dataclasses
import functools
import math

import jax
import numpy as np

from ..scalar.grid import Number, is_number
from ..scalar.predicates import is_count
from ..scalar.pytree import register_dataclass
from .layout import ConvLayout, Layout

GOLDEN, SILVER = (5**0.5 - 1) / 2, 2**0.5 - 1


class Patches(abc.ABC):
    """A choice among the windows. Layers that are no convolutions use all their rows.

    Examples:
        >>> rule = jpfq.Rule(".*", bits=4, patches=jpfq.patches.All())
    """

    @property
    def random(self) -> bool:
        """True if a key is needed."""
        return False

    @abc.abstractmethod
    def layout(self, layout: Layout) -> Layout:
        """The layout whose rows are chosen from."""

    def pick(
        self, layout: Layout, rows: tuple[int, ...], key: jax.Array | None, total: int = 0, batch: int = 0
    ) -> jax.Array | None:
        """Indices of the rows to take, of all `rows` of a batch, as if these were one axis; None for all.

        Args:
            layout: of the product.
            rows: axes of the rows of this batch.
            key: of this batch, for a choice that is random.
            total: how many rows all batches have.
            batch: the index of this batch.
        """
        del layout, rows, key, total, batch
        return None


@register_dataclass
@dataclasses.dataclass(frozen=True)
class All(Patches):
    """Every window that the layer itself looks at.

    Examples:
        >>> jpfq.patches.All().random
        False
    """

    def layout(self, layout):
        return layout


@register_dataclass
@dataclasses.dataclass(frozen=True)
class AtMost(Patches):
    """About `per_input` windows for each input of the layer, spread evenly over all windows of all batches.

    Neighbouring windows say much the same, and there are thousands for each input (`bench/windows.py`). All are taken where
    there are not twice as many, and where rows have weights.

    Examples:
        >>> rule = jpfq.Rule(".*", bits=4, patches=jpfq.patches.AtMost(32))  # in less time
    """

    per_input: int = dataclasses.field(default=128, metadata={"static": True})

    def __post_init__(self):
        if not is_count(self.per_input):
            raise ValueError(f"AtMost takes a positive number of windows for each input; got {self.per_input!r}.")

    def layout(self, layout):
        return layout

    def pick(self, layout, rows, key, total=0, batch=0):
        here, wanted = math.prod(rows), self.per_input * layout.dims[1]
        if not isinstance(layout, ConvLayout) or total <= 2 * wanted:
            return None
        return jax.device_put(_spread(here, max(1, round(wanted * here / total)), batch))


@functools.lru_cache(maxsize=64)
def _spread(total, count, batch):
    """`count` indices below `total`, spread evenly by multiples of the golden ratio, which no width of an image divides."""
    places = (np.arange(count) * GOLDEN + batch * SILVER) % 1
    return np.sort((places * total).astype(np.int32))


@register_dataclass
@dataclasses.dataclass(frozen=True)
class NonOverlapping(Patches):
    """Windows side by side, the stride as large as the kernel (GPFQ22, SPFQ).

    Examples:
        >>> rule = jpfq.Rule(".*", bits=4, patches=jpfq.patches.NonOverlapping())
    """

    def layout(self, layout):
        if not isinstance(layout, ConvLayout):
            return layout
        reach = ((size - 1) * dilation + 1 for size, dilation in zip(layout.window, layout.dilation, strict=True))
        return dataclasses.replace(layout, strides=tuple(reach))


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Random(Patches):
    """A share of the windows, drawn with replacement (GPFQ22 with .25), in each batch anew.

    `stride` says which windows are drawn from: `All()` or `NonOverlapping()`.

    Examples:
        >>> rule = jpfq.Rule(".*", bits=4, patches=jpfq.patches.Random(0.25, jpfq.patches.NonOverlapping()))  # takes a key
    """

    share: Number = dataclasses.field(default=0.25, metadata={"static": True})
    stride: Patches = All()

    def __post_init__(self):
        if not is_number(self.share) or not 0 < self.share <= 1:
            raise ValueError(f"Random takes a share of the windows in (0, 1]; got {self.share!r}.")

    @property
    def random(self):
        return True

    def layout(self, layout):
        return self.stride.layout(layout)

    def pick(self, layout, rows, key, total=0, batch=0):
        if not isinstance(layout, ConvLayout) or key is None:
            return None
        total = math.prod(rows)
        return jax.random.randint(key, (max(1, round(self.share * total)),), 0, total)


DEFAULT = AtMost()

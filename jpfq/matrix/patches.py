"""Patches: which windows of a convolution's input are its calibration rows."""

import abc
import dataclasses
import math

import jax

from ..scalar.grid import Number, is_number
from ..scalar.pytree import register_dataclass
from .layout import ConvLayout, Layout


class Patches(abc.ABC):
    """A choice among the windows. Layers that are no convolutions use all their rows.

    Example:
        >>> rule = jpfq.Rule(".*", bits=4, patches=jpfq.patches.All())
    """

    @property
    def random(self) -> bool:
        """True if a key is needed."""
        return False

    @abc.abstractmethod
    def layout(self, layout: Layout) -> Layout:
        """The layout whose rows are chosen from."""

    def pick(self, layout: Layout, rows: tuple[int, ...], key: jax.Array | None) -> jax.Array | None:
        """Numbers of the rows to take, of all `rows`, as if these were one axis; None for all."""
        del layout, rows, key
        return None


@register_dataclass
@dataclasses.dataclass(frozen=True)
class All(Patches):
    """Every window that the layer itself looks at.

    Example:
        >>> jpfq.patches.All().random
        False
    """

    def layout(self, layout):
        return layout


@register_dataclass
@dataclasses.dataclass(frozen=True)
class NonOverlapping(Patches):
    """Windows side by side, the stride as large as the kernel (GPFQ22, SPFQ).

    Example:
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

    Example:
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

    def pick(self, layout, rows, key):
        if not isinstance(layout, ConvLayout) or key is None:
            return None
        total = math.prod(rows)
        return jax.random.randint(key, (max(1, round(self.share * total)),), 0, total)

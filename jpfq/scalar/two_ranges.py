"""A grid of a fine and a coarse range, for kernels with a few large weights, as re-parameterized networks have them."""

import dataclasses
import functools
from typing import Any

import numpy as np

from .predicates import is_count
from .pytree import refuse_traced, register_dataclass
from .tables import Table

RATIOS = (2, 4, 8, 16, 32)
BINS = 4096  # of the histogram that `fit` looks at
CLIPS = np.linspace(0.3, 1.0, 15)  # shares of the radius that `fit` puts the top level on


@register_dataclass
@dataclasses.dataclass(frozen=True)
class TwoRanges(Table):
    """2^bits levels: all integers up to `fine`, and beyond it multiples of `ratio`, with one more below 0 than above.

    A kernel on it is the sum of two kernels of integers with steps of their own, as in coarse and fine weight splitting
    (arXiv 2312.10588): see `QTensor.split`. Its levels are integers, so that accumulators and certificates take it.

    Args:
        bits: of a code, from 2 to 8.
        fine: the largest level of the fine range, from 1 to 2^(bits - 1) - 1, where no coarse range is left above 0.
        ratio: of the two steps: 2, 4, 8, 16 or 32, with which products are exact.

    Examples:
        >>> jpfq.TwoRanges(4, fine=5, ratio=4).values
        (-16.0, -12.0, -8.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 8.0, 12.0)
    """

    bits: int = dataclasses.field(metadata={"static": True})
    fine: int = dataclasses.field(metadata={"static": True})
    ratio: int = dataclasses.field(metadata={"static": True})

    def __post_init__(self):
        for name in ("bits", "fine", "ratio"):
            refuse_traced("TwoRanges", name, getattr(self, name))
        _check_width(self.bits)
        most = 2 ** (self.bits - 1) - 1
        if not is_count(self.fine) or self.fine > most:
            raise ValueError(f"TwoRanges: fine is from 1 to {most} at {self.bits} bits; got {self.fine!r}.")
        if not is_count(self.ratio) or self.ratio not in RATIOS:
            raise ValueError(f"TwoRanges: ratio is one of {', '.join(map(str, RATIOS))}; got {self.ratio!r}.")

    @functools.cached_property
    def parts(self) -> tuple[np.ndarray, np.ndarray]:
        """An integer of the fine kernel and one of the coarse for each code (levels,); one of them is 0."""
        above = 2 ** (self.bits - 1) - 1 - self.fine
        first = self.fine // self.ratio + 1
        coarse = np.arange(first, first + above + 1)
        fine = np.concatenate([0 * coarse, np.arange(-self.fine, self.fine + 1), 0 * coarse[:-1]])
        return fine, np.concatenate([-coarse[::-1], np.zeros(2 * self.fine + 1, int), coarse[:-1]])

    @property
    def values(self):  # type: ignore[override]
        fine, coarse = self.parts
        return tuple(float(x) for x in fine + self.ratio * coarse)

    def alphabet(self):
        return super().alphabet()._replace(reach=self.values[-1])

    @classmethod
    def fit(cls, weights: Any, bits: int, importance: Any = None) -> "TwoRanges":
        """The split of least weighted square error for numbers, of all `fine` and `ratio`; one range is among them.

        For each split the top level is tried on several shares of the radius, as a search of steps will do.

        Args:
            weights: numbers of any shape, each divided by the largest magnitude among those that share a step.
            bits: of a code, from 2 to 8.
            importance: what a square error of each costs, of a shape that broadcasts to theirs, such as diag(H)[:, None];
                left out, all count alike.

        Raises:
            ValueError: the numbers are not finite, or lie beyond -1 and 1.

        Examples:
            >>> jpfq.TwoRanges.fit([0.01, -0.02, 0.03, 1.0], bits=3)
            TwoRanges(bits=3, fine=2, ratio=32)
        """
        _check_width(bits)
        x = np.asarray(weights, np.float64)
        w = np.broadcast_to(1.0 if importance is None else np.asarray(importance, np.float64), x.shape)
        if not x.size or not (np.abs(x) <= 1).all() or not (np.isfinite(w).all() and (w >= 0).all() and w.any()):
            raise ValueError(
                "TwoRanges.fit takes numbers from -1 to 1, divided by the largest magnitude among those that share a step, "
                "and importance that is finite, positive somewhere and nowhere below 0."
            )
        mass, moment = (np.histogram(x, BINS, (-1, 1), weights=y)[0] for y in (w, w * x))
        at = moment / np.where(mass > 0, mass, 1)
        at, mass = at[mass > 0], mass[mass > 0]
        return min(
            (cls(bits, fine, ratio) for ratio in RATIOS for fine in range(1, 2 ** (bits - 1))),
            key=lambda grid: min(_square_error(np.array(grid.values), at / clip, mass) * clip**2 for clip in CLIPS),
        )


def _square_error(values, at, mass):
    """The weighted square error of numbers rounded to levels over the top one."""
    levels = values / values[-1]
    nearest = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, at)]
    return float(mass @ (nearest - at) ** 2)


def _check_width(bits) -> None:
    if not is_count(bits, 2) or bits > 8:
        raise ValueError(f"TwoRanges takes from 2 to 8 bits; got {bits!r}.")

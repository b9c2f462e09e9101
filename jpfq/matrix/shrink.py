"""Shrinkage: correlations that few calibration rows have by chance are removed, so that codes fit other rows as well.

A Gram of m rows has n^2 / 2 correlations, most of them noise when m is not far above n. A method that inverts it, or
descends on it, fits that noise: plain rounding then does better on new rows. The cure is old (Stein; Ledoit, Wolf 2004;
Schaefer, Strimmer 2005) and not in the papers of these methods, which damp by a multiple of the identity.
"""

import dataclasses

import jax.numpy as jnp

from ..scalar.grid import Number
from ..scalar.predicates import may_be
from ..scalar.pytree import register_dataclass
from .gram import Gram, mean_energy

CLOSE = 16  # rows beyond one per input from which on nothing is done about few
RARE = 4  # mean rows that an input of less energy is taken to have been seen in
SLOPE = 16  # rows that the slope common to all coordinates is worth


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Shrinkage:
    """The Gram as if `share` times n more rows had been seen, of inputs that are independent of each other.

    With k = share n / m: H + k diag(H), in which correlations are worth m / (m + share n) of what they were. Before, they
    lose what sampling alone would make of them: with a sum of squares sum c^2, of which sum (1 - c^2)^2 / (m - 1) is by
    chance, they are multiplied by 1 - chance / sum c^2; one row counts as two there. So are those of X - Xq with Xq.
    Inputs that are independent are thus rounded by themselves, and a large number of rows leaves all as it is. Metrics in
    `Info` are always those of the data themselves.

    Inputs that were 0 on all rows count as independent ones of mean energy: their weights are rounded by themselves, and
    steps have to suit them too.

    Fewer rows than inputs say little of each input by itself: a correlation of one row is 1, and an input that was large in
    none may be large elsewhere. With t = min(m / (n + 16), 1), less than 1 only there,

        H      has k (1 - t) (2 m / n + 2 / (m + 2)) mean(diag(H)) more on its diagonal: a variance of m rows errs by 2 / m
        chance is sum (1 - t c^2)^2 / (m - 1)
        C_ii   goes to the slope that all coordinates share, sum C_ii / sum H_ii, as if 16 (1 - t) more rows had shown it

    Of any number of rows, an input of less energy than 4 mean rows has it raised to that, in H and in its slope.

    Examples:
        >>> tensor, info = jpfq.solve(W, gram, bits=4, shrinkage=jpfq.Shrinkage(1.0))  # twice what is recommended
    """

    share: Number = 0.5

    def __post_init__(self):
        if not may_be(self.share, lambda x: x >= 0):
            raise ValueError(f"Shrinkage takes a share of 0 or more; got {self.share!r}.")

    def __call__(self, gram: Gram) -> Gram:
        """The Gram that quantizing is to see."""
        n, dtype = jnp.maximum(gram.n, 1).astype(gram.H.dtype), gram.H.dtype
        rows = jnp.maximum(gram.count, 1).astype(dtype)
        k = self.share * n / rows
        trust = jnp.minimum(rows / (n + CLOSE), 1)
        live, mean = gram.diagonal > 0, mean_energy(gram.diagonal)
        more = k * (1 - trust) * (2 * rows / n + 2 / (rows + 2)) * mean
        rare = jnp.maximum(RARE * mean / rows - gram.diagonal, 0)
        awake = gram.awake()
        H = _without_chance(awake.H, gram.diagonal, gram.diagonal, rows, trust)
        H += k * jnp.diag(awake.diagonal) + jnp.diag(jnp.where(live, more + (1 + k) * rare, 0))
        if gram.C is None or gram.drift is None:
            return dataclasses.replace(gram, H=H)
        diagonal = jnp.diag(jnp.diagonal(gram.C))
        C = (1 + k) * _without_chance(gram.C, gram.diagonal, jnp.diagonal(gram.drift), rows, trust)
        prior = SLOPE * (1 - trust) * mean / rows + rare
        slope = jnp.trace(diagonal) / jnp.where(live.any(), gram.diagonal.sum(), 1)
        slopes = (jnp.diagonal(diagonal) + prior * slope) / jnp.where(live, gram.diagonal + prior, 1)
        few = ((trust < 1) | (rare > 0))[:, None] & live[:, None] & jnp.eye(live.size, dtype=bool)
        return dataclasses.replace(gram, H=H, C=jnp.where(few, jnp.diag(slopes * jnp.diagonal(H)), C))


def _without_chance(M, left, right, rows, trust):
    """M (n, n), entries off its diagonal times the share of their correlations' squares that is not by chance.

    `left` and `right` (n,) are the square norms of the inputs that its rows and its columns are of.
    """
    root = lambda d: jnp.where(d > 0, 1 / jnp.sqrt(jnp.where(d > 0, d, 1)), 0)[:, None]
    others = (left > 0)[:, None] & (right > 0)[None] & ~jnp.eye(left.size, dtype=bool)
    c2 = jnp.where(others, M * root(left) * root(right).T, 0) ** 2
    chance = jnp.sum(jnp.where(others, (1 - trust * c2) ** 2, 0)) / jnp.maximum(rows - 1, 1)
    kept = 1 - jnp.clip(chance / jnp.where(c2.sum() > 0, c2.sum(), 1), 0, 1)
    return jnp.where(jnp.eye(left.size, dtype=bool), M, kept * M)

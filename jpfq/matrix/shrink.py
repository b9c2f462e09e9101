"""Shrinkage: what few calibration rows say by chance is taken back, so that codes fit rows not seen as well.

A Gram of m rows has n^2 / 2 correlations, most of them noise when m is not far above n. A method that inverts it, or
descends on it, fits that noise: plain rounding then does better on new rows. The cure is old (Stein; Ledoit, Wolf 2004;
Schaefer, Strimmer 2005) and not in the papers of these methods, which damp by a multiple of the identity.
"""

import dataclasses

import jax.numpy as jnp

from ..scalar.grid import Number, is_number
from ..scalar.pytree import register_dataclass
from .gram import Gram


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Shrinkage:
    """The Gram as if `share` times n more rows had been seen, of inputs that are independent of each other.

    With k = share n / m: H + k diag(H), in which correlations are worth m / (m + share n) of what they were. Those of X - Xq
    with Xq lose what sampling alone would make of them, sum (1 - c^2)^2 / m of their sum of squares sum c^2. A large number
    of rows leaves both as they are. Figures in `Info` are always those of the data themselves.

    Example:
        >>> tensor, info = jpfq.solve(W, gram, bits=4, shrinkage=jpfq.Shrinkage(1.0))  # twice what is recommended
    """

    share: Number = 0.5

    def __post_init__(self):
        if isinstance(self.share, (str, bool)) or (is_number(self.share) and not self.share >= 0):
            raise ValueError(f"Shrinkage takes a share of 0 or more; got {self.share!r}.")

    def __call__(self, gram: Gram) -> Gram:
        """The Gram that quantizing is to see."""
        n, dtype = gram.H.shape[0], gram.H.dtype
        rows = jnp.maximum(gram.count, 1).astype(dtype)
        k = self.share * n / rows
        H = gram.H + k * jnp.diag(gram.diagonal)
        if gram.C is None or gram.drift is None:
            return dataclasses.replace(gram, H=H)
        C, diagonal = gram.C, jnp.diag(jnp.diagonal(gram.C))
        root = lambda d: jnp.where(d > 0, 1 / jnp.sqrt(jnp.where(d > 0, d, 1)), 0)
        c2 = ((C - diagonal) * root(gram.diagonal)[:, None] * root(jnp.diagonal(gram.drift))[None]) ** 2
        live = (gram.diagonal > 0)[:, None] & (jnp.diagonal(gram.drift) > 0)[None] & ~jnp.eye(n, dtype=bool)
        chance = jnp.sum(jnp.where(live, (1 - c2) ** 2, 0)) / rows
        kept = 1 - jnp.clip(chance / jnp.where(c2.sum() > 0, c2.sum(), 1), 0, 1)
        return dataclasses.replace(gram, H=H, C=(1 + k) * (kept * C + (1 - kept) * diagonal))

"""Sigma-Delta, Beta and memoryless quantizers of vectors, and the condensation of their codes.

    SigmaDelta   order r: rounding errors are the r-th difference of bounded states u
    Beta         u_t = beta u_{t-1} + .., restarted from 0 in every block: distributed noise shaping
    Memoryless   every entry by itself: plain, stochastic, or semi-quantized

All use the midrise alphabet of 2K levels +-step/2, +-3 step/2, .. and condense: with a vector v of length `width`, every
`width` codes become one number <v, q>, in which the shaped errors nearly cancel.
"""

import abc
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..matrix import System, code_dtype
from ..matrix.explicit_mesh import run
from ..scalar import Equispaced, Nearest, Rounding, ScaledGrid, Stochastic, register_dataclass
from ..scalar.grid import Number
from ..scalar.predicates import is_count, may_be
from .noise_shaping import Shaped, Stability, feedback, row_indices, shape

# Filters h such that delta_0 - h has r vanishing moments, of small l1 norm as one bit requires (Zhang, Saab, ICLR 2021).
ONE_BIT = {1: {1: 1.0}, 2: {1: 7 / 6, 7: -1 / 6}, 3: {1: 175 / 144, 7: -25 / 108, 25: 7 / 432}}
DIFFERENCE = {1: {1: 1.0}, 2: {1: 2.0, 2: -1.0}}  # 1 - (1 - z)^r


class Quantizer(abc.ABC):
    """A filter, an alphabet, and the weights v for condensing.

    Examples:
        >>> quantizer = jpfq.embed.SigmaDelta(order=1, width=15, K=2)
        >>> codes, stability = quantizer(jnp.cos(jnp.arange(30.0))[None])
        >>> codes.shape, quantizer.fold(codes.astype(float)).shape
        ((1, 30), (1, 2))
    """

    K: int
    width: int
    step: Number | None
    rounding: Rounding = Nearest()

    @abc.abstractmethod
    def filter(self) -> dict[int, Number]:
        """The weights h_j, by lag j in ascending order."""

    @abc.abstractmethod
    def run(self, m: int) -> int:
        """The number of entries, of m, after which states restart from 0."""

    @property
    @abc.abstractmethod
    def weights(self) -> jax.Array | np.ndarray:
        """The vector v (width,) for condensing; a NumPy array of integers if sums of codes are stored."""

    @property
    def grid(self) -> Equispaced:
        """The alphabet: 2K levels, none of them 0."""
        return Equispaced(2 * self.K)

    @property
    def published_step(self) -> float:
        """The step of the papers, which puts the outermost levels on +-1."""
        return 2 / (2 * self.K - 1)

    @property
    def stable_step(self) -> Number:
        """The smallest step for which |y| <= 1 implies |u| <= step / 2: 1 / (K - |h|_1 / 2)."""
        return 1 / (self.K - self._norm / 2)

    @property
    def spacing(self) -> Number:
        """The step in use."""
        return self.stable_step if self.step is None else self.step

    @property
    def reach(self) -> Number:
        """The largest |y| for which |u| stays within the bound for all y."""
        return (self.K - self._norm / 2) * self.spacing

    @property
    def _norm(self):
        return sum(abs(h) for h in self.filter().values())

    def levels(self, dtype: Any = float) -> ScaledGrid:
        """The alphabet with its step, in the shape (1, 1) of a grid for all neurons."""
        lo, hi, zero, _ = self.grid.alphabet()
        step, zero, lo, hi = (jnp.asarray(x, dtype) for x in (self.spacing, zero, lo, hi))
        return ScaledGrid(step.reshape(1, 1), zero.reshape(1, 1), lo, hi)

    def shaped(self, dtype: Any = float) -> Shaped:
        """The rounding that carries the states."""
        h = self.filter()
        taps = jnp.stack([jnp.asarray(x, dtype) for x in h.values()]) if h else jnp.zeros(0, dtype)
        return Shaped(taps, self.rounding, tuple(h))

    def __call__(
        self, Y: jax.Array, key: jax.Array | None = None, first: jax.Array | int = 0
    ) -> tuple[jax.Array, Stability]:
        """Integer codes 0 .. 2K - 1 of vectors Y (.., m), and their largest states.

        Args:
            Y: measurements; the bound on the states holds if they lie within +-`reach`.
            key: for a random rounding; every vector has its own part of it.
            first: the index of the first vector, for data in chunks.
        """
        codes, peak = run(self.shape, Y, key, row_indices(Y.shape[:-1], first))
        return codes, self.stability(peak)

    def shape(self, Y: jax.Array, key: jax.Array | None, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The codes of vectors Y (.., m) with these indices (..), and the largest |u| of each (..)."""
        if self.rounding.random and key is None:
            raise ValueError(f"{type(self.rounding).__name__} draws random numbers: pass key=jax.random.key(seed).")
        m = Y.shape[-1]
        self.blocks(m)
        levels, rounding = self.levels(Y.dtype), self.shaped(Y.dtype)
        return shape(Y, levels, rounding, self.run(m), code_dtype(self.grid), key, indices)

    def stability(self, peak: jax.Array) -> Stability:
        """The largest |u| of each vector, with its bound."""
        return Stability(peak, self.rounding.error(self.levels(peak.dtype))[0, 0])

    def system(self, Y: jax.Array) -> System:
        """The same as matrices of q = Q(base + L (about - q)) for `matrix.substitute`, with vectors (rows, m) as columns.

        Costs O(m^2), while calling the quantizer costs O(m).
        """
        m, rounding = Y.shape[-1], self.shaped(Y.dtype)
        self.blocks(m)
        return System(Y.T, feedback(rounding.taps, rounding.lags, m, self.run(m)), Y.T, None)

    def blocks(self, m: int) -> int:
        """The number of values to which m codes are condensed."""
        if m % self.width or not m:
            near = [k * self.width for k in (m // self.width, m // self.width + 1) if k]
            raise ValueError(
                f"{m} measurements are not a multiple of width={self.width}, the number of codes that are condensed to one. "
                f"Take {' or '.join(map(str, near))}."
            )
        return m // self.width

    def fold(self, x: jax.Array) -> jax.Array:
        """<v, x> for every `width` entries: (.., m) to (.., p)."""
        x = x.reshape(*x.shape[:-1], self.blocks(x.shape[-1]), self.width)
        v = jnp.asarray(self.weights, x.dtype)
        return jnp.matmul(x, v, precision="highest")

    @property
    def stores_sums(self) -> bool:
        """True if sums <v, codes> are integers and therefore stored; False if the codes are stored."""
        return isinstance(self.weights, np.ndarray)

    @property
    def stored_levels(self) -> int:
        """The number of values that a stored number may take."""
        return (2 * self.K - 1) * int(sum(self.weights)) + 1 if self.stores_sums else 2 * self.K

    def to_store(self, codes: jax.Array) -> jax.Array:
        """The small integers that are stored for codes (.., m)."""
        self.blocks(codes.shape[-1])
        integers = codes.astype(jnp.int32)
        return self.fold(integers) if self.stores_sums else integers

    def condensed(self, stored: jax.Array, dtype: Any = float) -> jax.Array:
        """<v, q> (.., p) from the stored integers."""
        step, zero = (jnp.asarray(x, dtype) for x in (self.spacing, self.grid.alphabet().zero))
        if self.stores_sums:
            return step * (stored.astype(dtype) - zero * jnp.asarray(sum(self.weights), dtype))
        return self.fold(step * (stored.astype(dtype) - zero))

    def _check(self):
        name = type(self).__name__
        for what, x in (("K", self.K), ("width", self.width)):
            if not is_count(x):
                raise ValueError(f"{name}: {what} is an integer of at least 1; got {x!r}.")
        if not may_be(self.step, lambda x: 0 < x < math.inf):
            raise ValueError(f"{name} takes a positive step, or None for the stable one; got {self.step!r}.")


@register_dataclass
@dataclasses.dataclass(frozen=True)
class SigmaDelta(Quantizer):
    """Sigma-Delta quantization of order 1 or 2, and of order 3 with one bit (K = 1).

    With one bit the filters are those of Zhang and Saab (ICLR 2021), otherwise h = 1 - (1 - z)^order. v is the `order`-fold
    convolution of ones, hence width = order * n - order + 1 for some n. A `step` of None is the stable one; the published
    one is 2 / (2K - 1), with which order 2 may exceed the alphabet (see `Stability`). With few levels and a small width, the
    coarser stable step may cost more accuracy than that: compare both.

    Source: Zhang, Kannan, Cloninger, Saab (arXiv 2106.02614); Zhang, Saab (arXiv 2010.00712).

    Examples:
        >>> quantizer = jpfq.embed.SigmaDelta(order=2, width=5)
        >>> quantizer.weights.tolist()
        [1, 2, 3, 2, 1]
    """

    order: int = dataclasses.field(default=1, metadata={"static": True})
    width: int = dataclasses.field(default=15, metadata={"static": True})
    K: int = dataclasses.field(default=1, metadata={"static": True})
    step: Number | None = None

    def __post_init__(self):
        self._check()
        r = self.order
        if isinstance(r, bool) or r not in ONE_BIT:
            raise ValueError(f"SigmaDelta has orders 1, 2 and 3; got {r!r}.")
        if self.K > 1 and r not in DIFFERENCE:
            raise ValueError(f"SigmaDelta of order 3 is for one bit, K=1; got K={self.K}. Take order 2, or K=1.")
        if (self.width - 1) % r:
            low = 1 + (self.width - 1) // r * r
            raise ValueError(
                f"For order {r}, the width is {r} n - {r - 1} for some n; got width={self.width}. Take {low} or {low + r}."
            )

    @classmethod
    def published(cls, order: int, width: int, K: int = 1) -> "SigmaDelta":
        """With the step of the papers, 2 / (2K - 1).

        Args:
            order, width, K: as of the class.

        Examples:
            >>> jpfq.embed.SigmaDelta.published(order=1, width=15, K=2).step == 2 / 3
            True
        """
        plain = cls(order, width, K)
        return dataclasses.replace(plain, step=plain.published_step)

    def filter(self):
        return (ONE_BIT if self.K == 1 else DIFFERENCE)[self.order]

    def run(self, m):
        return m

    @property
    def weights(self):
        ones = np.ones((self.width - 1) // self.order + 1, int)
        v = ones
        for _ in range(self.order - 1):
            v = np.convolve(v, ones)
        return v


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Beta(Quantizer):
    """Distributed noise shaping: u_t = beta u_{t-1} + y_t - q_t in blocks of `width`, 1 < beta < 2K.

    v = (beta^-1, .., beta^-width). The paper scales y by (2K - beta) / (2K - 1) and takes the step 2 / (2K - 1). The default
    here, the stable step without scaling, gives the same codes and the same estimates. Sums of codes take as many values as
    there are blocks of codes, so the codes are stored.

    Source: Zhang, Kannan, Cloninger, Saab (arXiv 2106.02614).

    `K` and `step` are the same as in `SigmaDelta`.

    Examples:
        >>> quantizer = jpfq.embed.Beta(beta=1.9, width=12)
        >>> quantizer.stored_levels  # codes are stored, not sums
        2
    """

    beta: Number
    width: int = dataclasses.field(default=12, metadata={"static": True})
    K: int = dataclasses.field(default=1, metadata={"static": True})
    step: Number | None = None

    def __post_init__(self):
        self._check()
        if not may_be(self.beta, lambda x: 1 < x < 2 * self.K):
            raise ValueError(f"Beta takes 1 < beta < 2K = {2 * self.K}; got {self.beta!r}.")

    def filter(self):
        return {1: self.beta}

    def run(self, m):
        return self.width

    @property
    def weights(self):
        return jnp.asarray(self.beta, float) ** -jnp.arange(1.0, self.width + 1)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Memoryless(Quantizer):
    """Rounds every entry by itself to the nearest level; with K = 1 that is its sign. The outermost levels are +-1.

    `stochastic` and `semi_quantized` are the two baselines of the papers.

    `rounding` and `step` are those of each entry; a step of None puts the outermost levels on +-1.

    Examples:
        >>> signs = jpfq.embed.Memoryless()
        >>> codes, stability = signs(jnp.array([[0.3, -0.2]]))
        >>> codes.tolist()
        [[1, 0]]
    """

    K: int = dataclasses.field(default=1, metadata={"static": True})
    rounding: Rounding = Nearest()
    step: Number | None = None

    width = 1  # nothing is condensed

    def __post_init__(self):
        self._check()
        if not isinstance(self.rounding, Rounding):
            raise ValueError(f"rounding takes a Rounding, such as jpfq.rounding.Stochastic(); got {self.rounding!r}.")

    @classmethod
    def stochastic(cls, K: int = 1) -> "Memoryless":
        """StocQ: stochastic rounding, whose mean is the entry, so that products of two vectors' codes are unbiased."""
        return cls(K, Stochastic())

    @classmethod
    def semi_quantized(cls) -> "Memoryless":
        """Signs with values +-pi / 4, whose products with unquantized cosines are unbiased.

        Compare codes with the `features` of the other side: the product of two signs is biased.
        """
        return cls(1, Nearest(), math.pi / 2)

    @property
    def stable_step(self):
        return self.published_step

    @property
    def reach(self):
        return (self.K if isinstance(self.rounding, Nearest) else self.K - 1 / 2) * self.spacing

    def filter(self):
        return {}

    def run(self, m):
        return 1

    @property
    def weights(self):
        return np.ones(1, int)

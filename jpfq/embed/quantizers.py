"""Quantizers of embeddings: what noise shaping does to one vector, and how its codes are condensed.

    SigmaDelta   order r: rounding errors are what an r-th difference leaves of bounded states u
    Beta         u_t = beta u_{t-1} + .., from 0 again in every block: distributed noise shaping
    Memoryless   every entry by itself: plain, stochastic, or semi-quantized

All take the midrise alphabet of 2K levels +-step/2, +-3 step/2, .. and condense: with v of length `width`, every `width`
codes become one number <v, q>, in which the shaped errors all but cancel.
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
from ..scalar import Equispaced, Levels, Nearest, Rounding, Stochastic, register_dataclass
from ..scalar.grid import Number, is_number
from .noise_shaping import Shaped, Stability, feedback, numbered, shape

# Filters h = delta_0 - (something with r vanishing moments) of small l1 norm, which one bit needs (Zhang, Saab, ICLR 2021).
ONE_BIT = {1: {1: 1.0}, 2: {1: 7 / 6, 7: -1 / 6}, 3: {1: 175 / 144, 7: -25 / 108, 25: 7 / 432}}
DIFFERENCE = {1: {1: 1.0}, 2: {1: 2.0, 2: -1.0}}  # 1 - (1 - z)^r


class Quantizer(abc.ABC):
    """A filter, an alphabet, and the weights v that condense.

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
        """After how many of m entries the states start from 0 again."""

    @property
    @abc.abstractmethod
    def weights(self) -> jax.Array | np.ndarray:
        """The vector v (width,) that condenses; whole numbers where the sums of codes can be stored."""

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
        """The least step for which |y| <= 1 implies |u| <= step / 2: 1 / (K - |h|_1 / 2)."""
        return 1 / (self.K - self._norm / 2)

    @property
    def spacing(self) -> Number:
        """The step in use."""
        return self.stable_step if self.step is None else self.step

    @property
    def reach(self) -> Number:
        """The largest |y| for which |u| stays within the bound, whatever y is."""
        return (self.K - self._norm / 2) * self.spacing

    @property
    def _norm(self):
        return sum(abs(h) for h in self.filter().values())

    def levels(self, dtype: Any = float) -> Levels:
        """The alphabet with its step, in the shape of a grid for all neurons (1, 1)."""
        lo, hi, zero, _ = self.grid.alphabet()
        step, zero, lo, hi = (jnp.asarray(x, dtype) for x in (self.spacing, zero, lo, hi))
        return Levels(step.reshape(1, 1), zero.reshape(1, 1), lo, hi)

    def shaped(self, dtype: Any = float) -> Shaped:
        """The rounding that keeps the states."""
        h = self.filter()
        taps = jnp.stack([jnp.asarray(x, dtype) for x in h.values()]) if h else jnp.zeros(0, dtype)
        return Shaped(taps, self.rounding, tuple(h))

    def __call__(
        self, Y: jax.Array, key: jax.Array | None = None, first: jax.Array | int = 0
    ) -> tuple[jax.Array, Stability]:
        """Integer codes 0 .. 2K - 1 of vectors Y (.., m), and how large the states became.

        Args:
            Y: measurements; for the bound on the states to hold, within +-`reach`.
            key: for a rounding that draws; every vector uses its own part of it.
            first: the number of the first vector, for data that come in chunks.
        """
        codes, peak = run(self.shape, Y, key, numbered(Y.shape[:-1], first))
        return codes, self.stability(peak)

    def shape(self, Y: jax.Array, key: jax.Array | None, numbers: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The codes of vectors Y (.., m) of these numbers (..), and the largest |u| of each (..)."""
        if self.rounding.random and key is None:
            raise ValueError(f"{type(self.rounding).__name__} draws random numbers: pass key=jax.random.key(seed).")
        m = Y.shape[-1]
        self.blocks(m)
        levels, rounding = self.levels(Y.dtype), self.shaped(Y.dtype)
        return shape(Y, levels, rounding, self.run(m), code_dtype(self.grid), key, numbers)

    def stability(self, peak: jax.Array) -> Stability:
        """The largest |u| of each vector, with the bound that it is to be within."""
        return Stability(peak, self.rounding.error(self.levels(peak.dtype))[0, 0])

    def system(self, Y: jax.Array) -> System:
        """The same as the matrices of q = Q(base + L (about - q)), for `matrix.substitute`: vectors (rows, m) as columns.

        Costs O(m^2) where calling the quantizer costs O(m).
        """
        m, rounding = Y.shape[-1], self.shaped(Y.dtype)
        self.blocks(m)
        return System(Y.T, feedback(rounding.taps, rounding.lags, m, self.run(m)), Y.T, None)

    def blocks(self, m: int) -> int:
        """The number of values that m codes are condensed to."""
        if m % self.width or not m:
            near = [k * self.width for k in (m // self.width, m // self.width + 1) if k]
            raise ValueError(
                f"{m} measurements are no multiple of width={self.width}, the number of codes that are condensed to one. "
                f"Take {' or '.join(map(str, near))}."
            )
        return m // self.width

    def fold(self, x: jax.Array) -> jax.Array:
        """<v, x> of every `width` entries: (.., m) to (.., p)."""
        x = x.reshape(*x.shape[:-1], self.blocks(x.shape[-1]), self.width)
        v = jnp.asarray(self.weights, x.dtype)
        return jnp.matmul(x, v, precision="highest")

    @property
    def stores_sums(self) -> bool:
        """True if sums <v, codes> are whole numbers, and hence what is stored; else the codes are."""
        return isinstance(self.weights, np.ndarray)

    @property
    def stored_levels(self) -> int:
        """The number of values that a stored number may take."""
        return (2 * self.K - 1) * int(sum(self.weights)) + 1 if self.stores_sums else 2 * self.K

    def to_store(self, codes: jax.Array) -> jax.Array:
        """The small whole numbers that are stored for codes (.., m)."""
        self.blocks(codes.shape[-1])
        whole = codes.astype(jnp.int32)
        return self.fold(whole) if self.stores_sums else whole

    def condensed(self, stored: jax.Array, dtype: Any = float) -> jax.Array:
        """<v, q> (.., p) from what is stored."""
        step, zero = (jnp.asarray(x, dtype) for x in (self.spacing, self.grid.alphabet().zero))
        if self.stores_sums:
            return step * (stored.astype(dtype) - zero * jnp.asarray(sum(self.weights), dtype))
        return self.fold(step * (stored.astype(dtype) - zero))

    def _check(self):
        name = type(self).__name__
        for what, x in (("K", self.K), ("width", self.width)):
            if not isinstance(x, int) or isinstance(x, bool) or x < 1:
                raise ValueError(f"{name} takes a whole number {what} of at least 1; got {x!r}.")
        wrong_type = isinstance(self.step, (str, bool))
        if wrong_type or (is_number(self.step) and not 0 < self.step < math.inf):  # type: ignore[operator]
            raise ValueError(f"{name} takes a positive step, or None for the stable one; got {self.step!r}.")


@register_dataclass
@dataclasses.dataclass(frozen=True)
class SigmaDelta(Quantizer):
    """Sigma-Delta quantization of order 1 or 2, and of order 3 with one bit (K = 1).

    With one bit the filters are those of Zhang and Saab (ICLR 2021), else h = 1 - (1 - z)^order. v is the `order`-fold
    convolution of ones, hence width = order * n - order + 1 for some n. `step` is None for the stable one, or a number such
    as 2 / (2K - 1), the published one; with the latter, order 2 may run out of the alphabet (see `Stability`). Few levels
    and little condensing make the coarse stable step cost more than that: compare both.

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
                f"Order {r} condenses {r} n - {r - 1} codes to one number, for some n; got width={self.width}. "
                f"Take {low} or {low + r}."
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

    v = (beta^-1, .., beta^-width). The paper scales y by (2K - beta) / (2K - 1) and takes the step 2 / (2K - 1); the stable
    step on y as it is, the default here, gives the same codes and the same estimates. Sums of codes take as many values as
    there are blocks of codes, hence the codes are stored.

    Source: Zhang, Kannan, Cloninger, Saab (arXiv 2106.02614).

    `K` and `step` are as of `SigmaDelta`.

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
        if isinstance(self.beta, (str, bool)) or (is_number(self.beta) and not 1 < self.beta < 2 * self.K):
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
    """Every entry by itself, to the nearest level: K = 1 is the sign. The outermost levels are +-1.

    `stochastic` and `semi_quantized` make the two baselines of the papers.

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
        """StocQ: up or down at random with the entry as mean, so that products of two vectors' codes are unbiased."""
        return cls(K, Stochastic())

    @classmethod
    def semi_quantized(cls) -> "Memoryless":
        """The sign, at the values +-pi / 4, whose products with cosines that were not quantized are unbiased.

        Compare codes with `features` of the other side: of two signs the product is biased.
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

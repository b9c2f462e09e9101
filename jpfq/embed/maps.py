"""Fast random maps from n to m dimensions: sparse Gaussian matrices, and the same after a Hadamard transform.

They cost O(n m density), and the transform O(n log n). Both are sampled on the host by NumPy's generator, because the number
of nonzeros is random, and so is the size of the arrays.
"""

import abc
import dataclasses
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..matrix.explicit_mesh import is_traced
from ..scalar import register_dataclass
from ..scalar.predicates import is_count


class Map(abc.ABC):
    """A random linear map A whose entries have mean 0 and variance 1 or act like it: E <A_i, x>^2 = |x|^2.

    Examples:
        >>> map = jpfq.embed.SparseGaussian.sample(key, inputs=32, m=64, density=0.5)
        >>> map.inputs, map.m, map(X).shape
        (32, 64, (64, 64))
    """

    inputs: int

    @property
    @abc.abstractmethod
    def m(self) -> int:
        """The length of the resulting vectors."""

    @property
    @abc.abstractmethod
    def dtype(self) -> np.dtype:
        """The dtype of its entries."""

    @abc.abstractmethod
    def __call__(self, X: jax.Array) -> jax.Array:
        """A x for every vector: (.., n) to (.., m)."""


@register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseGaussian(Map):
    """Entries are nonzero with probability `density`, and then Gaussian of variance 1 / density. For well-spread vectors.

    The nonzeros of row i of A are in columns[:, i]. Shorter rows are padded with zeros in column 0.

    Fields: `columns` and `entries` (nonzeros, m), `inputs` = n.

    Examples:
        >>> map = jpfq.embed.SparseGaussian.sample(key, inputs=32, m=64, density=0.5)
        >>> measurements = map(X)
    """

    columns: jax.Array
    entries: jax.Array
    inputs: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def sample(cls, key: jax.Array, inputs: int, m: int, density: float) -> Self:
        """Samples the map. The key must not be traced.

        Args:
            key: for all random numbers.
            inputs: length of the vectors.
            m: length of the resulting vectors.
            density: share of nonzero entries.

        Examples:
            >>> map = jpfq.embed.SparseGaussian.sample(key, inputs=32, m=64, density=0.5)
        """
        _check(key, inputs, m, density)
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)).ravel().tolist())
        counts = rng.binomial(inputs, density, m)
        width = max(1, counts.max())
        columns, entries = np.zeros((width, m), np.int32), np.zeros((width, m))
        for i, count in enumerate(counts):
            columns[:count, i] = np.sort(rng.choice(inputs, count, replace=False, shuffle=False))
            entries[:count, i] = rng.standard_normal(count) / np.sqrt(density)
        return cls(jnp.asarray(columns), jnp.asarray(entries, float), inputs)

    @property
    def m(self):
        return self.entries.shape[-1]

    @property
    def dtype(self):
        return self.entries.dtype

    def __call__(self, X):
        """Adds one nonzero of every row of A at a time, so that no array is larger than the result."""
        X = jnp.moveaxis(X, -1, 0)
        along = lambda entry: entry.reshape(-1, *(1,) * (X.ndim - 1))
        add = lambda Y, one: (Y + along(one[1]) * X[one[0]], None)
        start = jnp.zeros((self.m, *X.shape[1:]), X.dtype)
        return jnp.moveaxis(lax.scan(add, start, (self.columns, self.entries))[0], 0, -1)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class FJLT(Map):
    """A H D: random signs D, the Hadamard transform H, which spreads a vector over all entries, and a sparse Gaussian A.

    Vectors are padded with zeros to the next power of two. Source: Ailon, Chazelle (SICOMP 2009).

    Fields: `signs` (n,), and `sparse`, the matrix A.

    Examples:
        >>> map = jpfq.embed.FJLT.sample(key, inputs=30, m=64, density=0.3)
        >>> map(X[:, :30]).shape
        (64, 64)
    """

    signs: jax.Array
    sparse: SparseGaussian

    @classmethod
    def sample(cls, key: jax.Array, inputs: int, m: int, density: float) -> Self:
        """Samples the map. The key must not be traced.

        Args:
            key: for all random numbers.
            inputs: length of the vectors.
            m: length of the resulting vectors.
            density: share of nonzero entries of A.

        Examples:
            >>> map = jpfq.embed.FJLT.sample(key, inputs=32, m=64, density=0.3)
        """
        _check(key, inputs, m, density)
        first, second = jax.random.split(key)
        return cls(
            jax.random.rademacher(first, (inputs,), float),
            SparseGaussian.sample(second, 1 << (inputs - 1).bit_length(), m, density),
        )

    @property
    def inputs(self) -> int:  # type: ignore[override]
        """The length of the vectors before padding."""
        return self.signs.shape[-1]

    @property
    def m(self):
        return self.sparse.m

    @property
    def dtype(self):
        return self.sparse.dtype

    def __call__(self, X):
        signed = X * jnp.broadcast_to(self.signs, X.shape)
        more = self.sparse.inputs - self.inputs
        return self.sparse(hadamard(jnp.pad(signed, ((0, 0),) * (X.ndim - 1) + ((0, more),))))


@jax.jit
def hadamard(X: jax.Array) -> jax.Array:
    """The orthonormal Walsh-Hadamard transform of every vector (.., n), n a power of two, in n log2(n) additions.

    Args:
        X: vectors.

    Examples:
        >>> twice = jpfq.embed.hadamard(jpfq.embed.hadamard(X))
        >>> bool(jnp.allclose(twice, X, atol=1e-5))
        True
    """
    n = X.shape[-1]
    if not n or n & (n - 1):
        raise ValueError(f"The Hadamard transform takes vectors whose length is a power of two; got {n}.")
    lead, half = X.shape[:-1], 1
    while half < n:
        pairs = X.reshape(*lead, n // (2 * half), 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        X = jnp.stack([a + b, a - b], axis=-2).reshape(*lead, n)
        half *= 2
    return X / n**0.5


def _check(key, inputs, m, density):
    for name, x in (("inputs", inputs), ("m", m)):
        if not is_count(x):
            raise ValueError(f"{name} is an integer of at least 1; got {x!r}.")
    if not isinstance(density, (int, float)) or isinstance(density, bool) or not 0 < density <= 1:
        raise ValueError(f"density, the share of nonzero entries, is a number in (0, 1]; got {density!r}.")
    if is_traced(key):
        raise ValueError("Maps are sampled on the host: sample them outside of jit and vmap, and pass them in.")

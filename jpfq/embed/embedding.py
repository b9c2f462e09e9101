"""Embedding: vectors -> measurements -> codes -> condensed vectors, and their packed form.

    X (.., n)  -- measure -->  (.., m)  -- quantizer -->  codes (.., m)  -- condense -->  (.., p),  m = p width

Rows are independent: they may have any leading axes, and be sharded. All methods are pure and run under jit and vmap. Many
rows are computed in blocks (row_blocks.py), so that the measurements (.., m) of all rows never exist at once.
"""

import abc
import math
from collections.abc import Iterable, Iterator

import jax
import jax.numpy as jnp

from ..matrix.arrays import at_least_float32
from ..matrix.explicit_mesh import run
from ..scalar.bits import pack_bits, unpack_bits
from .noise_shaping import Stability, row_indices
from .quantizers import Quantizer
from .row_blocks import by_rows


class Embedding(abc.ABC):
    """A map to real measurements and the quantizer that follows it.

    Examples:
        >>> codes, stability = features.transform(X)
        >>> stored = features.store(codes)
        >>> bool(jnp.allclose(features.load(stored), features.condense(codes)))
        True
    """

    quantizer: Quantizer

    @property
    @abc.abstractmethod
    def inputs(self) -> int:
        """n, the length of the vectors it takes."""

    @property
    @abc.abstractmethod
    def m(self) -> int:
        """The number of measurements per vector."""

    @property
    @abc.abstractmethod
    def norm(self) -> jax.Array:
        """The factor of condensed codes."""

    @abc.abstractmethod
    def measure(self, X: jax.Array) -> jax.Array:
        """The measurements (.., m) of vectors (.., n), before quantization."""

    @property
    def p(self) -> int:
        """The length of condensed vectors."""
        return self.quantizer.blocks(self.m)

    @property
    def bits_per_vector(self) -> float:
        """The bits of an ideal fixed-rate code: p log2(levels of a stored number).

        Sigma-Delta stores sums, order 1 p log2(width (2K - 1) + 1) bits; the others store m log2(2K).
        """
        return self._stored * math.log2(self.quantizer.stored_levels)

    @property
    def bytes_per_vector(self) -> int:
        """The bytes that `store` needs: whole bits per stored number, whole bytes per vector."""
        return -(-self._stored * self._bits // 8)

    @property
    def _stored(self):
        return self.p if self.quantizer.stores_sums else self.m

    @property
    def _bits(self):
        return math.ceil(math.log2(self.quantizer.stored_levels))

    def transform(
        self, X: jax.Array, key: jax.Array | None = None, first: jax.Array | int = 0
    ) -> tuple[jax.Array, Stability]:
        """Integer codes 0 .. 2K - 1 (.., m) of vectors X (.., n), and the largest states of noise shaping.

        Args:
            X: vectors, real floating.
            key: for a random rounding, which requires it. The two sides of a comparison need different keys.
            first: the index of the first vector, for data in chunks; random numbers depend on the index.

        Examples:
            >>> codes, stability = features.transform(X)
            >>> codes.dtype, bool(stability.stable.all())
            (dtype('int8'), True)
        """
        return run(_transform, self, self._vectors(X), key, first)

    def features(self, X: jax.Array) -> jax.Array:
        """The vectors (.., p) that `condense` would return without quantization.

        Args:
            X: vectors.

        Examples:
            >>> exact = features.features(X)
            >>> rounded = features.condense(features.transform(X)[0])
            >>> bool(jnp.abs(rounded - exact).max() < 0.1 * jnp.abs(exact).max())
            True
        """
        return run(_features, self, self._vectors(X))

    def condense(self, codes: jax.Array) -> jax.Array:
        """The condensed vectors (.., p) of codes (.., m), in the units of `features`.

        Args:
            codes: from `transform`.

        Examples:
            >>> features.condense(features.transform(X)[0]).shape
            (64, 64)
        """
        return run(_condense, self, self._codes(codes))

    def store(self, codes: jax.Array) -> jax.Array:
        """Packs codes (.., m), or the sums that condensing needs, into uint8 (.., bytes_per_vector).

        Args:
            codes: from `transform`.

        Examples:
            >>> stored = features.store(features.transform(X)[0])
            >>> stored.shape == (64, features.bytes_per_vector)
            True
        """
        return run(_store, self, self._codes(codes))

    def load(self, stored: jax.Array) -> jax.Array:
        """The condensed vectors (.., p) from their packed form.

        Args:
            stored: from `store` or `stream`.

        Examples:
            >>> features.load(features.store(features.transform(X)[0])).shape
            (64, 64)
        """
        if stored.dtype != jnp.uint8 or stored.shape[-1] != self.bytes_per_vector:
            raise ValueError(
                f"Stored vectors are uint8 (.., {self.bytes_per_vector}); got {stored.dtype} of shape {stored.shape}."
            )
        return run(_load, self, stored)

    def stream(
        self, chunks: Iterable[jax.Array], key: jax.Array | None = None
    ) -> Iterator[tuple[jax.Array, Stability]]:
        """Yields packed vectors and stability, chunk by chunk (rows, n); the same as for all rows at once.

        Args:
            chunks: vectors, some rows at a time.
            key: for a random rounding.

        Examples:
            >>> stored = jnp.concatenate([part for part, stability in features.stream(batches)])
            >>> stored.shape[0]
            128
        """
        first = 0
        for X in chunks:
            codes, stability = self.transform(X, key, first)
            yield self.store(codes), stability
            first += math.prod(X.shape[:-1])

    def _vectors(self, X):
        if not hasattr(X, "shape") or not jnp.issubdtype(X.dtype, jnp.floating):
            raise ValueError(f"Vectors must be a real floating array (.., {self.inputs}); got {_what(X)}.")
        if not X.ndim or X.shape[-1] != self.inputs:
            raise ValueError(f"This embedding takes vectors (.., {self.inputs}); got shape {X.shape}.")
        return at_least_float32(X)

    def _codes(self, codes):
        if not jnp.issubdtype(codes.dtype, jnp.integer) or codes.shape[-1] != self.m:
            raise ValueError(f"Codes are integers (.., {self.m}), as `transform` returns them; got {_what(codes)}.")
        return codes

    def _condensed(self, *vectors):
        for x in vectors:
            if not jnp.issubdtype(x.dtype, jnp.floating) or x.shape[-1] != self.p:
                raise ValueError(
                    f"Condensed vectors are real (.., {self.p}), from `condense`, `load` or `features`; got {_what(x)}."
                )


# The methods above, each compiled as one program.


@jax.jit
def _transform(embedding, X, key, first):
    quantizer = embedding.quantizer
    some = lambda X, indices: quantizer.shape(embedding.measure(X), key, indices)
    codes, peak = by_rows(some, embedding.m, X, row_indices(X.shape[:-1], first))
    return codes, quantizer.stability(peak)


@jax.jit
def _features(embedding, X):
    some = lambda X: embedding.norm * embedding.quantizer.fold(embedding.measure(X))
    return by_rows(some, embedding.m, X)


@jax.jit
def _condense(embedding, codes):
    some = lambda codes: _scaled(embedding, embedding.quantizer.to_store(codes))
    return by_rows(some, embedding.m, codes)


@jax.jit
def _store(embedding, codes):
    some = lambda codes: pack_bits(embedding.quantizer.to_store(codes), embedding._bits)
    return by_rows(some, embedding.m, codes)


@jax.jit
def _load(embedding, stored):
    return _scaled(embedding, unpack_bits(stored, embedding._bits, embedding._stored))


def _scaled(embedding, stored):
    norm = embedding.norm
    return norm * embedding.quantizer.condensed(stored, norm.dtype)


def _what(x):
    return f"{x.dtype} of shape {x.shape}" if hasattr(x, "dtype") else repr(x)

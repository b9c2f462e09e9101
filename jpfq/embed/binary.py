"""Fast binary embeddings that preserve Euclidean distances.

y = A x for a fast random map A, quantized by noise shaping. With V = sqrt(pi / 2) / (p |v|) (I kron v^T),
|V (q(x) - q(y))|_1 estimates |x - y|_2.

Source: Zhang, Saab (ICLR 2021, arXiv 2010.00712).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from ..matrix.explicit_mesh import run
from ..scalar import register_dataclass
from ..scalar.grid import Number
from ..scalar.predicates import may_be
from .embedding import Embedding
from .maps import Map
from .quantizers import Quantizer


@register_dataclass
@dataclasses.dataclass(frozen=True)
class BinaryEmbedding(Embedding):
    """A random map, the scale of the data, and a quantizer.

    Vectors are divided by `scale`; the papers take 1.5 times the largest norm. Distances are in the units of the vectors.
    Measurements are nearly Gaussian, so a few exceed the `reach` of the quantizer; `Stability` tells for which vectors the
    states became too large. With a larger scale there are fewer of these, but the quantization error is larger.

    Examples:
        >>> map = jpfq.embed.FJLT.sample(key, inputs=32, m=64 * 9, density=0.3)
        >>> embedding = jpfq.BinaryEmbedding(map, jpfq.embed.SigmaDelta(1, width=9), scale=1.5 * 8.0)
        >>> codes, stability = embedding.transform(X)
        >>> vectors = embedding.condense(codes)
        >>> vectors.shape, embedding.bytes_per_vector
        ((64, 64), 32)
    """

    map: Map
    quantizer: Quantizer
    scale: Number = 1.0

    def __post_init__(self):
        if not may_be(self.scale, lambda x: 0 < x < math.inf):
            raise ValueError(f"scale, the divisor of vectors, must be a positive number; got {self.scale!r}.")
        if isinstance(self.map, Map) and isinstance(self.quantizer, Quantizer):
            self.quantizer.blocks(self.map.m)

    @property
    def inputs(self):
        return self.map.inputs

    @property
    def m(self):
        return self.map.m

    @property
    def norm(self):
        dtype = self.map.dtype
        v = jnp.asarray(self.quantizer.weights, dtype)
        return jnp.asarray(self.scale, dtype) * (math.sqrt(math.pi / 2) / self.p) / jnp.sqrt(jnp.sum(v**2))

    def measure(self, X):
        dtype = self.map.dtype
        # Not X / scale, which XLA turns into this product in some programs and not in others.
        return self.map(X.astype(dtype) * (1 / jnp.asarray(self.scale, dtype)))

    def distance(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Estimates of |x - y|_2 (rows, others) from condensed vectors a (rows, p) and b (others, p).

        Args:
            a, b: from `condense` or `load`.

        Examples:
            >>> vectors = embedding.condense(embedding.transform(X)[0])
            >>> embedding.distance(vectors[:5], vectors).shape
            (5, 64)
        """
        self._condensed(a, b)
        return run(_l1, a, b)


@jax.jit
def _l1(a, b):
    """All distances in the l1 norm, compiled as one loop without the array (rows, others, p)."""
    return jnp.sum(jnp.abs(a[:, None, :] - b[None, :, :]), axis=-1)

"""Random Fourier features of the Gaussian (RBF) kernel, in a few bits.

z(x) = cos(Omega^T x + xi) with Omega ~ N(0, 2 gamma I) and xi uniform on [0, 2 pi), quantized by noise shaping. With
V = sqrt(2 / p) / |v| (I kron v^T), <V q(x), V q(y)> estimates exp(-gamma |x - y|^2).

Source: Zhang, Kannan, Cloninger, Saab (arXiv 2106.02614).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from ..matrix.arrays import matmul
from ..matrix.explicit_mesh import run
from ..scalar import register_dataclass
from ..scalar.predicates import is_count, may_be
from .embedding import Embedding
from .quantizers import Quantizer


@register_dataclass
@dataclasses.dataclass(frozen=True)
class RandomFourierFeatures(Embedding):
    """Cosines of random projections, with a quantizer. `sample` draws them.

    Fields: `frequencies` (n, m), `phases` (m,), and `quantizer`.

    Examples:
        >>> shaped = jpfq.embed.SigmaDelta(order=1, width=15, K=2)
        >>> features = jpfq.RandomFourierFeatures.sample(key, inputs=32, m=960, gamma=0.01, quantizer=shaped)
        >>> codes, stability = features.transform(X)
        >>> codes.shape, features.condense(codes).shape
        ((64, 960), (64, 64))
    """

    frequencies: jax.Array
    phases: jax.Array
    quantizer: Quantizer

    def __post_init__(self):
        shapes = [getattr(x, "shape", None) for x in (self.frequencies, self.phases)]
        if None not in shapes:
            if len(shapes[0]) < 2 or shapes[1] != (*shapes[0][:-2], shapes[0][-1]):  # type: ignore[index,arg-type]
                raise ValueError(f"Frequencies are (n, m) and phases (m,); got shapes {shapes[0]} and {shapes[1]}.")
            self.quantizer.blocks(self.m)

    @classmethod
    def sample(cls, key: jax.Array, inputs: int, m: int, gamma: float, quantizer: Quantizer) -> "RandomFourierFeatures":
        """m features for vectors of length `inputs` and the kernel exp(-gamma |x - y|^2).

        Args:
            key: for the frequencies and phases.
            inputs: length of the vectors.
            m: the number of features, a multiple of the quantizer's width.
            gamma: of the kernel, positive.
            quantizer: `jpfq.embed.SigmaDelta(order=1, width=15)`, for example.

        Examples:
            >>> plain = jpfq.RandomFourierFeatures.sample(key, 32, 240, 0.01, jpfq.embed.Memoryless(K=2))
        """
        for name, x in (("inputs", inputs), ("m", m)):
            if not is_count(x):
                raise ValueError(f"{name} is an integer of at least 1; got {x!r}.")
        if not may_be(gamma, lambda x: 0 < x < math.inf):
            raise ValueError(f"gamma, of the kernel exp(-gamma |x - y|^2), must be a positive number; got {gamma!r}.")
        first, second = jax.random.split(key)
        scale = jnp.sqrt(jnp.asarray(2 * gamma, float))
        return cls(
            scale * jax.random.normal(first, (inputs, m), scale.dtype),
            jax.random.uniform(second, (m,), scale.dtype, 0, 2 * math.pi),
            quantizer,
        )

    @property
    def inputs(self):
        return self.frequencies.shape[-2]

    @property
    def m(self):
        return self.frequencies.shape[-1]

    @property
    def norm(self):
        v = jnp.asarray(self.quantizer.weights, self.phases.dtype)
        return math.sqrt(2 / self.p) / jnp.sqrt(jnp.sum(v**2))

    def measure(self, X):
        angles = matmul(X.astype(self.phases.dtype), self.frequencies)
        return jnp.cos(angles + jnp.broadcast_to(self.phases, angles.shape))

    def kernel(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Estimates of exp(-gamma |x - y|^2) (rows, others) from condensed vectors a (rows, p) and b (others, p).

        Args:
            a, b: from `condense`, `load` or `features`.

        Examples:
            >>> vectors = features.condense(features.transform(X)[0])
            >>> features.kernel(vectors, vectors).shape
            (64, 64)
        """
        self._condensed(a, b)
        return run(lambda a, b: matmul(a, b.T), a, b)

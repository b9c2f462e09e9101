"""Random rotation of the inputs, which spreads outliers over all of them: X W = (X R) (R^T W) for orthogonal R.

The codes are then those of R^T W. Dequantizing rotates back, so the kernel that a network gets is R q, in the coordinates
it had: exact wherever the dequantized kernel is used. A runtime that multiplies the integer codes must rotate its inputs.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ..scalar.pytree import register_dataclass
from .arrays import matmul
from .gram import Gram


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Hadamard:
    """R = diag(random signs) times Hadamard blocks, of the largest power of two that divides the number of inputs.

    Incoherence processing as in QuIP# and QuaRot. `seed` picks the signs, which need not be stored.

    Examples:
        >>> rule = jpfq.Rule(".*", bits=4, rotation=jpfq.Hadamard(seed=1))
    """

    seed: int = dataclasses.field(default=0, metadata={"static": True})

    def __post_init__(self):
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ValueError(f"Hadamard takes an integer seed; got {self.seed!r}.")

    def refuse(self, n: int, name: str) -> None:
        """Raises where there is nothing to rotate."""
        if _power(n) < 2:
            raise ValueError(f"Hadamard rotates blocks of a power of two, but {name} has an odd number of inputs, {n}.")

    def rotate(self, M: jax.Array) -> jax.Array:
        """R^T M, for M (in, ..)."""
        return self._blocks(M * self._signs(M.shape[0], M.dtype)[:, None])

    def unrotate(self, M: jax.Array) -> jax.Array:
        """R M."""
        return self._blocks(M) * self._signs(M.shape[0], M.dtype)[:, None]

    def rotate_rows(self, X: jax.Array) -> jax.Array:
        """X R, for X (.., in)."""
        return self._along(X * self._signs(X.shape[-1], X.dtype))

    def unrotate_rows(self, X: jax.Array) -> jax.Array:
        """X R^T."""
        return self._along(X) * self._signs(X.shape[-1], X.dtype)

    def gram(self, gram: Gram) -> Gram:
        """The Gram of the inputs X R, Xq R."""
        square = lambda M: None if M is None else self.rotate(self.rotate(M).T).T
        vector = lambda x: self.rotate(x[:, None])[:, 0]
        squares = (square(M) for M in (gram.H, gram.C, gram.drift))
        return dataclasses.replace(
            gram, **dict(zip(("H", "C", "drift"), squares)), sum_X=vector(gram.sum_X), sum_Xq=vector(gram.sum_Xq)
        )

    def _signs(self, n, dtype):
        return jnp.asarray(np.random.default_rng(self.seed).integers(0, 2, n) * 2 - 1, dtype)

    def _blocks(self, M):
        H = _hadamard(M.shape[0], M.dtype)
        blocks = jax.vmap(matmul, (None, 0))(H, M.reshape(-1, len(H), M.shape[1]))
        return blocks.reshape(M.shape)

    def _along(self, X):
        H = _hadamard(X.shape[-1], X.dtype)
        return matmul(X.reshape(*X.shape[:-1], -1, len(H)), H).reshape(X.shape)


def _hadamard(n, dtype):
    """The symmetric orthogonal block for n inputs."""
    size = _power(n)
    H = jnp.ones((1, 1), dtype)
    while H.shape[0] < size:
        H = jnp.block([[H, H], [H, -H]])
    return H / size**0.5


def _power(n: int) -> int:
    """The largest power of two that divides n."""
    return n & -n

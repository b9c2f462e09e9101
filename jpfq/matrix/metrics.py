"""Square errors over all neurons of one solve, with as few matrix products as possible.

    ||X W - Xq q||^2 = e^T H e + 2 e^T C W + W^T drift W,    e = W - q

The terms of W alone come from W W^T, by half a product for all of them. C W serves every q. Where q comes from path
following on these very data, its arguments give e^T H e + 2 e^T tril(C) W without a product: see `Method.below`.
"""

from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from .arrays import matmul
from .gram import Gram, Rows
from .half import quadratics, triangular
from .methods import Method
from .neurons import Neurons
from .split import Split


class Squares(NamedTuple):
    """The square errors of any q for some weights on some data."""

    data: Gram | Rows
    W: jax.Array  # (in, out)
    neurons: Neurons
    method: Method | None
    CW: (
        jax.Array | None
    )  # (in, out), of C or, with a method, of what is above its diagonal; None where the networks agree
    energy: jax.Array  # ||X W||^2
    drift: jax.Array | float  # ||(X - Xq) W||^2

    @classmethod
    def of(cls, data: Any, W: jax.Array, neurons: Neurons, method: Method | None) -> Self:
        """The errors of `W` on `data`; `method` is the one whose arguments will be given, if any."""
        if isinstance(data, Rows):
            energy = neurons.sum(data.square_error(W, jnp.zeros_like(W)))
            return cls(data, W, neurons, None, None, energy, 0.0)
        CW = None
        if data.C is not None:
            CW = matmul(data.C, W) if method is None else triangular(data.C, W, 1, above=True)
        matrices = [M for M in (data.H, data.C, data.drift) if M is not None]
        if isinstance(data.H, Split):
            own, *more = (neurons.sum(jnp.sum(W * matmul(M, W), 0)) for M in matrices)
        else:
            own, *more = neurons.add(quadratics(neurons.where(W, 0), *matrices))
        cross, drift = more if more else (0.0, 0.0)
        return cls(data, W, neurons, method, CW, jnp.maximum(own + 2 * cross + drift, 0), jnp.maximum(drift, 0))

    def error(self, q: jax.Array, arguments: jax.Array | None = None) -> tuple[jax.Array, jax.Array | float]:
        """||X W - Xq q||^2 (), and how far rounding of the arguments may have moved it, beyond `bounds.rounding`.

        Args:
            q: (in, out).
            arguments: of the recursion that made q (in, out); needed with a method.
        """
        if isinstance(self.data, Rows):
            return self.neurons.sum(self.data.square_error(self.W, q)), 0.0
        e, moved = self.W - q, 0.0
        if self.method is None or self.method.below is None or arguments is None:
            total = jnp.sum(e * matmul(self.data.H, e), 0)
        else:
            total = self.method.below(self.data, e, arguments - self.W)
            size = self.method.below(self.data, jnp.abs(e), jnp.abs(arguments) + jnp.abs(self.W))
            moved = jnp.finfo(e.dtype).eps * self.neurons.sum(size)
        if self.CW is not None:
            total += 2 * jnp.sum(e * self.CW, 0)
        return jnp.maximum(self.neurons.sum(total) + self.drift, 0), moved

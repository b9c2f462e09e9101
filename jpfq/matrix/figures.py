"""Square errors over all neurons of one solve, by as few products as they take.

    ||X W - Xq q||^2 = e^T H e + 2 e^T C W + W^T drift W,    e = W - q

What depends on W alone comes from W W^T, which is symmetric, by half a product for all of it. C W serves every q, and half
of it is a product that path following has made. Where q comes from a recursion that was fed H itself, e^T H e takes no
product either: see `Method.quadratic`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp

from .gram import Gram, Rows, matmul
from .methods import Method
from .neurons import Neurons
from .split import Split, halves, triangular


class Squares(NamedTuple):
    """The square errors of codes for some weights on some data, after whatever is squared was reduced."""

    data: Gram | Rows
    W: jax.Array  # (in, out), reduced
    neurons: Neurons
    CW: jax.Array | None  # (in, out), reduced; None where the networks agree
    energy: jax.Array  # ||X W||^2
    drift: jax.Array | float  # ||(X - Xq) W||^2
    quadratic: Callable | None  # of the method that is fed the data as they are

    @classmethod
    def of(cls, data: Any, W: jax.Array, neurons: Neurons, reduce: Callable, method: Method | None) -> Self:
        """`method` where it is fed these data and weights as they are."""
        small = reduce(W)
        if isinstance(data, Rows):
            return cls(data, small, neurons, None, neurons.sum(data.square_error(small, jnp.zeros_like(W))), 0.0, None)
        quadratic = None if method is None else method.quadratic
        CW = None
        if data.C is not None:  # tril(C) W is what the method multiplies too
            halved = lambda: reduce(triangular(data.C, W)) + triangular(data.C, small, above=True)
            CW = matmul(data.C, small) if quadratic is None else halved()
        own, shift = _quadratics(data, small, neurons)
        cross = 0.0 if CW is None else 2 * neurons.sum(jnp.sum(small * CW, 0))
        return cls(data, small, neurons, CW, jnp.maximum(own + cross + shift, 0), shift, quadratic)

    def error(
        self, q: jax.Array, base: jax.Array | None = None, arguments: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | float]:
        """||X W - Xq q||^2 (), and how far rounding of the arguments may have moved it, beyond `bounds.rounding`.

        Args:
            q: (in, out), reduced like all others.
            base: of the method's system (in, out).
            arguments: base + L (W - q), where they are known.
        """
        if isinstance(self.data, Rows):
            return self.neurons.sum(self.data.square_error(self.W, q)), 0.0
        e, moved = self.W - q, 0.0
        if self.quadratic is None or base is None or arguments is None:
            total = jnp.sum(e * matmul(self.data.H, e), 0)
        else:
            total = self.quadratic(self.data, e, arguments - base)
            size = self.quadratic(self.data, jnp.abs(e), jnp.abs(arguments) + jnp.abs(base))
            moved = jnp.finfo(e.dtype).eps * self.neurons.sum(size)
        if self.CW is not None:
            total += 2 * jnp.sum(e * self.CW, 0)
        return jnp.maximum(self.neurons.sum(total) + self.drift, 0), moved


def _quadratics(data, W, neurons):
    """sum_o w_o^T H w_o, and the same of the drift."""
    matrices = [data.H] if data.drift is None else [data.H, data.drift]
    if isinstance(data.H, Split):
        totals = [neurons.sum(jnp.sum(W * matmul(M, W), 0)) for M in matrices]
    else:
        W, totals = neurons.where(W, 0), [jnp.zeros((), W.dtype)] * len(matrices)
        for first, last in halves(W.shape[0]):
            near, before = (matmul(W[first:last], part.T) for part in (W[first:last], W[:first]))
            for i, M in enumerate(matrices):
                rows = M[first:last]
                totals[i] += jnp.sum(near * rows[:, first:last]) + 2 * jnp.sum(before * rows[:, :first])
        totals = [neurons.add(total) for total in totals]
    return totals[0], jnp.maximum(totals[1], 0) if len(totals) > 1 else 0.0

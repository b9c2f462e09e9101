"""The recursion: q = Q(A - L q), L strictly lower triangular. The only loop over input coordinates in this package.

Written for one neuron as a scan over its coordinates and mapped over neurons. The blocked form is the same loop on
`block` coordinates at a time, with what earlier blocks feed back subtracted beforehand by one matrix product: the same
codes, and nearly all arithmetic in products. Blocks are visited inside panels, so that the triangle above the diagonal,
which a loop of fixed shape multiplies in vain, stays small.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..scalar import Levels, Rounding
from .gram import matmul

BLOCK = 64
PANEL = 512  # coordinates at least in a panel, and
PANELS = 8  # at most so many of them: each is compiled


class Path(NamedTuple):
    """What the recursion leaves behind, each (in, out)."""

    codes: jax.Array  # integers, as floats
    q: jax.Array  # their values
    saturated: jax.Array  # whether the argument A - L q lay beyond the grid by more than half a step


class Recursion(NamedTuple):
    """The loop, and what it knows of the grid. Methods decide what it is fed; `substitute` and `follow` run it in blocks."""

    levels: Levels  # step and zero (groups, out) or (1, 1)
    order: jax.Array  # (in,) original index of each coordinate: it picks the coordinate's group and random draw
    out: int
    rounding: Rounding
    key: jax.Array | None = None

    def start(self) -> Any:
        """The carries of all neurons before the first coordinate."""
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (self.out, *jnp.shape(x))), self.rounding.init())

    def scan(self, A: jax.Array, L: jax.Array | None, index: jax.Array, carry: Any) -> tuple[Any, Path]:
        """Runs through the coordinates `index`, given their target A and their feedback L among themselves."""
        step, zero, grouped = self._levels(index)

        def neuron(A, step, zero, carry, o):
            draw = None if self.key is None else jax.random.fold_in(self.key, o)

            def visit(state, x):
                carry, q = state
                t, i, a, feedback, group = x
                if feedback is not None:
                    a = a - jnp.dot(feedback, q, precision="highest")
                here_step, here_zero = group or (step, zero)
                levels = Levels(here_step, here_zero, self.levels.lo, self.levels.hi)
                carry, code = self.rounding(carry, a, levels, None if draw is None else jax.random.fold_in(draw, i))
                value = levels.decode(code)
                return (carry, q.at[t].set(value)), Path(code, value, levels.saturates(a))

            coordinates = (jnp.arange(A.shape[0]), index, A, L, (step, zero) if grouped else ())
            (carry, _), path = lax.scan(visit, (carry, jnp.zeros_like(A)), coordinates)
            return carry, path

        columns = (1, 1 if grouped else 0, 1 if grouped else 0, 0, 0)
        return jax.vmap(neuron, in_axes=columns, out_axes=(0, 1))(A, step, zero, carry, jnp.arange(self.out))

    def _levels(self, index):
        """Step and zero of every neuron (out,), or of every coordinate too (in, out) where groups differ."""
        groups = self.levels.step.shape[0]
        pick = (lambda x: x[index // (self.order.shape[0] // groups)]) if groups > 1 else (lambda x: x[0])
        spread = lambda x: jnp.broadcast_to(pick(x), (*pick(x).shape[:-1], self.out))
        return spread(self.levels.step), spread(self.levels.zero), groups > 1


def substitute(A: jax.Array, L: jax.Array | None, recursion: Recursion, *, block: int | None = BLOCK) -> Path:
    """Solves q = Q(A - L q) for all neurons.

    Args:
        A: target (in, out).
        L: feedback (in, in), strictly lower triangular; None means 0.
        recursion: grid, rounding and indices of the coordinates.
        block: coordinates per block; None runs the plain scan, and so do two blocks or fewer. Changes the cost, and the
            codes only where rounding errors decide a tie.
    """
    n, index = A.shape[0], recursion.order
    if L is None or block is None or n <= 2 * block:
        return recursion.scan(A, L, index, recursion.start())[1]
    blocks = -(-n // block)
    more = blocks * block - n  # dead coordinates: they change nothing
    A, L, index = jnp.pad(A, ((0, more), (0, 0))), jnp.pad(L, ((0, more), (0, more))), jnp.pad(index, (0, more))
    width = block * -(-blocks // min(PANELS, max(1, n // PANEL)))  # coordinates in a panel

    carry, done = recursion.start(), []
    for first in range(0, n, width):
        here = slice(first, first + width)
        R = A[here]
        if done:
            R = R - matmul(L[here, :first], jnp.concatenate([path.q for path in done]))
        carry, path = _panel(recursion, R, L[here, here], index[here], carry, block)
        done.append(path)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts)[:n], *done)


def _panel(recursion, R, L, index, carry, block):
    """The recursion on one panel, `block` coordinates at a time."""

    def visit(state, first):
        carry, q = state
        take = lambda x, axis=0: lax.dynamic_slice_in_dim(x, first, block, axis)
        feedback = take(L)
        argument = take(R) - matmul(feedback, q)  # rows of q not yet reached are 0
        carry, path = recursion.scan(argument, take(feedback, 1), take(index), carry)
        return (carry, lax.dynamic_update_slice_in_dim(q, path.q, first, 0)), path

    (carry, _), path = lax.scan(visit, (carry, jnp.zeros_like(R)), jnp.arange(0, R.shape[0], block))
    return carry, jax.tree.map(lambda x: x.reshape(R.shape), path)

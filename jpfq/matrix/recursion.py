"""The recursion: q = Q(A - L q), L strictly lower triangular. The only loop over input coordinates in this package.

Written for one neuron as a scan over its coordinates and mapped over neurons. The blocked form is the same loop on
`block` coordinates at a time, with what earlier blocks feed back subtracted beforehand by one matrix product: the same
codes, and nearly all arithmetic in products. Blocks are visited inside panels, so that the triangle above the diagonal,
which a loop of fixed shape multiplies in vain, stays small.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..scalar import Rounding, RoundingContext, ScaledGrid
from .arrays import matmul
from .neurons import ALL, Neurons
from .pallas import Kernel, chosen
from .split import Split, padded
from .triangular import solve_triangular

BLOCK = 64
PANEL = 512  # coordinates at least in a panel, and
PANELS = 8  # at most so many of them: each is compiled


class Path(NamedTuple):
    """The results of the recursion, each (in, out)."""

    codes: jax.Array  # integers, as floats
    q: jax.Array  # their values
    saturated: jax.Array  # whether the argument A - L q lay beyond the grid by more than half a step
    refit: ScaledGrid | None = None  # the levels of each block (blocks, out), where they are refit on the way
    shift: jax.Array | None = None  # what was fed back beyond q; None for nothing
    arguments: jax.Array | None = None  # A - L q, where the recursion keeps them

    @property
    def fed(self) -> jax.Array:
        """The values that later coordinates were to make up for."""
        return self.q if self.shift is None else self.q + self.shift


class Recursion(NamedTuple):
    """The loop, and what it knows of the grid. Methods decide what it is fed; `substitute` and `follow` run it in blocks."""

    levels: ScaledGrid  # step and zero (groups, out) or (1, 1)
    order: jax.Array  # (in,) original index of each coordinate: it picks the coordinate's group and random draw
    out: int
    rounding: Rounding
    key: jax.Array | None = None
    carry: Any = None  # of the rounding, for each neuron (out, ..); None starts with `rounding.init()`
    refit: Callable[[jax.Array], ScaledGrid] | None = (
        None  # the levels of a block, from its weights as they have become
    )
    neurons: Neurons = ALL  # which of the matrix's these are
    keeps: bool = False  # whether the path is to have the arguments
    stored: Callable[[ScaledGrid], ScaledGrid] = lambda levels: levels  # levels with their steps as they are stored
    kernel: Kernel | None = None  # runs each block in one launch; None is the scan, but on platforms where kernels win

    @property
    def shared(self) -> bool:
        """True if one step serves all neurons."""
        return self.levels.step.shape[1] == 1 and self.neurons.shared

    def start(self) -> Any:
        """The carries of all neurons before the first coordinate."""
        if self.carry is not None:
            return self.carry
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (self.out, *jnp.shape(x))), self.rounding.init())

    def again(
        self, codes: jax.Array, rounding: Rounding | None = None, carry: Any = None, inputs: Any = ()
    ) -> tuple["Recursion", Any]:
        """The recursion for a pass over `codes`, and its inputs: by another rounding, if one is given with its carry.

        Whatever the rounding of this one promises is kept.
        """
        rounding = self.rounding if rounding is None else rounding
        parts = self.rounding.constrain(codes, self.spread(), self.order, rounding, carry, inputs)
        return self._replace(rounding=parts[0], carry=parts[1]), parts[2]

    def scan(
        self,
        A: jax.Array,
        L: jax.Array | None,
        index: jax.Array,
        carry: Any,
        about: jax.Array | None = None,
        inputs: Any = (),
    ) -> tuple[Any, Path]:
        """Runs through the coordinates `index`, given their target A and their feedback L among themselves.

        Arguments are A + L (about - q). `inputs` is a tree of arrays (in, out) or (in,), of which the rounding sees the
        entries of its coordinate.
        """
        about = jnp.zeros_like(A) if about is None else about
        levels = self.levels if self.refit is None else self.refit(unrounded(A, L, about))
        step, zero, grouped = self._at(levels, index)
        kernel = chosen(self)
        if kernel is not None:
            spread = (lambda x: x) if grouped else (lambda x: x[None])
            rows = levels.with_steps(spread(step), spread(zero))
            carry, codes, arguments = kernel(self, A, L, about, rows, carry, inputs)
            path = Path(codes, rows.decode(codes), rows.saturates(arguments))
            path = path._replace(arguments=arguments) if self.keeps else path
            return carry, path if self.refit is None else path._replace(refit=levels)

        def neuron(A, about, inputs, step, zero, carry, o):
            draw = None if self.key is None else jax.random.fold_in(self.key, o)

            def visit(state, x):
                carry, e = state  # about - q of the coordinates done, 0 of the others
                t, i, a, b, feedback, inputs, group = x
                if feedback is not None:
                    a = a + jnp.dot(feedback, e, precision="highest")
                here = levels.with_steps(*(group or (step, zero)))
                key = None if draw is None else jax.random.fold_in(draw, i)
                carry, code = self.rounding(carry, a, RoundingContext(here, key, inputs))
                path = Path(code, here.decode(code), here.saturates(a), shift=self.rounding.shift(carry))
                path = path._replace(arguments=a) if self.keeps else path
                return (carry, e.at[t].set(b - path.fed)), path

            coordinates = (jnp.arange(A.shape[0]), index, A, about, L, inputs, (step, zero) if grouped else ())
            (carry, _), path = lax.scan(visit, (carry, jnp.zeros_like(A)), coordinates)
            return carry, path

        columns = (1, 1, jax.tree.map(lambda x: 1 if x.ndim == 2 else None, inputs), *(1 if grouped else 0,) * 2, 0, 0)
        mapped = jax.vmap(neuron, in_axes=columns, out_axes=(0, 1))
        carry, path = mapped(A, about, inputs, step, zero, carry, self.neurons.indices(self.out))
        return carry, path if self.refit is None else path._replace(refit=levels)

    def alone(self, W: jax.Array) -> jax.Array:
        """The codes of W (in, out), each weight rounded by itself, for a rounding that carries nothing."""
        levels = self.spread()
        one = lambda w, step, zero, key: self.rounding(
            self.rounding.init(), w, RoundingContext(levels.with_steps(step, zero), key, ())
        )[1]
        if self.key is None or not self.rounding.random:
            return one(W, levels.step, levels.zero, None)
        fold = jax.vmap(jax.random.fold_in, (None, 0))
        keys = jax.vmap(fold, (0, None), 1)(fold(self.key, self.neurons.indices(self.out)), self.order)
        return jax.vmap(jax.vmap(one))(W, levels.step, levels.zero, keys)

    def values(self, codes: jax.Array) -> jax.Array:
        """The values of codes (in, out), in the order of the recursion."""
        return self.spread().decode(codes)

    def spread(self) -> ScaledGrid:
        """The levels of every weight: step and zero (in, out)."""
        step, zero, grouped = self._at(self.levels, self.order)
        full = lambda x: jnp.broadcast_to(x if grouped else x[None], (self.order.shape[0], self.out))
        return self.levels.with_steps(full(step), full(zero))

    def _at(self, levels, index):
        """Step and zero of every neuron (out,), or of every coordinate too (in, out) where groups differ."""
        groups = levels.step.shape[0]
        pick = (lambda x: x[index // (self.order.shape[0] // groups)]) if groups > 1 else (lambda x: x[0])
        spread = lambda x: jnp.broadcast_to(pick(x), (*pick(x).shape[:-1], self.out))
        return spread(levels.step), spread(levels.zero), groups > 1


def substitute(
    A: jax.Array,
    L: jax.Array | None,
    recursion: Recursion,
    *,
    block: int | None = BLOCK,
    about: jax.Array | None = None,
    inputs: Any = (),
) -> Path:
    """Solves q = Q(A - L q) for all neurons; with `about`, q = Q(A + L (about - q)).

    Args:
        A: target (in, out).
        L: feedback (in, in), strictly lower triangular; None means 0.
        recursion: grid, rounding and indices of the coordinates.
        block: coordinates per block; None runs the plain scan, and so do two blocks or fewer. Changes the cost, and the
            codes only where rounding errors decide a tie.
        about: values near q, such as the weights (in, out); None means 0.
        inputs: those of the rounding at each coordinate, a tree of arrays (in, out) or (in,).
    """
    n, index = A.shape[0], recursion.order
    if recursion.refit is None and (L is None or block is None or n <= 2 * block):
        L = L.rows(0, n) if isinstance(L, Split) else L
        return recursion.scan(A, L, index, recursion.start(), about, inputs)[1]
    if block is None or L is None:
        raise ValueError("Steps that are refit on the way need a feedback, and blocks of one group each.")
    blocks = -(-n // block)
    more = blocks * block - n  # dead coordinates: they change nothing
    pad = lambda x: jnp.pad(x, ((0, more), *((0, 0),) * (x.ndim - 1)))
    about = jnp.zeros_like(A) if about is None else about
    A, about, index, feedback = pad(A), pad(about), pad(index), padded(L, more)
    inputs = jax.tree.map(pad, inputs)
    if isinstance(feedback, Split):
        path = _panel(recursion, A, feedback, index, recursion.start(), about, inputs, block)[1]
        return jax.tree.map(lambda x: x[:n] if x.ndim else x, path)
    width = block * -(-blocks // min(PANELS, max(1, n // PANEL)))  # coordinates in a panel

    carry, done = recursion.start(), []
    for first in range(0, n, width):
        here = slice(first, first + width)
        R = A[here]
        if done:
            R = R + matmul(feedback[here, :first], about[:first] - jnp.concatenate([path.fed for path in done]))
        near = jax.tree.map(lambda x: x[here], inputs)
        carry, path = _panel(recursion, R, feedback[here, here], index[here], carry, about[here], near, block)
        done.append(path)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts)[:n] if parts[0].ndim else parts[0], *done)


def _panel(recursion, R, L, index, carry, about, inputs, block):
    """The recursion on one panel, `block` coordinates at a time."""

    def visit(state, first):
        carry, e = state
        take = lambda x, axis=0: lax.dynamic_slice_in_dim(x, first, block, axis)
        feedback, near = L.rows(first, block) if isinstance(L, Split) else take(L), take(about)
        argument = take(R) + matmul(feedback, e)  # rows of e not yet reached are 0
        carry, path = recursion.scan(argument, take(feedback, 1), take(index), carry, near, jax.tree.map(take, inputs))
        return (carry, lax.dynamic_update_slice_in_dim(e, near - path.fed, first, 0)), path

    (carry, _), path = lax.scan(visit, (carry, jnp.zeros_like(R)), jnp.arange(0, R.shape[0], block))
    return carry, jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]) if x.ndim == 3 else x[0], path)


def unrounded(A: jax.Array, L: jax.Array | None, about: jax.Array | float) -> jax.Array:
    """The w that rounding without error would return: what the weights of a block have become when it is reached."""
    if L is None:
        return A
    if isinstance(L, Split):
        return about + L.unwound(A - about)
    return about + solve_triangular(L, A - about, lower=True, unit_diagonal=True)

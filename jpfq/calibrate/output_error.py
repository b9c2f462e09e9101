"""The error of the outputs of a quantized network against those of the float network.

Outputs that are the same infinity in both networks agree (masked logits, for example), and so do outputs that are NaN in
both. For any other output that is NaN or infinite in one network there is no error: such outputs are counted as unmatched,
the reported error is then NaN, and the error of the others is available beside the count. Integers are not compared.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..matrix.arrays import at_least_float32
from ..matrix.explicit_mesh import is_traced
from ..matrix.lanes import over_lanes
from ..scalar.exponent import aligned, exponent_of, reduced

LARGE = 2**24  # entries from which on an output is compared one row after the other, as logits of a vocabulary are


class OutputError(NamedTuple):
    """Error metrics of a network's outputs: numbers, or arrays (.., outputs) with one entry for every output array.

    error: relative error of the outputs that are finite in both networks; nan if there are none.
    unmatched: the number of outputs that are NaN or infinite in one network and differ in the other.
    compared: the number of outputs of floating or complex type.
    """

    error: Any
    unmatched: Any
    compared: Any

    @property
    def overall(self) -> "OutputError":
        """The metrics over all output arrays: the largest error, and the sums of the counts."""
        library = jnp if is_traced(self.error) else np
        known = ~library.isnan(self.error)
        error = library.where(known, self.error, 0).max(-1, initial=0)
        error = library.where(known.any(-1), error, library.nan)
        found = OutputError(error, self.unmatched.sum(-1), self.compared.sum(-1))
        if library is jnp or error.ndim:
            return found
        return OutputError(float(error), int(found.unmatched), int(found.compared))

    @property
    def error_or_nan(self) -> Any:
        """The error; nan if any output is unmatched."""
        if isinstance(self.unmatched, int):
            return float("nan") if self.unmatched else self.error
        return jnp.where(self.unmatched > 0, jnp.nan, self.error)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Sums over the outputs of two networks, with one entry for every output array. Comparisons of several batches add."""

    squares: np.ndarray  # (.., outputs, 2) square errors and square float outputs, in float64
    exponents: np.ndarray  # (.., outputs, 2) the k of each, whose unit is 4^k
    counts: np.ndarray  # (.., outputs, 3) unmatched, compared, and finite in both networks

    @classmethod
    def of(
        cls,
        exact: Sequence[jax.Array],
        quantized: Sequence[jax.Array],
        lanes: tuple[int, ...] = (),
        weights: Sequence[jax.Array | None] | None = None,
    ) -> Self:
        """The sums over one batch.

        Args:
            exact, quantized: outputs of the float and of the quantized network.
            lanes: their number, as a shape; an array in `quantized` of one more axis than in `exact` then has lanes.
            weights: of the entries of each output; those of weight 0 are not compared.
        """
        given = [None] * len(exact) if weights is None else weights
        laned = [bool(lanes) and b.ndim > a.ndim for a, b in zip(exact, quantized, strict=True)]
        rows = [_has_rows(a, w) for a, w in zip(exact, given, strict=True)]
        sums = jax.device_get([_sums(*each) for each in zip(exact, quantized, given, laned, rows, strict=True)])
        sums = [_joined(*pair) if cut else pair for pair, cut in zip(sums, rows, strict=True)]
        found = [[np.broadcast_to(x, (*lanes, x.shape[-1])) for x in pair] for pair in sums]
        squares = np.stack([x for x, _ in found], -2).astype(np.float64) if found else np.zeros((*lanes, 0, 2))
        integers = np.stack([x for _, x in found], -2).astype(np.int64) if found else np.zeros((*lanes, 0, 5), np.int64)
        return cls(squares, integers[..., :2], integers[..., 2:])

    def __add__(self, other: "Comparison") -> "Comparison":
        squares, exponents = aligned(
            np.stack([self.squares, other.squares]), np.stack([self.exponents, other.exponents])
        )
        return Comparison(squares.sum(0), exponents, self.counts + other.counts)

    @property
    def error(self) -> OutputError:
        """The metrics of every output array."""
        (error, energy), (k, of) = (np.moveaxis(x, -1, 0) for x in (self.squares, self.exponents))
        unmatched, compared, finite = np.moveaxis(self.counts, -1, 0)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            share = np.ldexp(np.sqrt(np.where(error > 0, error / energy, 0)), k - of)
        return OutputError(np.where(finite > 0, share, np.nan), unmatched, compared)


def _has_rows(a, weights):
    """True if an output is large and can be cut along its leading axis: no mesh splits it; weights have the axis too."""
    whole = a.ndim > 1 and a.size >= LARGE and len(a.sharding.device_set) == 1
    return whole and (weights is None or weights.shape[:1] == a.shape[:1])


@functools.partial(jax.jit, static_argnames=("laned", "rows"))
def _sums(a, b, weights, laned, rows):
    """Squares (2,) of errors and float outputs; their exponents and the counts (5,). Of all lanes of b.

    With `rows` of each row of the leading axis, one after the other: the arrays in between are then those of a row.
    """
    compare = (lambda *args: lax.map(lambda row: _compare(*row), args)) if rows else _compare
    return over_lanes(compare, (a, b, weights), (False, laned, False))


def _joined(squares, numbers):
    """The sums over all rows (.., rows, 2) and (.., rows, 5)."""
    squares, numbers = np.moveaxis(squares.astype(np.float64), -2, 0), np.moveaxis(numbers.astype(np.int64), -2, 0)
    squares, exponents = aligned(squares, numbers[..., :2])
    return squares.sum(0), np.concatenate([exponents, numbers[..., 2:].sum(0)], -1)


def _compare(a, b, weights):
    if jnp.issubdtype(a.dtype, jnp.complexfloating):
        a, b = (jnp.stack([x.real, x.imag]) for x in (a, b))
        weights = None if weights is None else weights[None]
    if not jnp.issubdtype(a.dtype, jnp.floating) or not a.size:
        return jnp.zeros(2), jnp.zeros(5, jnp.int32)
    x, y = at_least_float32(a), at_least_float32(b)
    both = jnp.isfinite(x) & jnp.isfinite(y)
    unmatched, counted = ~(both | (x == y) | (jnp.isnan(x) & jnp.isnan(y))), jnp.ones_like(both)
    if weights is not None:
        counted = jnp.broadcast_to(weights > 0, x.shape)
        both, unmatched = both & counted, unmatched & counted
    x, y = jnp.where(both, x, 0), jnp.where(both, y, 0)
    k, of = (exponent_of(jnp.max(jnp.abs(z))) for z in (jnp.maximum(jnp.abs(x), jnp.abs(y)), x))
    total = lambda z: jnp.sum(z**2 if weights is None else z**2 * weights.astype(z.dtype))
    squares = jnp.stack([total(reduced(x, k) - reduced(y, k)), total(reduced(x, of))])
    counts = [jnp.sum(z, dtype=jnp.int32) for z in (unmatched, counted, both)]
    return squares, jnp.stack([k, of, *counts])


def in_words(error: float, outputs: OutputError | None) -> str:
    """An output error as text, with the reason if it is nan. `outputs` is None after training."""
    if error == error:
        return f"{error:.2%}"
    if outputs is None:
        return "unknown since training"
    if not outputs.unmatched:
        return "unknown, as there is no finite floating output to compare"
    rest = f"; error of the others: {outputs.error:.2%}" if outputs.error == outputs.error else ""
    return f"nan, as {unmatched_in_words(outputs)}{rest}"


def unmatched_in_words(outputs: OutputError) -> str:
    """The number of unmatched outputs, in words."""
    count = f"{outputs.unmatched:,} of {outputs.compared:,}"
    return f"{count} outputs are NaN or infinite in one of the two networks only"

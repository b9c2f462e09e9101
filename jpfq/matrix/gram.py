"""The data that a method needs: sums over calibration rows, streamed batch by batch.

X are the inputs of a layer in the float network, Xq its inputs in the network quantized so far; both have the shape
(*rows, in). Every field of `Gram` is a sum over rows, so two of them add: over batches, over devices, over hosts.
"""

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from ..scalar.pytree import register_dataclass
from .arrays import at_least_float32, inner, matmul, over_rows, raised, square, sum_rows
from .explicit_mesh import anywhere, is_traced
from .host import namespace
from .shown import Shown
from .split import diagonal, permuted

SUMS = ("H", "C", "drift", "sum_X", "sum_Xq", "count")


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Gram:
    """Second moments of a layer's inputs.

    C holds `G - H` with G = Xq^T X: a small correction instead of the difference of two large sums. `C` and `drift` are
    None as long as the two networks agree (X is Xq), where both are exactly zero.

    Examples:
        >>> gram = jpfq.Gram.from_data(batches[0]).update(batches[1])
        >>> gram.H.shape, int(gram.count)
        ((32, 32), 128)
    """

    H: jax.Array  # (in, in)  Xq^T Xq
    C: jax.Array | None  # (in, in)  Xq^T (X - Xq); row: quantized side
    drift: jax.Array | None  # (in, in)  (X - Xq)^T (X - Xq)
    sum_X: jax.Array  # (in,)
    sum_Xq: jax.Array  # (in,)
    count: jax.Array  # ()  rows seen, or the sum of their weights
    power: int = dataclasses.field(default=0, metadata={"static": True})  # the sums are of inputs times 2^power
    inputs: jax.Array | None = None  # ()  how many coordinates there are, where more of zeros follow; see buckets.py

    @classmethod
    @anywhere
    def from_data(cls, X: jax.Array, Xq: jax.Array | None = None, weights: jax.Array | None = None) -> Self:
        """The Gram of one batch.

        Where squares would underflow or overflow (inputs below 1e-12 or beyond 1e12 in float32), it is that of the inputs
        times a power of 2, which codes do not depend on. Under `jit` they are taken as they are.

        Args:
            X: float inputs (*rows, in).
            Xq: inputs of the quantized network, same shape; None where the two agree.
            weights: one number per row (*rows,), broadcast over the leading axes of the rows; 0 leaves a row out.

        Examples:
            >>> rounded = jnp.round(X * 4) / 4  # as the layers before would have it
            >>> gram = jpfq.Gram.from_data(X, rounded, weights=jnp.ones(64))
            >>> gram.C.shape
            (32, 32)
        """
        if Xq is not None and X.shape != Xq.shape:
            raise ValueError(f"X and Xq must have one shape (*rows, in); got {X.shape} and {Xq.shape}.")
        if X.ndim < 2:
            raise ValueError(f"X must be (*rows, in), at least two axes; got shape {X.shape}.")
        gram = cls.scaled(X, Xq, weights)
        power = 0 if is_traced(gram.H) else gram.shown().power
        return cls.scaled(X, Xq, weights, power) if power else gram

    @classmethod
    def scaled(cls, X: jax.Array, Xq: jax.Array | None, weights: jax.Array | None, power: int = 0) -> Self:
        """`from_data` of the inputs times 2^power, of which the Gram keeps note.

        Args:
            X, Xq, weights: as for `from_data`.
            power: a whole number.

        Examples:
            >>> gram = jpfq.Gram.scaled(1e-25 * X, None, None, power=80)
            >>> gram.power, bool(jnp.allclose(gram.mean_X, (1e-25 * X).mean(0), atol=0))
            (80, True)
        """
        X, Xq = raised(at_least_float32(X), power), None if Xq is None else raised(at_least_float32(Xq), power)
        rows = X.shape[:-1]
        weight = jnp.ones(rows, X.dtype) if weights is None else over_rows(weights, rows).astype(X.dtype)
        if weights is not None:  # selected, as 0 times NaN is no 0
            counted = lambda x: jnp.where(weight[..., None] > 0, x, 0)
            X, Xq = counted(X), None if Xq is None else counted(Xq)
        right = X if Xq is None else Xq
        left = right if weights is None else right * weight[..., None]
        sum_q = sum_rows(weight, right)
        if Xq is None:
            return cls(square(left, right), None, None, sum_q, sum_q, weight.sum(), power)
        D = X - Xq
        drift = square(D if weights is None else D * weight[..., None], D)
        return cls(square(left, right), inner(left, D), drift, sum_rows(weight, X), sum_q, weight.sum(), power)

    def update(self, X, Xq=None, weights=None) -> Self:
        """This Gram and one more batch.

        Args:
            X, Xq, weights: as for `from_data`.

        Examples:
            >>> for batch in batches[1:]:
            ...     gram = gram.update(batch)
        """
        return self.merge(type(self).from_data(X, Xq, weights))

    def merge(self, other: Self) -> Self:
        """The Gram of both sets of rows. Across devices the same is `jax.lax.psum(gram, axis)`.

        Args:
            other: of inputs of the same width.

        Examples:
            >>> both = jpfq.Gram.from_data(batches[0]).merge(jpfq.Gram.from_data(batches[1]))
            >>> int(both.count)
            128
        """

        power = min(self.power, other.power)  # that of the larger inputs
        one, two = self.to_power(power), other.to_power(power)

        def add(name: str) -> Any:
            a, b = getattr(one, name), getattr(two, name)
            return b if a is None else a if b is None else a + b

        return type(self)(**{name: add(name) for name in SUMS}, power=power)

    def shown(self) -> "Shown":
        """The properties of the data as a `Shown`; reads the Gram.

        Examples:
            >>> gram.shown().inputs  # whether any is not 0
            True
        """
        return Shown.of(self.diagonal, self.sum_X, self.sum_Xq, self.count)

    def to_power(self, power: int) -> Self:
        """The same Gram as sums of inputs times another 2^power.

        Args:
            power: a whole number.

        Examples:
            >>> bool(jnp.allclose(gram.to_power(3).H, 4**3 * gram.H))
            True
        """
        more = power - self.power
        if not more:
            return self
        square: Any = lambda M: (
            None if M is None else raised(raised(M, more), more)
        )  # at once 2^more would underflow itself
        sums = raised(self.sum_X, more), raised(self.sum_Xq, more)
        return type(self)(square(self.H), square(self.C), square(self.drift), *sums, self.count, power)

    def permute(self, p: jax.Array) -> Self:
        """The Gram of the inputs taken in the order p."""
        C, drift = (None if M is None else permuted(M, p) for M in (self.C, self.drift))
        return dataclasses.replace(
            self, H=permuted(self.H, p), C=C, drift=drift, sum_X=self.sum_X[p], sum_Xq=self.sum_Xq[p]
        )

    def split(self, rows: NamedSharding) -> Self:
        """The Gram with its matrices split as `rows` says; under jit, where each device then makes its own part."""
        H, C, drift = (
            None if M is None else lax.with_sharding_constraint(M, rows) for M in (self.H, self.C, self.drift)
        )
        return dataclasses.replace(self, H=H, C=C, drift=drift)

    def centred(self) -> Self:
        """The Gram of the inputs less their means, which is that of a layer whose bias is free.

        An input that never changes is dead in it: what is left of its variance by rounding is taken for 0.

        Examples:
            >>> bool(jnp.abs(gram.centred().mean_X).max() == 0)
            True
        """
        count = self._rows
        less = lambda M, a, b: M - jnp.outer(a, b) / count
        H = less(self.H, self.sum_Xq, self.sum_Xq)
        least = 64 * jnp.finfo(H.dtype).eps * jnp.diagonal(self.H)
        alive = (jnp.diagonal(H) > least).astype(H.dtype)
        H = H * alive * alive[:, None]
        none = jnp.zeros_like(self.sum_X)
        less_sum = jnp.where(self.diagonal == 0, self.sum_Xq, 0)  # the smallest variance that rounding does not make
        if self.C is None or self.drift is None:
            return type(self)(H, None, None, less_sum, less_sum, self.count, self.power)
        shift = self.sum_X - self.sum_Xq
        C = less(self.C, self.sum_Xq, shift) * alive[:, None]
        return type(self)(H, C, less(self.drift, shift, shift), none, less_sum, self.count, self.power)

    def awake(self) -> Self:
        """The Gram as if dead coordinates were independent inputs of the mean energy of the others, or of 1 for want of any.

        What trades one weight against another then counts theirs as any, for all that is known of new rows.

        Examples:
            >>> bool((gram.awake().diagonal > 0).all())
            True
        """
        mean = mean_energy(self.diagonal)
        unseen = jnp.where((self.diagonal > 0) | ~self.real, 0, jnp.where(mean > 0, mean, 1))
        return dataclasses.replace(self, H=self.H + jnp.diag(unseen))

    @property
    def diagonal(self) -> jax.Array:
        """Square norm of each input coordinate on the quantized side (in,); 0 marks a dead coordinate."""
        return diagonal(self.H)

    @property
    def magnitude(self) -> jax.Array:
        """The largest norm of an input coordinate in either network (); nan where inputs are too small to be squared."""
        squares = self.diagonal if self.drift is None else jnp.maximum(self.diagonal, diagonal(self.drift))
        largest = jnp.max(squares, initial=0)
        seen = (largest > 0) | jnp.any(self.sum_X != 0) | jnp.any(self.sum_Xq != 0)
        lost = seen & (largest < 2.0**26 * jnp.finfo(squares.dtype).tiny)
        return jnp.where(lost, jnp.nan, jnp.sqrt(largest))

    @property
    def unseen(self) -> jax.Array:
        """True where an input coordinate is 0 on all rows of the quantized side, or never changes if `centred` (in,).

        The square of a small input may underflow next to large ones; its sum does not.
        """
        return (self.diagonal == 0) & (self.sum_Xq == 0) & self.real

    @property
    def n(self) -> int | jax.Array:
        """The number of input coordinates, without those that only fill up."""
        return self.sum_Xq.shape[-1] if self.inputs is None else self.inputs

    @property
    def real(self) -> jax.Array:
        """True for the input coordinates, False for those that only fill up, which come last (in,)."""
        return jnp.arange(self.sum_Xq.shape[-1]) < self.n

    @property
    def G(self) -> jax.Array:
        """Xq^T X (in, in)."""
        return self.H if self.C is None else self.H + self.C

    @property
    def mean_X(self) -> jax.Array:
        """Mean of the float inputs (in,)."""
        return raised(self.sum_X / self._rows[..., None], -self.power)

    @property
    def mean_Xq(self) -> jax.Array:
        """Mean of the quantized network's inputs (in,)."""
        return raised(self.sum_Xq / self._rows[..., None], -self.power)

    @property
    def _rows(self):
        return namespace(self.count).where(self.count > 0, self.count, 1)

    def energy(self, W: jax.Array) -> jax.Array:
        """||X w||^2 for each column w of W (in, out): the energy of the float outputs.

        Args:
            W: weights (in, out).

        Examples:
            >>> gram.energy(W).shape
            (8,)
        """
        return self.square_error(W, jnp.zeros_like(W))

    def square_error(self, W: jax.Array, q: jax.Array) -> jax.Array:
        """||X w - Xq q||^2 per column, for W and q (in, out).

        With e = w - q this is e^T H e + 2 e^T C w + w^T drift w: nothing large cancels, unlike in algorithms that keep
        ||X w||^2 and subtract. It is in units of 4^power.

        Args:
            W: float weights (in, out).
            q: what takes their place (in, out).

        Examples:
            >>> tensor, info = jpfq.solve(W, gram, bits=4)
            >>> relative = gram.square_error(W, tensor.dequantize()).sum() / gram.energy(W).sum()
            >>> bool(jnp.isclose(relative, info.relative_error**2, rtol=1e-3))
            True
        """
        total = self.excess(W, q)
        if self.drift is not None:
            total += jnp.sum(W * matmul(self.drift, W), axis=0)
        return jnp.maximum(total, 0)

    def excess(self, W: jax.Array, q: jax.Array) -> jax.Array:
        """`square_error` less ||(X - Xq) w||^2, the part that does not depend on q; may be negative."""
        e = W - q
        total = jnp.sum(e * matmul(self.H, e), axis=0)
        return total if self.C is None else total + 2 * jnp.sum(e * matmul(self.C, W), axis=0)


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The calibration rows themselves, for the data form: X and Xq are (rows, in), Xq None where the networks agree.

    Examples:
        >>> tensor, info = jpfq.solve(W, jpfq.Rows(X), bits=4, form="data")
    """

    X: jax.Array
    Xq: jax.Array | None = None
    power: int = dataclasses.field(default=0, metadata={"static": True})  # they are inputs times 2^power
    inputs = None  # as of `Gram`: none only fills up

    def __post_init__(self):
        shapes = [getattr(x, "shape", None) for x in (self.X, self.Xq)]
        if shapes[0] and len(shapes[0]) < 2:
            raise ValueError(f"X must be (rows, in); got shape {shapes[0]}.")
        if shapes[0] and shapes[1] and shapes[0] != shapes[1]:
            raise ValueError(f"X and Xq must have one shape (rows, in); got {shapes[0]} and {shapes[1]}.")

    @property
    def quantized(self) -> jax.Array:
        """Xq, or X where the two agree."""
        return self.X if self.Xq is None else self.Xq

    @property
    def diagonal(self) -> jax.Array:
        """As `Gram.diagonal`."""
        return jnp.sum(self.quantized**2, axis=-2)

    @property
    def magnitude(self) -> jax.Array:
        """The largest input in either network ()."""
        return jnp.maximum(jnp.max(jnp.abs(self.X), initial=0), jnp.max(jnp.abs(self.quantized), initial=0))

    @property
    def unseen(self) -> jax.Array:
        """As `Gram.unseen`."""
        return jnp.all(self.quantized == 0, axis=-2)

    def permute(self, p: jax.Array) -> Self:
        """The rows with their coordinates in the order p."""
        return type(self)(self.X[:, p], None if self.Xq is None else self.Xq[:, p], self.power)

    def shown(self) -> "Shown":
        """The properties of the rows as a `Shown`; reads them."""
        X, Xq = (jnp.abs(x).max(-2, initial=0) for x in (self.X, self.quantized))
        return Shown.of(self.diagonal, X, Xq, jnp.asarray(self.X.shape[-2]))

    def to_power(self, power: int) -> Self:
        """The same rows times another 2^power."""
        rows = jax.tree.map(lambda x: raised(x, power - self.power), self)
        return dataclasses.replace(rows, power=power)

    def gram(self) -> Gram:
        """Their Gram."""
        return dataclasses.replace(Gram.scaled(self.X, self.Xq, None), power=self.power)

    def square_error(self, W: jax.Array, q: jax.Array) -> jax.Array:
        """As `Gram.square_error`."""
        residual = matmul(self.quantized, W - q)
        return jnp.sum((residual if self.Xq is None else residual + matmul(self.X - self.Xq, W)) ** 2, axis=0)


def mean_energy(diagonal: jax.Array) -> jax.Array:
    """The mean of diag(H) over the coordinates that are not dead; 0 where all are."""
    return jnp.sum(diagonal) / jnp.maximum(jnp.sum(diagonal > 0), 1).astype(diagonal.dtype)


def as_gram(data: Gram | Rows) -> Gram:
    """The Gram of data in either form."""
    return data.gram() if isinstance(data, Rows) else data

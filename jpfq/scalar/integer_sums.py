"""Integer sums: which products go into one accumulator, and the worst-case value of each."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .grid import Grid, Number, is_number
from .pytree import register_dataclass
from .scaled_grid import ScaledGrid

MAX_WIDTH = 32


@register_dataclass
@dataclasses.dataclass(frozen=True)
class SumSpec:
    """The sums that are bounded: those over tiles of inputs, by 2^(P-1) - 1. `tile` None is one sum over all inputs."""

    bits: Number
    lo: Number  # mu, the least input code
    hi: Number  # nu, the largest
    tile: int | None = dataclasses.field(metadata={"static": True})

    @property
    def capacity(self) -> jax.Array:
        """2^(P-1) - 1, as int32."""
        return jnp.right_shift(jnp.int32(2**31 - 1), 32 - as_int(self.bits))

    def size(self, n: int) -> int:
        """Inputs in a tile, of n."""
        return n if self.tile is None else min(self.tile, n)

    def tiles(self, n: int) -> int:
        """Tiles of n inputs, the last perhaps not full."""
        return -(-n // self.size(n))

    def spent(self, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The amounts that integer codes may add to the largest sum, and take from the least."""
        up, down = jnp.maximum(k, 0), jnp.maximum(-k, 0)
        nu, mu = as_int(self.hi), -as_int(self.lo)
        return nu * up + mu * down, mu * up + nu * down

    def limits(self, above: jax.Array, below: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """The least and the largest code that fit the room, as floats."""
        nu, mu = as_int(self.hi), -as_int(self.lo)
        most = jnp.minimum(quotient(above, nu), quotient(below, mu))
        least = jnp.minimum(quotient(below, nu), quotient(above, mu))
        return -least.astype(dtype), most.astype(dtype)

    def of_codes(self, k: jax.Array, order: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`spent` of each tile (tiles, out), for integer codes (in, out) in the order of the recursion."""
        n = k.shape[0]
        over = lambda x: jax.ops.segment_sum(x, order // self.size(n), self.tiles(n))
        above, below = self.spent(k)
        return over(above), over(below)

    def split(self, W: jax.Array, order: jax.Array) -> jax.Array:
        """Weights in the order of the recursion as (tiles, T, out) in their own; what is missing in the last tile is 0."""
        n, out = W.shape
        tiles, size = self.tiles(n), self.size(n)
        return jnp.zeros((tiles * size, out), W.dtype).at[order].set(W).reshape(tiles, size, out)

    def step_of(self, levels: ScaledGrid, order: jax.Array) -> jax.Array:
        """The value of the integer 1 in each tile (tiles, out), from those of all weights in the order of the recursion."""
        return self.split(levels.integer_step, order)[:, 0]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class WorstCase:
    """The largest and the least sums of a quantized matrix.

    sums: which, with the accumulator asked for. ends: the largest of each tile over all inputs, and less the least one
    (matrices, tiles, out, 2).
    """

    sums: SumSpec
    ends: jax.Array

    @property
    def bits(self) -> int:
        """The width that the sum of any tile needs."""
        return width_of(int(np.max(np.asarray(self.ends), initial=0)))

    @property
    def outer_bits(self) -> int:
        """The width that the sum of all tiles needs."""
        return width_of(int(np.sum(np.asarray(self.ends), 1, dtype=np.int64).max(initial=0)))

    def types_bits(self, grid: Grid, n: int) -> int:
        """P*, of tiles of n inputs in all and weights on a grid, see `datatype_bits`."""
        return datatype_bits(self.sums.size(n), grid, (int(self.sums.lo), int(self.sums.hi)))

    @classmethod
    def join(cls, reaches: "list[WorstCase | None]") -> "WorstCase | None":
        """The reach of matrices one after the other; None where they bound nothing."""
        found = [reach for reach in reaches if reach is not None]
        return cls(found[0].sums, jnp.concatenate([reach.ends for reach in found])) if found else None


def input_codes(inputs: Any) -> tuple[Number, Number]:
    """The least and the largest input code, of a grid or a pair (mu, nu)."""
    if isinstance(inputs, Grid):
        lo, hi, *_ = inputs.alphabet()
        if inputs.table is not None:
            raise ValueError(f"{inputs} is a table, and inputs that are summed are runs of integers: jpfq.Integer(8).")
        return lo, hi
    if not isinstance(inputs, tuple) or len(inputs) != 2:
        raise ValueError(
            f"inputs is the grid of the input codes, such as jpfq.Asymmetric(8), or (mu, nu); got {inputs!r}."
        )
    lo, hi = inputs
    if is_number(lo) and is_number(hi) and (lo != int(lo) or hi != int(hi) or not lo <= 0 <= hi or lo == hi):
        raise ValueError(f"Input codes are integers from mu <= 0 to nu >= 0; got {inputs!r}.")
    return lo, hi


def width_of(reach: int) -> int:
    """Bits of the smallest signed accumulator, symmetric about 0, that holds +-reach."""
    return int(reach).bit_length() + 1


def datatype_bits(n: int, grid: Grid, inputs: Any) -> int:
    """P*: the accumulator that n products of any weight codes and any input codes fit, without a constraint.

    The bound in terms of widths, ceil(a + log2(1 + 2^-a) + 1) with a = log2 n + N + M - 1 - [inputs signed], takes both
    ranges for powers of two and may be one more.

    Args:
        n: how many products are summed.
        grid: of the weights; its zero is not to be fitted.
        inputs: the grid of the inputs, such as `Asymmetric(8)`, or their least and largest code (mu, nu).

    Examples:
        >>> jpfq.datatype_bits(128, jpfq.Integer(4), jpfq.Asymmetric(4))
        15
    """
    (lo, hi, zero, reach), (mu, nu) = grid.alphabet(), input_codes(inputs)
    if zero is None:
        raise ValueError(f"{grid} fits a zero point to the weights, which no bound on their codes knows.")
    if grid.table is not None and grid.unit is None:
        raise ValueError(no_integers(grid))
    largest = max(hi - zero, zero - lo) if grid.table is None or reach is None else round(reach / grid.unit)
    return width_of(n * int(largest) * int(max(nu, -mu)))


def no_integers(grid: Grid) -> str:
    """Says why products of a grid's levels are no integers."""
    return (
        f"The levels of {grid} are no whole multiples of one number (up to 2^24 of it), so their products are not summed as "
        "integers: take a grid of integers, such as jpfq.Integer(4), or jpfq.E2M1()."
    )


def whole(x):
    """Integers held as floats, as int32."""
    return x.astype(jnp.int32)


def as_int(x):
    return jnp.asarray(x, jnp.int32) if is_number(x) or isinstance(x, np.ndarray) else x.astype(jnp.int32)


def quotient(x: jax.Array, d: jax.Array) -> jax.Array:
    """floor(x / d) of int32 x >= 0, as a float: exact below 2^19, about 2^19 and no more than that beyond; d = 0 is beyond.

    A division of integers takes more time than all else at a coordinate. The guess is at most one too small.
    """
    beyond, divisor = jnp.float32(2**19), jnp.maximum(d, 1)
    inverse = (1 - 2**-21) / divisor.astype(jnp.float32)
    guess = jnp.minimum(jnp.floor(x.astype(jnp.float32) * inverse), beyond)
    rest = x - guess.astype(jnp.int32) * divisor
    exact = jnp.where((rest >= divisor) & (guess < beyond), guess + 1, guess)
    return jnp.maximum(exact, jnp.where(d == 0, beyond, 0))

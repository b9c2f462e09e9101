"""One weight matrix and its data -> codes: order, scale, method, recursion, and back.

`solve` is the public entrance for one matrix. `solve_all` is the same for several matrices with a Gram each (the feature
groups of a convolution, experts), in one program; the network walk calls it.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from ..scalar import Codes, Grid, Levels, MinMSE, Nearest, Rounding, Scale, grid_of_bits
from ..scalar.pytree import register_dataclass
from .each import each
from .gram import Gram, Rows, at_least_float32, is_traced, matmul
from .methods import GPFQ, Method
from .order import Natural, Order
from .pathfollow import follow
from .qtensor import Info, QTensor, code_dtype, entropy
from .substitute import BLOCK, Recursion, substitute

Form = Literal["auto", "gram", "data"]


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Recipe:
    """Everything that decides the codes of a matrix, given its data."""

    grid: Grid
    scale: Scale = MinMSE()
    method: Method = GPFQ()
    rounding: Rounding = Nearest()
    order: Order = Natural()
    form: Form = dataclasses.field(default="auto", metadata={"static": True})
    block: int | None = dataclasses.field(default=BLOCK, metadata={"static": True})

    def __post_init__(self):
        if self.form not in ("auto", "gram", "data"):
            raise ValueError(f"form is 'auto', 'gram' or 'data'; got {self.form!r}.")
        if self.block is not None and (not isinstance(self.block, int) or self.block < 1):
            raise ValueError(
                f"block is a positive number of coordinates, or None for the plain scan; got {self.block!r}."
            )
        if self.form == "data" and isinstance(self.method, Method) and not self.method.local:
            raise ValueError(f"{self.method} has no data form; use form='gram'.")

    def prefers_rows(self, rows: int, n: int, out: int) -> bool:
        """Whether the data form is to be used for `rows` calibration rows, n inputs and `out` neurons.

        It is where it takes fewer operations (6 rows n (out + block) against 6 rows n^2 + 4 n^2 out) and no more memory
        (2 rows n + 3 rows out against 3 n^2 numbers): for many more inputs than rows.
        """
        if self.form != "auto" or not self.method.local:
            return self.form == "data"
        faster = 6 * rows * n * (out + (self.block or n)) < 6 * rows * n * n + 4 * n * n * out
        return faster and rows * (2 * n + 3 * out) <= 3 * n * n


class Solution(NamedTuple):
    """The result for B matrices of one kernel."""

    codes: jax.Array  # (B, in, out) integers, as floats
    q: jax.Array  # (B, in, out) their values
    step: jax.Array  # (B, groups, out), or (1, 1, 1) where all share one
    zero: jax.Array
    info: Info


def solve(
    W: jax.Array,
    data: Gram | Rows,
    *,
    bits: int | None = None,
    grid: Grid | None = None,
    key: jax.Array | None = None,
    **settings,
) -> tuple[QTensor, Info]:
    """Quantizes one weight matrix so that Xq q is near X W.

    Args:
        W: weights (in, out), one column per neuron.
        data: `Gram.from_data(X, Xq)`, or `Rows(X, Xq)` to let the cheaper of the Gram and the data form be taken.
        bits: short for `grid=Integer(bits)`, or `Binary()` at one bit.
        grid: the alphabet; give this or `bits`.
        key: for a rounding that draws random numbers.
        **settings: `scale`, `method`, `rounding`, `order`, `form`, `block`: the fields of `Recipe`.

    Returns:
        The quantized matrix, and what its making was like.

    Raises:
        ValueError: for weights that are not a finite real matrix, data of another width, a grid given twice or not at
            all, or a step of zero under weights that are not zero.

    Example:
        >>> X, W = jax.random.normal(jax.random.key(0), (256, 64)), jax.random.normal(jax.random.key(1), (64, 8))
        >>> tensor, info = jpfq.solve(W, jpfq.Gram.from_data(X), bits=4)
        >>> tensor.codes.shape, tensor.step.shape
        ((64, 8), (1, 8))
    """
    recipe = recipe_of(bits, grid, **settings)
    W = jnp.asarray(W)
    if isinstance(data, Rows):
        data = jax.tree.map(at_least_float32, data)
    _check(W, data, recipe, key)
    if isinstance(data, Rows) and not recipe.prefers_rows(data.X.shape[0], *W.shape):
        data = data.gram()
    result = solve_all(at_least_float32(W)[None], jax.tree.map(lambda x: x[None], data), recipe, key)
    raise_on(result.info, recipe, "the matrix")
    codes = result.codes[0].astype(code_dtype(recipe.grid))
    return QTensor(codes, result.step[0], result.zero[0], recipe.grid, W.dtype), result.info


def recipe_of(bits: int | None, grid: Grid | None, **settings) -> Recipe:
    """The recipe of a call that names bits or a grid."""
    if (bits is None) == (grid is None):
        raise ValueError(f"Give bits=... or grid=..., one of them; got bits={bits!r} and grid={grid!r}.")
    kinds = {"grid": Grid, "scale": Scale, "method": Method, "rounding": Rounding, "order": Order}
    settings = {"grid": grid_of_bits(bits) if grid is None else grid, **settings}
    for name, kind in kinds.items():
        value = settings.get(name)
        if name in settings and not isinstance(value, kind):
            hint = (
                f"; did you mean jpfq.{value.__name__}()?"
                if isinstance(value, type) and issubclass(value, kind)
                else ""
            )
            article = "an" if kind is Order else "a"
            raise ValueError(
                f"{name} takes {article} {kind.__name__}, such as jpfq.{_examples[name]}; got {value!r}{hint}"
            )
    return Recipe(**settings)


_examples = {
    "grid": "Ternary()",
    "scale": "AbsMax()",
    "method": "GPFQ()",
    "rounding": "Nearest()",
    "order": "Natural()",
}


def solve_all(W: jax.Array, data: Gram | Rows, recipe: Recipe, key: jax.Array | None) -> Solution:
    """Quantizes B matrices W (B, in, out), with a leading axis of B on every array of `data`.

    A scale per tensor is shared by all B. Key: folded by matrix, neuron and input coordinate. Compiled once for all grids.
    """
    return _solve_all(W, data, dataclasses.replace(recipe, grid=Codes.of(recipe.grid)), key)


@jax.jit
def _solve_all(W, data, recipe, key):
    B, n, out = W.shape
    levels = recipe.scale(jnp.moveaxis(W, 0, 1).reshape(n, B * out), recipe.grid)
    split = lambda x: x[None] if x.shape[1] == 1 else jnp.moveaxis(x.reshape(x.shape[0], B, out), 1, 0)
    step, zero = split(levels.step), split(levels.zero)

    def one(W, data, step, zero, b):
        p = recipe.order(data.diagonal)
        index = jnp.arange(n) if p is None else p
        draw = None if key is None else jax.random.fold_in(key, b)
        recursion = Recursion(Levels(step, zero, levels.lo, levels.hi), index, out, recipe.rounding, draw)
        sorted_W, sorted_data = (W, data) if p is None else (W[p], data.permute(p))
        if isinstance(data, Rows):
            path, u = follow(sorted_W, sorted_data, recipe.method, recursion, block=recipe.block)
            square_error, energy = jnp.sum(u**2), jnp.sum(matmul(data.X, W) ** 2)
        else:
            A, L = recipe.method(sorted_W, sorted_data)
            path = substitute(A, L, recursion, block=recipe.block)
            square_error = jnp.sum(sorted_data.square_error(sorted_W, path.q))
            energy = jnp.sum(sorted_data.energy(sorted_W))  # shares products with the line before
        codes, q = (x if p is None else jnp.zeros_like(x).at[p].set(x) for x in (path.codes, path.q))
        nonzero = jnp.any(W.reshape(step.shape[0], -1, out) != 0, axis=1)
        counts = (square_error, energy, jnp.sum(data.diagonal == 0), jnp.sum((step == 0) & nonzero))
        return codes, q, jnp.mean(path.saturated), counts

    codes, q, saturation, counts = each(
        one, W, data, *(jnp.broadcast_to(x, (B, *x.shape[1:])) for x in (step, zero)), jnp.arange(B)
    )
    square_error, energy, dead, zero_steps = (x.sum() for x in counts)
    info = Info(square_error, energy, saturation.mean(), dead, jnp.mean(q == 0), entropy(codes), zero_steps)
    return Solution(codes, q, step, zero, info)


def raise_on(info: Info, recipe: Recipe, name: str) -> None:
    """Raises what went wrong inside a compiled solve; a no-op while traced."""
    if is_traced(info.zero_steps):
        return
    if int(info.zero_steps):
        raise ValueError(
            f"{recipe.scale} gives a step of zero under weights of {name} that are not all zero "
            f"({int(info.zero_steps)} steps): take a scale that sees them, such as jpfq.AbsMax() or jpfq.MinMSE()."
        )
    if not bool(jnp.isfinite(info.square_error)):
        raise ValueError(f"The calibration data of {name} overflow: its Gram is not finite. Scale the inputs down.")


def _check(W, data, recipe, key):
    if W.ndim != 2 or not jnp.issubdtype(W.dtype, jnp.floating):
        raise ValueError(f"W must be a real floating matrix (in, out); got shape {W.shape}, {W.dtype}.")
    if not isinstance(data, Gram | Rows):
        raise ValueError(
            f"data is a jpfq.Gram or jpfq.Rows; got {type(data).__name__}. Try jpfq.Gram.from_data(X, Xq)."
        )
    width = data.diagonal.shape[0]
    if width != W.shape[0]:
        raise ValueError(f"W has {W.shape[0]} input coordinates (rows) but the data have {width}.")
    if isinstance(data, Gram) and recipe.form == "data":
        raise ValueError("form='data' needs the calibration rows: pass jpfq.Rows(X, Xq) in place of a Gram.")
    if recipe.rounding.random and key is None:
        raise ValueError(f"{recipe.rounding} draws random numbers: pass key=jax.random.key(...).")
    moments = (data.sum_X, data.sum_Xq) if isinstance(data, Gram) else (data.X, data.quantized)
    for name, values in (("W", (W,)), (f"The {type(data).__name__}", (*moments, data.diagonal))):
        if any(not is_traced(x) and not bool(jnp.isfinite(x).all()) for x in values):
            raise ValueError(f"{name} holds NaN or infinity.")

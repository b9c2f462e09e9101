"""The public entrance for one matrix, and what it refuses."""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ..scalar import Constraint, Grid, Rounding, Scale
from .arrays import at_least_float32, is_finite
from .explicit_mesh import anywhere, is_traced
from .failures import raise_on
from .finish import Finish
from .gram import Gram, Rows
from .layout import DotLayout
from .methods import Method
from .order import Order
from .prepare import Prepare
from .qtensor import Info, QTensor, code_dtype
from .recipe import Form, recipe_of
from .recursion import BLOCK
from .rotate import Hadamard
from .shrink import Shrinkage
from .slices import slice_width, solve_sliced
from .stages import solve_all


@anywhere
def solve(
    W: jax.Array,
    data: Gram | Rows,
    *,
    bits: int | None = None,
    grid: Grid | None = None,
    key: jax.Array | None = None,
    plain: bool = False,
    scale: Scale | None = None,
    rotation: Hadamard | None = None,
    order: Order | None = None,
    prepare: Prepare | tuple[Prepare, ...] | None = None,
    method: Method | None = None,
    rounding: Rounding | None = None,
    finish: Finish | Literal["recommended"] | None = "recommended",
    shrinkage: Shrinkage | Literal["recommended"] | None = "recommended",
    accumulator: Constraint | None = None,
    inputs: Any = None,
    step_dtype: DTypeLike | None = None,
    form: Form = "auto",
    block: int | None = BLOCK,
) -> tuple[QTensor, Info]:
    """Quantizes one weight matrix so that Xq q is near X W.

    Args:
        W: weights (in, out), one column per neuron.
        data: `Gram.from_data(X, Xq)`, or `Rows(X, Xq)` to let the cheaper of the Gram and the data form be taken.
        bits: short for `grid=Integer(bits)`, or `Binary()` at one bit.
        grid: the alphabet; give this or `bits`.
        key: for a rounding that draws random numbers.
        plain: whether the method stands alone: what is left out is then left away, rather than recommended (`jpfq.best`).
        scale: how steps are chosen.
        rotation: of the inputs.
        order: in which inputs are visited.
        prepare: what changes the weights before, one part or a tuple.
        method: what the recursion is fed.
        rounding: of one number.
        finish: what improves the codes afterwards; None for nothing.
        shrinkage: of the Gram, so that codes fit rows not seen; None for none.
        accumulator: which integer sums must never overflow, such as `jpfq.Accumulator(16, tile=64)`.
        inputs: the grid of the input codes that an accumulator sums, or (mu, nu).
        step_dtype: what steps are stored in: float32 where it is left out, or bfloat16, float16, `float8_e8m0fnu` (powers of
            two), `float8_e4m3fn` (times a power of two that the matrix shares), "uint6_float16" or "int8_float16" (integers
            times a float16 for 8 or 16 groups of a neuron). They are rounded before the recursion.
        form: "gram" or "data" rows, or the cheaper of the two.
        block: inputs to a block of the recursion; None for the plain scan.

    Returns:
        The quantized matrix, and its error metrics.

    Raises:
        ValueError: for weights that are not a finite real matrix, data of another width, a grid given twice or not at
            all, settings that contradict each other, a factorisation that fails, or a step of zero under weights that are
            not zero.

    Examples:
        >>> X, W = jax.random.normal(jax.random.key(1), (64, 32)), jax.random.normal(jax.random.key(2), (32, 8))
        >>> tensor, info = jpfq.solve(W, jpfq.Gram.from_data(X), bits=4)
        >>> tensor.codes.shape, tensor.step.shape
        ((32, 8), (1, 8))
    """
    given = {"scale": scale, "rotation": rotation, "order": order, "prepare": prepare, "method": method}
    given |= {"rounding": rounding, "accumulator": accumulator, "inputs": inputs, "step_dtype": step_dtype}
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    optional = {"finish": finish, "shrinkage": shrinkage}  # None is a choice
    settings |= {name: value for name, value in optional.items() if value != "recommended"}
    recipe = recipe_of(bits, grid, plain, **settings, form=form, block=block)
    try:
        W = jnp.asarray(W)
    except TypeError as error:
        raise ValueError(f"W must be a real floating matrix (in, out); got {W!r}, which holds no numbers.") from error
    if isinstance(data, Rows):
        data = jax.tree.map(at_least_float32, data)
    data = _checked(W, data, recipe, key)
    if isinstance(data, Rows) and not recipe.prefers_rows(data.X.shape[0], *W.shape):
        data = data.gram()
    data = jax.tree.map(lambda x: x[None], data)
    one = at_least_float32(W)[None]
    n, out = W.shape
    if not is_traced(W) and slice_width((1, n, out), recipe) < out:
        result = solve_sliced(one, data, recipe, key, code_dtype(recipe.grid))
    else:
        result = solve_all(one, data, recipe, key)
    raise_on(result.info, recipe, "the matrix", data)
    codes = result.codes[0].astype(code_dtype(recipe.grid))
    rotated = None if recipe.rotation is None else (recipe.rotation, DotLayout(W.shape, (0,), (), (-1,), (), False))
    step, zero = recipe.stored_steps(result.step)[0], recipe.stored_steps(result.zero)[0]
    return QTensor(codes, step, zero, recipe.grid, W.dtype, rotated, recipe.step_dtype), result.info


def _checked(W, data, recipe, key):
    """The data, rows of unusual size times a power of 2; raises for what cannot be solved."""
    if W.ndim != 2 or not jnp.issubdtype(W.dtype, jnp.floating):
        raise ValueError(f"W must be a real floating matrix (in, out); got shape {W.shape}, {W.dtype}.")
    if not isinstance(data, Gram | Rows):
        raise ValueError(
            f"data is a jpfq.Gram or jpfq.Rows; got {type(data).__name__}. Try jpfq.Gram.from_data(X, Xq)."
        )
    devices = {frozenset(x.sharding.device_set) for x in jax.tree.leaves((W, data)) if not is_traced(x) and x.committed}
    if len(devices) > 1:
        places = " and ".join(sorted(", ".join(sorted(map(str, found))) for found in devices))
        raise ValueError(f"W and the data lie apart, on {places}: put them on one device or mesh, by jax.device_put.")
    width = data.diagonal.shape[0]
    if width != W.shape[0]:
        raise ValueError(f"W has {W.shape[0]} input coordinates (rows) but the data have {width}.")
    if isinstance(data, Gram) and recipe.needs_rows:
        needy = "form='data'" if recipe.form == "data" else str(recipe.prepare[-1])
        raise ValueError(f"{needy} needs the calibration rows: pass jpfq.Rows(X, Xq) in place of a Gram.")
    recipe.refuse(data.X.shape[0] if isinstance(data, Rows) else 0, W.shape, "the matrix")
    if recipe.rounding.random and key is None:
        raise ValueError(f"{recipe.rounding} draws random numbers: pass key=jax.random.key(...).")
    moments = (data.sum_X, data.sum_Xq, data.diagonal) if isinstance(data, Gram) else (data.X, data.quantized)
    for name, values in (("W", (W,)), (f"The {type(data).__name__}", moments)):
        if any(not is_traced(x) and not is_finite(x) for x in values):
            raise ValueError(f"{name} holds NaN or infinity.")
    if any(map(is_traced, moments)):
        return data
    shown = data.shown()
    shown.refuse("the matrix")
    if shown.power and isinstance(data, Gram):
        raise ValueError(
            f"Squares of the inputs underflow in this Gram of {data.H.dtype}: make it by jpfq.Gram.from_data outside jit, "
            "which scales them, or scale the inputs up."
        )
    return data.to_power(shown.power) if isinstance(data, Rows) else data

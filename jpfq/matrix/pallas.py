"""The recursion on one block as one kernel launch, by `jax.experimental.pallas`: for accelerators.

The scan of recursion.py launches a few small kernels for every coordinate. Here a program holds a tile of neurons and runs
through the coordinates of the block by itself: the errors about - q of its neurons stay on the chip, and only codes and
arguments are written. It calls the rounding's own function, so that no rounding is written twice. TPU (Mosaic) and GPU
(Triton) take the same code: coordinates lie on the leading axis, neurons on the last.

JAX after 0.10 will remove its path to Triton, as it warns: on GPUs the kernel will need another one.

It has not been timed on an accelerator. So the scan is the default, unless a `Recursion` is given a `Kernel`;
bench/pallas.py compares the two, and a platform on which the kernel is faster belongs in `WINS`.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from ..scalar import RoundingContext, ScaledGrid, register_dataclass
from ..scalar.predicates import is_count
from .lanes import lane

if TYPE_CHECKING:
    from .recursion import Recursion

WINS: tuple[str, ...] = ()  # the platforms on which it was measured to be faster than the scan


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Kernel:
    """Runs a block of the recursion in one launch.

    tile: neurons of one program, a power of two; 128 at least for a TPU. interpret: step by step in JAX, on any platform, to
    test it.
    """

    tile: int = dataclasses.field(default=128, metadata={"static": True})
    interpret: bool = dataclasses.field(default=False, metadata={"static": True})

    def __post_init__(self):
        if not is_count(self.tile) or self.tile & (self.tile - 1):
            raise ValueError(f"Kernel takes a tile of neurons that is a power of two; got {self.tile!r}.")

    def __call__(
        self,
        recursion: "Recursion",
        A: jax.Array,
        L: jax.Array | None,
        about: jax.Array,
        levels: ScaledGrid,
        carry: Any,
        inputs: Any,
    ) -> tuple[Any, jax.Array, jax.Array]:
        """Codes and arguments (in, out) of a block, and the carries after it.

        Args as of `Recursion.scan`, but for the levels: step and zero (in, out), or (1, out) for all coordinates.
        """
        reason = refusal(recursion)
        if reason is not None:
            raise ValueError(
                f"The kernel cannot run this recursion: {reason}. Leave Recursion.kernel at None, for the scan."
            )
        return _launch(self, A, L, about, levels, recursion.rounding, carry, inputs)


def refusal(recursion: "Recursion") -> str | None:
    """Why the kernel cannot run a recursion; None where it can."""
    if recursion.key is not None:
        return "it draws random numbers, which would take another generator on the chip"
    if recursion.levels.table is not None:
        return "its grid is a table"
    if recursion.levels.offset:
        return "its grid has offsets"
    if jax.eval_shape(lambda carry: recursion.rounding.shift(lane(carry, 0)), recursion.start()) is not None:
        return f"{recursion.rounding} feeds back more than its codes"
    if any(jnp.ndim(x) for x in jax.tree.leaves(recursion.rounding)):
        return f"{recursion.rounding} holds arrays"
    return None


def chosen(recursion: "Recursion", platform: str | None = None) -> Kernel | None:
    """The kernel that runs a block: the recursion's own; else one where it wins and can; else None, the scan."""
    wins = (platform or jax.default_backend()) in WINS and refusal(recursion) is None
    return recursion.kernel if recursion.kernel is not None else Kernel() if wins else None


def _launch(kernel, A, L, about, levels, rounding, carry, inputs):
    """Lays out the operands, and calls `_block` for each tile of neurons."""
    count, out = A.shape
    size = 1 << (count - 1).bit_length()  # Triton's arrays are of powers of two; the rows added are not visited
    tiles = -(-out // kernel.tile)
    pad = lambda x, axis, to: jnp.pad(x, [(0, to - n if i == axis else 0) for i, n in enumerate(x.shape)])
    wide = tiles * kernel.tile

    rows = lambda x: pad(pad(x[:, None], 2, wide), 0, size if len(x) > 1 else 1)  # (in or 1, out) as (in or 1, 1, out)
    column = lambda x: pad(x, 0, size)[:, None, None]  # (in,), the same for all neurons
    number = lambda x: jnp.asarray(x).reshape(1, 1)
    here = {
        "A": rows(A),
        "about": rows(about),
        "step": rows(levels.step),
        "zero": rows(levels.zero),
        "lo": number(jnp.asarray(levels.lo, A.dtype)),
        "hi": number(jnp.asarray(levels.hi, A.dtype)),
        "L": None if L is None else pad(pad(L, 0, size), 1, size)[:, :, None],
        "inputs": jax.tree.map(lambda x: rows(x) if x.ndim == 2 else column(x), inputs),
        "rounding": jax.tree.map(number, rounding),
        "carry": jax.tree.map(lambda x: pad(x, 0, wide)[None], carry),
    }

    def spec(x, axis):
        """The part of an operand that one tile sees: all of it, or its neurons along an axis."""
        shape = [kernel.tile if i == axis else n for i, n in enumerate(x.shape)]
        return pl.BlockSpec(shape, lambda i: tuple(i if a == axis else 0 for a in range(x.ndim)))

    parts = {
        k: jax.tree.map(lambda x: spec(x, 2 if x.ndim == 3 and x.shape[2] > 1 else None), x) for k, x in here.items()
    }
    parts["carry"] = of_carry = jax.tree.map(lambda x: spec(x, 1), here["carry"])
    made = jax.ShapeDtypeStruct((size, 1, wide), A.dtype)
    after = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), here["carry"])
    call = lambda params: pl.pallas_call(
        functools.partial(_block, count),
        grid=(tiles,),
        in_specs=[parts],
        out_specs=(spec(made, 2), spec(made, 2), of_carry),
        out_shape=(made, made, after),
        compiler_params=params,
        interpret=kernel.interpret,
    )
    if kernel.interpret:
        codes, arguments, carry = call(None)(here)
    else:  # without parameters, JAX takes another way to a GPU than Triton, which it means to give up
        codes, arguments, carry = lax.platform_dependent(here, tpu=call(None), default=call(triton.CompilerParams()))
    back = lambda x: x[:count, 0, :out]
    return jax.tree.map(lambda x: x[0, :out], carry), back(codes), back(arguments)


def _block(count, here, codes, arguments, after):
    """The kernel: `count` coordinates of one tile of neurons. `here`, of the operands by name, and the rest are refs."""
    tile = codes.shape[2]
    spread = lambda x: jnp.broadcast_to(x, (1, tile))
    lo, hi = spread(here["lo"][...]), spread(here["hi"][...])
    rounding = jax.tree.map(lambda x: spread(x[...]), here["rounding"])

    def visit(t, state):
        carry, e = state  # about - q of the coordinates done, 0 of the others: (in, tile)
        at = lambda ref: spread(ref[t] if ref.shape[0] > 1 else ref[0])
        a = at(here["A"])
        if here["L"] is not None:
            a = a + jnp.sum(here["L"][t] * e, axis=0, keepdims=True)
        levels = ScaledGrid(at(here["step"]), at(here["zero"]), lo, hi)
        one = lambda carry, a, levels, inputs, rounding: rounding(carry, a, RoundingContext(levels, None, inputs))
        carry, code = jax.vmap(jax.vmap(one))(carry, a, levels, jax.tree.map(at, here["inputs"]), rounding)
        codes[t], arguments[t] = code, a
        rest = at(here["about"]) - levels.decode(code)
        return carry, jnp.where(lax.broadcasted_iota(jnp.int32, e.shape, 0) == t, rest, e)

    start = jax.tree.map(lambda ref: ref[...], here["carry"]), jnp.zeros((codes.shape[0], tile), codes.dtype)
    carry, _ = lax.fori_loop(0, count, visit, start)
    for ref, x in zip(jax.tree.leaves(after), jax.tree.leaves(carry), strict=True):
        ref[...] = x

"""Sizes: of what is quantized and of the whole model, in bytes, in bits per weight and in words."""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..matrix import QTensor, Recipe
from ..model.functional import Functional
from ..scalar.step_types import kernel_bits, step_bits, zero_bits


class Size(NamedTuple):
    """The size of all parameters of a model, which are what training changes: no statistics, no other state."""

    parameters: int  # how many numbers
    nbytes: int  # quantized ones packed, the others in their own type
    float_nbytes: int  # all of them in their own type

    @property
    def bits_per_weight(self) -> float:
        """Mean bits of a parameter."""
        return 8 * self.nbytes / max(1, self.parameters)

    def __str__(self) -> str:
        return f"{in_bytes(self.nbytes)} of {in_bytes(self.float_nbytes)}"


def size_of(functional: Functional, tensors: Mapping[str, QTensor]) -> Size:
    """The size of a model of which these parameters are quantized."""
    return total_size(parameters_of(functional), {path: tensor.nbytes for path, tensor in tensors.items()})


def parameters_of(functional: Functional) -> list[tuple[str, Any]]:
    """Path and leaf of every parameter."""
    rows = zip(functional.paths, functional.leaves, functional.trainable, strict=True)
    return [(path, leaf) for path, leaf, ours in rows if ours]


def total_size(parameters: Iterable[tuple[str, Any]], packed: Mapping[str, int]) -> Size:
    """The size of parameters, arrays or their shapes by path, some of which take that many bytes when packed."""
    parameters = list(parameters)
    own = [math.prod(np.shape(leaf)) * getattr(getattr(leaf, "dtype", None), "itemsize", 4) for _, leaf in parameters]
    now = [packed.get(path, size) for (path, _), size in zip(parameters, own, strict=True)]
    return Size(sum(math.prod(np.shape(leaf)) for _, leaf in parameters), sum(now), sum(own))


def packed_bytes(parts: Iterable[tuple[int, int, int]], recipe: Recipe) -> int:
    """Bytes of a kernel: codes at their storage bits, steps in their type, fitted zero points, and a table of levels.

    Args:
        parts: the matrices (B, in, out) of each product that the kernel is cut into, such as the layers of a stack.
        recipe: its settings.
    """
    bits, grid = kernel_bits(recipe.step_dtype) + recipe.grid.table_bits, recipe.grid
    for B, n, out in parts:
        levels = jax.eval_shape(lambda W: recipe.scale(W, grid, W), jax.ShapeDtypeStruct((n, out), jnp.float32))
        steps = levels.step.size * (1 if recipe.scale.shared and not recipe.moves_step else B)
        each = step_bits(recipe.step_dtype) + zero_bits(grid, recipe.step_dtype)
        bits += B * n * out * grid.storage_bits + steps * each
    return -(-bits // 8)


def in_bytes(count: float) -> str:
    """A number of bytes in the unit that leaves one to three digits before the point."""
    if count < 1000:
        return f"{count:.0f} bytes"
    for unit in ("kB", "MB", "GB", "TB"):
        count /= 1000
        if count < 999.5:
            return f"{count:.3g} {unit}"
    return f"{count:,.0f} TB"


def sizes_in_words(bits: float, nbytes: int, whole: Size) -> str:
    """Bits per weight and bytes of what is quantized, and of the whole model."""
    return f"{bits:.2f} bits per weight ({in_bytes(nbytes)}), the whole model to {whole.bits_per_weight:.2f} ({whole})"

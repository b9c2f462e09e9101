"""Bounded: a rounding whose codes keep integer sums within an accumulator, and what it cannot be combined with."""

from typing import Any

import jax
import jax.numpy as jnp

from .integer_sums import SumSpec, no_integers
from .rounding import Rounding, _Threshold
from .scaled_grid import ScaledGrid


class Bounded(Rounding):
    """A rounding whose codes keep sums within bounds."""

    sums: SumSpec

    def reach(self, codes: jax.Array, levels: ScaledGrid, order: jax.Array) -> jax.Array:
        """The largest sum of each tile over all inputs, and less the least one (tiles, out, 2), of codes (in, out)."""
        return jnp.stack(self.sums.of_codes(levels.integers(codes), order), -1)

    def check(self, recipe: Any) -> None:
        """Raises where sums of codes would not be what an accumulator holds."""
        grid = recipe.grid
        if grid.alphabet().zero is None:
            raise ValueError(
                f"{grid} gives weights a zero point, and sums of codes would then move with the sum of the inputs: with an "
                "accumulator take a grid about 0, such as bits=4 or jpfq.Integer(4)."
            )
        if grid.has_zero is False:
            raise ValueError(
                f"An accumulator needs the weight 0, which is no level of {grid}: take jpfq.Integer or Ternary."
            )
        if grid.unit is None and grid.table is not None:
            raise ValueError(no_integers(grid))
        if recipe.scale.in_blocks:
            raise ValueError(
                f"An accumulator fits the steps of each neuron, and {recipe.scale.per} shares them: PerChannel()."
            )
        if recipe.rotation is not None:
            raise ValueError(
                f"{recipe.rotation} rotates inputs, which are integer codes no longer: no accumulator with it."
            )
        if recipe.refits:
            raise ValueError(
                "PerGroup(refit=True) chooses steps on the way, an accumulator's thresholds before: refit=False."
            )
        if _scales_with_radius(self):
            raise ValueError("A threshold in units of the radius has no fixed size under an accumulator: unit='step'.")
        super().check(recipe)

    def refuse(self, recipe: Any, n: int, name: str) -> None:
        """Raises where one sum would run over weights of several steps."""
        size, tile = recipe.scale.run(n), self.sums.size(n)
        if size < n and size % tile:
            raise ValueError(
                f"Groups of {size} inputs with a step of their own straddle the tiles of {tile} that the accumulator of "
                f"{name} sums ({n} inputs in all): take a tile that divides {size}, or one step per neuron."
            )


def _scales_with_radius(rounding: Rounding) -> bool:
    """True if a threshold is in units of the top level, which moves where a grid is narrowed."""
    nested = getattr(rounding, "then", None)
    return (isinstance(rounding, _Threshold) and rounding.unit == "radius") or (
        nested is not None and _scales_with_radius(nested)
    )

"""Parts of a plan: the work for one matrix, and memory by purpose."""

import dataclasses
from typing import Any

from ..matrix import Recipe


@dataclasses.dataclass(frozen=True)
class Line:
    """The plan for the matrices of one product."""

    path: str
    dims: tuple[int, int, int]  # matrices, inputs, neurons
    rows: int  # calibration rows of all its uses together
    recipe: Recipe
    form: str
    workspace: int  # bytes for its data and its solve, beside live values
    flops: float  # for its Gram (or data form) and its recursion
    uses: int = 1  # number of products that share it
    inputs: Any = None  # `Activations`, if its inputs are quantized
    conv: bool = False


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a stage, by purpose."""

    parameters: int  # the caller's own
    activations: int = 0  # of both networks, all batches
    kernels: int = 0  # computed from parameters, or dequantized, while a product needs them
    workspace: int = 0  # Grams and solves, curvature, derivatives
    codes: int = 0  # of the kernels quantized so far
    result: int = 0  # the dequantized parameters that are returned

    @property
    def total(self) -> int:
        """The sum over all purposes."""
        return sum(dataclasses.astuple(self))

"""Sentences of a summary about single kernels, and about their inputs."""

import collections
from collections.abc import Collection, Iterator

import numpy as np

from ..calibrate.activation import ActivationQuantizer
from ..matrix import Info
from .table import table


def notes(path: str, info: Info) -> Iterator[str]:
    """Remarks on a kernel besides its row in the table."""
    if int(info.saturated_steps):
        yield f"{path}: {int(info.saturated_steps)} steps were beyond what their type stores; they took the nearest it has."
    if info.rows is not None:
        yield _experts(path, info)


def inputs_notes(
    inputs: dict[str, list[ActivationQuantizer]], kernels: Collection[str], biases: Collection[str]
) -> Iterator[str]:
    """Sentences about quantized inputs of kernels, rounded operands of products without weights, and corrected biases."""
    of_kernels = {path: uses for path, uses in inputs.items() if path in kernels}
    if of_kernels or biases:
        kinds = collections.Counter(str(uses[0].settings) for uses in of_kernels.values())
        listed = f" ({'; '.join(f'{count}: {kind}' for kind, count in kinds.items())})" if of_kernels else ""
        yield (
            f"Inputs of {len(of_kernels)} kernels are quantized while the network runs{listed}; {len(biases)} biases are "
            "corrected for the mean error of their layer."
        )
    operands = [(path, str(uses[0].settings)) for path, uses in inputs.items() if path not in kernels]
    if operands:
        yield table(("operand of a product without weights", "rounded to"), operands)


def _experts(path, info):
    """A sentence about the number of calibration rows of each expert of a kernel."""
    rows = np.atleast_1d(info.rows)
    line = f"Rows of the {rows.size} matrices of {path}: {rows.min():,.6g} to {rows.max():,.6g}."
    if (rows > 0).all():
        return line
    return f"{line} Rounded to nearest, as they have none: {', '.join(map(str, np.flatnonzero(rows == 0)))}."

"""Sentences of a summary about single kernels."""

from collections.abc import Iterator

import numpy as np

from ..matrix import Info


def notes(path: str, info: Info) -> Iterator[str]:
    """What is to be said of a kernel besides its row in the table."""
    if int(info.saturated_steps):
        yield f"{path}: {int(info.saturated_steps)} steps were beyond what their type stores; they took the nearest it has."
    if info.rows is not None:
        yield _experts(path, info)


def _experts(path, info):
    """A sentence about the number of calibration rows of each expert of a kernel."""
    rows = np.atleast_1d(info.rows)
    line = f"Rows of the {rows.size} matrices of {path}: {rows.min():,.6g} to {rows.max():,.6g}."
    if (rows > 0).all():
        return line
    return f"{line} Rounded to nearest, as they have none: {', '.join(map(str, np.flatnonzero(rows == 0)))}."

"""Matches tensors of a file with parameters of a model by value, whatever both are called.

Two matrices are compared by the correlation of a few random combinations of their columns. That of a quantized kernel with
the float one is near 1, and that of two layers near 0.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

ALIKE = 0.5  # correlation of a quantized kernel with the float one, .8 at one bit; that of two layers is near 0
TIE = 1e-4  # correlations so near are not told apart
SKETCH = 16  # random combinations of the inputs that a matrix is told by


class Match(NamedTuple):
    """A parameter that a tensor may be, and how it is to be arranged to be that tensor."""

    correlation: float
    path: str
    how: Any


def mark(value: np.ndarray) -> np.ndarray:
    """A few numbers for each row, of sum of squares 1, that tell arrays apart; a vector is its own mark."""
    found = value.astype(np.float32)
    if value.ndim > 1:
        flat = found.reshape(len(value), -1)
        found = flat @ np.random.default_rng(0).standard_normal((flat.shape[1], SKETCH)).astype(np.float32)
    return found / max(float(np.linalg.norm(found)), 1e-30)


def nearest(
    name: str, own: np.ndarray, candidates: Iterable[tuple[np.ndarray, str, Any]], changed: Iterable[str]
) -> Match | None:
    """The parameter that a tensor of this mark is, by the marks of candidates; None where it is none of them.

    Raises:
        ValueError: it may be several, and the first of them is among those that changed.
    """
    near = [Match(float(np.vdot(other, own)), path, how) for other, path, how in candidates]
    near = sorted((match for match in near if match.correlation > ALIKE), key=lambda match: -match.correlation)
    if not near:
        return None
    first = near[0]
    rivals = sorted({match.path for match in near if match.correlation > first.correlation - TIE} - {first.path})
    if rivals and first.path in changed:
        raise ValueError(f"{name} of the file may be {first.path} or {rivals[0]}, which are alike.")
    return first

"""`Sweep`: the result of a sweep, with a record for each setting."""

import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..calibrate.loop import CalibrationResult
from ..matrix import code_dtype
from ..matrix.explicit_mesh import anywhere
from ..matrix.lanes import lane
from ..model.functional import Functional
from ..model.mesh import LanesMesh
from ..network.analysis import activations_of
from ..network.quantize import assemble
from ..network.quantized import Quantized
from ..network.rules import Assignment
from ..network.table import table
from .plot import loss_against_bits


class Chunk(NamedTuple):
    """Settings that were lanes of one track. `indices` are those in the space; the last may be repeated to fill up."""

    indices: list[int]
    result: CalibrationResult
    peak: int


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The results of a sweep.

    records: one for each setting, in the order of the space: its values, and
        loss: the value of `evaluate`, or the output error if there is no `evaluate`.
        output_error: the relative error of the outputs on the calibration data; nan if outputs are NaN or infinite in one
            of the two networks only.
        bits_per_weight, nbytes: the same as in `Quantized`.

    Examples:
        >>> sweep = jpfq.sweep(model, batches, jpfq.Space(bits=[2, 3, 4]), variables=variables)
        >>> [(record["bits"], record["bits_per_weight"]) for record in sweep.records]
        [(2, 3.0), (3, 4.0), (4, 5.0)]
        >>> quantized = sweep[1]  # the same as jpfq.quantize at 3 bits
    """

    records: list[dict[str, Any]]
    _assignments: list[Assignment]
    _uses: list[dict[str, int]]  # the same as in `Quantized`
    _chunks: list[Chunk]
    _functional: Functional
    _example: Any  # shapes of a batch
    _mesh: LanesMesh | None

    def __len__(self):
        return len(self.records)

    @anywhere
    def __getitem__(self, index: int) -> Quantized:
        """The quantized network of a setting, the same that `quantize` returns."""
        index = range(len(self.records))[index]
        chunk = next(chunk for chunk in self._chunks if index in chunk.indices)
        own = self._assignments[index]
        result = lane_of(chunk.result, chunk.indices.index(index), own)
        if self._mesh is not None:
            result = self._mesh.restore(result, self._functional.leaves[0])
        return assemble(self._functional, result, own.skipped, chunk.peak, self._example, self._uses[index])

    @property
    def front(self) -> list[int]:
        """Indices of the settings that no other beats in both loss and bits per weight, in order of bits."""
        losses = [np.inf if record["loss"] != record["loss"] else record["loss"] for record in self.records]
        order = sorted(range(len(self)), key=lambda i: (self.records[i]["bits_per_weight"], losses[i]))
        front, least = [], np.inf
        for i in order:
            if losses[i] < least:
                front.append(i)
                least = losses[i]
        return front

    def best(self, bits_per_weight: float | None = None) -> Quantized:
        """The quantized network of least loss within a limit of bits per weight.

        Args:
            bits_per_weight: the limit, as in `records`; None for no limit.

        Examples:
            >>> sweep.best(bits_per_weight=4.5).bits_per_weight
            4.0
        """
        within = [
            i for i in self.front if bits_per_weight is None or self.records[i]["bits_per_weight"] <= bits_per_weight
        ]
        if not within:
            least = min(record["bits_per_weight"] for record in self.records)
            raise ValueError(
                f"No setting of finite loss takes {bits_per_weight} bits per weight or fewer; the least is {least:.3f}."
            )
        return self[within[-1]]

    def frame(self) -> Any:
        """The records as a `pandas.DataFrame`.

        Examples:
            >>> list(sweep.frame().columns)
            ['bits', 'loss', 'output_error', 'bits_per_weight', 'nbytes']
        """
        try:
            import pandas  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError("frame() needs pandas: pip install pandas. Or use `records`, a plain list.") from error
        return pandas.DataFrame(self.records)

    def picture(self, path: str | os.PathLike) -> None:
        """Saves a plot of loss against bits per weight, with the front. Needs matplotlib.

        Args:
            path: a .png, .pdf or .svg file.

        Examples:
            >>> sweep.picture("sweep.png")
        """
        loss_against_bits(self, Path(path))

    def __str__(self) -> str:
        front = set(self.front)
        head = [*self.records[0], "front"]
        shown = lambda x: f"{x:.5g}" if isinstance(x, float) else str(x)
        rows = [[*map(shown, record.values()), "*" if i in front else ""] for i, record in enumerate(self.records)]
        lines = [table(head, rows)]
        if any(record["output_error"] != record["output_error"] for record in self.records):
            lines.append(
                "nan: some outputs are NaN or infinite in one of the two networks only, or there are none to compare."
            )
        return "\n\n".join(lines)


def lane_of(result: CalibrationResult, i: int, assignment) -> CalibrationResult:
    """The result of one lane, with its own settings."""
    own = lane(result, i)
    grids = {path: recipe.grid for path, recipe in assignment.recipes.items()}
    tensors = {
        path: dataclasses.replace(
            own.tensors[path], grid=grids[path], codes=own.tensors[path].codes.astype(code_dtype(grids[path]))
        )
        for path in result.tensors  # in the order of the network; a pytree would sort them by name
    }
    info = {path: own.info[path] for path in tensors}
    activations = activations_of(assignment)
    inputs = {
        path: [dataclasses.replace(rounded, settings=activations[path]) for rounded in uses]
        for path, uses in own.inputs.items()
    }
    return own._replace(tensors=tensors, info=info, inputs=inputs)

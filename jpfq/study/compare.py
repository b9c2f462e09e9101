"""Several recipes on one model, side by side: the table and the records behind a picture."""

import dataclasses
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..matrix import GPFQ, MSQ, OPTQ, Natural, Qronos
from ..network import Quantized, Rule, quantize
from ..network.linen import is_linen
from ..network.table import table
from ..scalar import Grid, MinMSE, Scale


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to be quantized, and how good it is."""

    name: str
    model: Any
    state: Any  # variables of a Linen module, params of a function, None for NNX
    batches: Sequence
    evaluate: Callable[[Any], float] | None  # of variables, params or an NNX model: larger is better

    def quantize(self, rules, progress: bool | None = None) -> Quantized:
        """This model under the given rules."""
        return quantize(self.model, self.batches, rules, progress=progress, **self._arguments())

    def score(self, quantized: Quantized | None = None) -> float | None:
        """What `evaluate` says of the float model, or of a quantized one."""
        if self.evaluate is None:
            return None
        if quantized is None:
            return float(self.evaluate(self.model if self.state is None else self.state))
        return float(self.evaluate(getattr(quantized, next(iter(self._arguments()), "model"))))

    def _arguments(self):
        if self.state is None:
            return {}
        return {"variables" if is_linen(self.model) else "params": self.state}


@dataclasses.dataclass(frozen=True)
class Trial:
    """One recipe on one model."""

    subject: str
    grid: Grid
    method: str
    score: float | None
    bits_per_weight: float  # as stored, steps included
    nbytes: int
    float_nbytes: int
    output_error: float
    seconds: float
    summary: str  # of all its kernels


_PLAIN = {"scale": MinMSE(), "order": Natural(), "finish": None, "shrinkage": None}
METHODS: dict[str, dict] = {  # what a rule says besides the grid
    "MSQ": {"method": MSQ(), **_PLAIN},
    "GPFQ": {"method": GPFQ(), **_PLAIN},
    "OPTQ": {"method": OPTQ(), **_PLAIN},
    "Qronos": {"method": Qronos(), **_PLAIN},
    "best": {},
}
SHOWN = ("MSQ", "GPFQ", "best")


def compare(
    subject: Subject,
    grids: Iterable[Grid],
    scale: Scale | None = None,
    methods: Sequence[str] = SHOWN,
    before: Sequence[Rule] = (),
) -> list[Trial]:
    """Quantizes a model with every grid and method of `METHODS`; `before` are rules that go first."""
    trials = []
    for grid in grids:
        for name in methods:
            start = time.perf_counter()
            settings: Any = METHODS[name] if scale is None else METHODS[name] | {"scale": scale}
            quantized = subject.quantize([*before, Rule(".*", grid=grid, **settings)])
            seconds = time.perf_counter() - start
            full = sum(tensor.codes.size * tensor.dtype.itemsize for tensor in quantized.tensors.values())
            figures = (quantized.bits_per_weight, quantized.nbytes, full, quantized.output_error, seconds)
            score, summary = subject.score(quantized), quantized.summary()
            trials.append(Trial(subject.name, grid, name, score, *figures, summary))
    return trials


def trial_table(trials: Sequence[Trial], floats: dict[str, float | None]) -> str:
    """One line per model and grid: float score, score and output error of each method, size, time."""
    methods = list(dict.fromkeys(trial.method for trial in trials))
    scored = any(score is not None for score in floats.values())
    head = ["model", "grid", "bits/weight", "size"]
    head += ["float", *methods] if scored else []
    head += [f"{method} error" for method in methods] + ["seconds"]
    lines: dict[tuple, list[Trial]] = {}
    for trial in trials:
        lines.setdefault((trial.subject, trial.grid), []).append(trial)
    rows = []
    for (subject, grid), group in lines.items():
        first = group[0]
        row = [subject, str(grid), f"{first.bits_per_weight:.2f}", f"1/{first.float_nbytes / first.nbytes:.1f}"]
        row += [_score(floats[subject]), *(_score(trial.score) for trial in group)] if scored else []
        row += [f"{trial.output_error:.1%}" for trial in group] + [f"{sum(trial.seconds for trial in group):.1f}"]
        rows.append(row)
    return table(head, rows)


def _score(score):
    return "" if score is None else f"{score:.2f}"

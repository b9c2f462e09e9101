"""Compares several methods on one model: trials, and a table of them."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

from ..matrix import GPFQ, MSQ, OPTQ, Natural, Qronos
from ..model.adapters import adapt, adapter_of
from ..model.functional import Functional
from ..network.quantize import quantize
from ..network.quantized import Quantized
from ..network.rules import Rule
from ..network.size import in_bytes
from ..network.table import table
from ..scalar import Grid, MinMSE


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to be quantized, with its data and its score."""

    name: str
    model: Any
    state: Any  # variables of a Linen module, params of a function, None for NNX
    batches: Sequence
    evaluate: Callable[[Any], Any] | None  # from variables, params or an NNX model to a score; larger is better

    def quantize(self, rules, **options: Any) -> Quantized:
        """Quantizes this model; options are those of `jpfq.quantize`."""
        return quantize(self.model, self.batches, rules, **self.arguments, **options)

    def score(self, quantized: Quantized | None = None) -> float | None:
        """The score of the float model, or of a quantized one."""
        if self.evaluate is None:
            return None
        if quantized is None:
            return float(self.evaluate(self.model if self.state is None else self.state))
        return float(self.evaluate(self.state_of(quantized)))

    def state_of(self, quantized: Quantized) -> Any:
        """The argument of `evaluate` for a quantized network."""
        return getattr(quantized, next(iter(self.arguments), "model"))

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments that `jpfq.quantize` and `jpfq.load` take besides the model."""
        argument = adapter_of(self.model).argument
        return {} if self.state is None or argument is None else {argument: self.state}

    @property
    def functional(self) -> Functional:
        """The float model as a pure function."""
        return adapt(self.model, self.arguments.get("variables"), self.arguments.get("params"), None)


@dataclasses.dataclass(frozen=True)
class Trial:
    """The result of one grid and method on one model."""

    subject: str
    grid: Grid
    method: str
    score: float | None
    bits_per_weight: float  # as stored, steps included
    nbytes: int
    float_nbytes: int
    output_error: float
    seconds: float
    kernels: list[dict[str, Any]]
    skipped: dict[str, str]
    summary: str  # of all its kernels
    total_bits_per_weight: float = float("nan")  # of all parameters: those that are not quantized in their own type
    total_nbytes: int = 0
    total_float_nbytes: int = 0
    unmatched: int = 0  # outputs that are NaN or infinite in one of the two networks only; the error is then nan
    format: str | None = None  # of `jpfq.formats`, where its rules are used

    @property
    def label(self) -> str:
        """The format, or else the grid."""
        return self.format or str(self.grid)

    def as_record(self, kernels: bool = False) -> dict[str, Any]:
        """The fields for a JSON document, with or without the kernels."""
        record = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "summary"}
        return record if kernels else {name: x for name, x in record.items() if name != "kernels"}


_PLAIN = {"scale": MinMSE(), "order": Natural(), "finish": None, "shrinkage": None}
METHODS: dict[str, dict] = {  # the settings of a rule besides the grid
    "MSQ": {"method": MSQ(), **_PLAIN},
    "GPFQ": {"method": GPFQ(), **_PLAIN},
    "OPTQ": {"method": OPTQ(), **_PLAIN},
    "Qronos": {"method": Qronos(), **_PLAIN},
    "best": {},
}
SHOWN = ("MSQ", "GPFQ", "best")


def attempt(
    subject: Subject,
    grid: Grid,
    method: str,
    rules: Sequence[Rule] | None = None,
    format: str | None = None,
    **options: Any,
) -> tuple[Trial, Quantized]:
    """Quantizes a model with a grid and a method of `METHODS`, or with the given rules, of a format, in their place."""
    start = time.perf_counter()
    quantized = subject.quantize(rules or [Rule(".*", grid=grid, **METHODS[method])], **options)
    seconds = time.perf_counter() - start
    unmatched = quantized.outputs.unmatched if quantized.outputs is not None else 0
    size = quantized.size
    full = sum(tensor.codes.size * tensor.dtype.itemsize for tensor in quantized.tensors.values())
    metrics = (quantized.bits_per_weight, quantized.nbytes, full, quantized.output_error, seconds)
    about = (
        [_kernel(quantized, path) for path in quantized.tensors],
        quantized.skipped,
        quantized.summary(),
        size.bits_per_weight,
        size.nbytes,
        size.float_nbytes,
        unmatched,
        format,
    )
    return Trial(subject.name, grid, method, subject.score(quantized), *metrics, *about), quantized


def _kernel(quantized, path):
    tensor = quantized.tensors[path]
    return {
        "kernel": path,
        "shape": list(tensor.shape),
        "grid": str(tensor.grid),
        "bits": tensor.bits_per_weight,
        "error": float(quantized.info[path].relative_error),
        "bytes": tensor.nbytes,
    }


def trial_table(trials: Sequence[Trial], floats: dict[str, float | None]) -> str:
    """A table with one line per model and grid: size, the float score, each method's score and output error, and time.

    Bits are those of the quantized kernels and, "of all", of the whole model, whose size is next to them. Errors are
    those on the calibration batches. Notes below the table explain errors that are nan.
    """
    methods = list(dict.fromkeys(trial.method for trial in trials))
    scored = any(score is not None for score in floats.values())
    head = ["model", "grid", "bits/weight", "of all", "size"]
    head += ["float", *methods] if scored else []
    head += [f"{method} error" for method in methods] + ["seconds"]
    lines: dict[tuple, list[Trial]] = {}
    for trial in trials:
        lines.setdefault((trial.subject, trial.label), []).append(trial)
    rows = []
    for (subject, label), group in lines.items():
        first = group[0]
        size = f"{in_bytes(first.total_nbytes)} of {in_bytes(first.total_float_nbytes)}"
        row = [subject, label, f"{first.bits_per_weight:.2f}", f"{first.total_bits_per_weight:.2f}", size]
        row += [_score(floats[subject]), *(_score(trial.score) for trial in group)] if scored else []
        row += [_error(trial.output_error) for trial in group] + [f"{sum(trial.seconds for trial in group):.1f}"]
        rows.append(row)
    reasons = [
        f"{trial.subject}, {trial.label}, {trial.method}: {trial.unmatched:,} outputs are NaN or infinite in one of the "
        "two networks only, so there is no error."
        for trial in trials
        if trial.unmatched
    ]
    return "\n\n".join([table(head, rows), *(["\n".join(reasons)] if reasons else [])])


def _error(error):
    return f"{error:.1%}" if error == error else "nan"


def _score(score):
    return "" if score is None else f"{score:.2f}"

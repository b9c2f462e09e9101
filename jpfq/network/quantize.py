"""`quantize`: a model, batches and rules in, a quantized model out."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..matrix import Info, QTensor
from .batches import read_batches
from .functional import Functional, from_function
from .linen import from_linen, is_linen
from .nnx import from_nnx, is_nnx
from .program import Program, trace
from .progress import progress_bar
from .rules import Assignment, Rule, as_rules, assign
from .sites import CASTS, Site, find_sites
from .stream import Stream
from .table import table
from .walk import stops, walk


@dataclasses.dataclass(frozen=True)
class Quantized:
    """The result of `quantize`.

    params: the parameters, structure, types and sharding as given, with dequantized weights in place of the quantized.
    variables: likewise all variables, for a Linen module. model: likewise a new model, for NNX.
    tensors, info: by path of the quantized kernel. skipped: by path of every other kernel, the reason.
    output_error: relative error of the model's outputs on the calibration data, the largest over its output arrays.
    """

    params: Any
    tensors: dict[str, QTensor]
    info: dict[str, Info]
    skipped: dict[str, str]
    output_error: float
    peak_bytes: int  # of live activations of both networks while calibrating
    _model: Any = None
    _variables: Any = None

    @property
    def model(self) -> Any:
        """The quantized NNX model."""
        return self._given(self._model, "model", "an NNX model")

    @property
    def variables(self) -> Any:
        """The quantized variables of a Linen module."""
        return self._given(self._variables, "variables", "a Linen module")

    def _given(self, value, name, kind):
        if value is None:
            raise AttributeError(f"quantized.{name} exists after quantizing {kind}; here take quantized.params.")
        return value

    @property
    def nbytes(self) -> int:
        """Bytes of the quantized kernels, packed."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """Mean packed bits of the quantized weights, steps included."""
        return 8 * self.nbytes / sum(tensor.codes.size for tensor in self.tensors.values())

    def summary(self) -> str:
        """A table of all kernels: what became of each, and at what error."""
        rows = []
        for path, tensor in self.tensors.items():
            info = self.info[path]
            figures = (info.relative_error, info.saturation, info.sparsity)
            shares = [f"{float(x):.2%}" for x in figures]
            shape = "x".join(map(str, tensor.shape))
            bits = (f"{tensor.bits_per_weight:.2f}", f"{float(info.entropy):.2f}")
            rows.append((path, shape, str(tensor.grid), *bits, *shares, str(int(info.dead))))
        head = ("kernel", "shape", "grid", "bits", "entropy", "error", "saturated", "zeros", "dead inputs")
        lines = [table(head, rows)]
        if self.skipped:
            lines.append(table(("left as it is", "because"), list(self.skipped.items())))
        lines.append(
            f"{len(self.tensors)} kernels quantized to {self.bits_per_weight:.2f} bits per weight ({self.nbytes:,} bytes); "
            f"{len(self.skipped)} left as they are. Relative error of the outputs: {self.output_error:.2%}. "
            f"Peak of live activations: {self.peak_bytes:,} bytes."
        )
        return "\n\n".join(lines)


def quantize(
    model: Any,
    batches: Iterable,
    rules: int | Rule | Sequence[Rule],
    *,
    variables: Any = None,
    params: Any = None,
    kwargs: dict | None = None,
    key: jax.Array | None = None,
    progress: bool | None = None,
) -> Quantized:
    """Quantizes the weights of a trained model after training, layer by layer, on calibration data.

    Each kernel is chosen so that what it makes of the inputs it will get in the quantized network is near what the float
    kernel makes of the float network's. The model runs once in float and once quantized, whatever its depth.

    Args:
        model: a Linen module (with `variables`), an NNX model, or any function fn(params, *inputs) (with `params`).
        batches: calibration data, read once: arrays, tuples of positional arguments, or dicts of keyword arguments; a
            `Weighted` batch keeps padding out of the statistics. Sizes of the leading axis may differ; each further size
            is traced and compiled anew, which is exact for every model (drop a smaller last batch to save the time).
        rules: what is quantized how: a number of bits for all kernels, or rules by path of which the first match wins.
        variables: of a Linen module, as `module.init` returns them.
        params: of a function, a pytree of arrays.
        kwargs: arguments of the model that are no data, such as {"train": False}.
        key: for roundings that draw random numbers.
        progress: whether to show a progress bar; None shows it on a terminal only.

    Returns:
        A `Quantized`. What was given is not changed.

    Raises:
        ValueError: input that cannot be used, with what to do about it.

    Example:
        >>> quantized = jpfq.quantize(model, batches, [jpfq.Rule("head/.*", skip=True), jpfq.Rule(".*", bits=4)])
    """
    rules = as_rules(rules)
    functional = adapt(model, variables, params, kwargs)
    shaped = read_batches(batches)
    analyses = [analyse(functional, rules, group.example) for group in shaped]
    first = analyses[0]
    for other in analyses[1:]:
        if [(s.path, s.layout) for s in other.sites] != [(s.path, s.layout) for s in first.sites]:
            raise ValueError("The model multiplies other kernels for batches of another size: calibrate with one size.")
    _check_finite(functional, first)
    _check_key(first.assignment, key)

    groups = stops(first.sites)
    streams = [
        Stream(
            a.program, functional.leaves, group.leaves, group.weights, [[a.sites[i] for i in stop] for stop in groups]
        )
        for a, group in zip(analyses, shaped, strict=True)
    ]
    del shaped  # the streams let inputs go once they are used
    with progress_bar(len(first.sites), progress) as report:
        walked = walk(streams, first.assignment.recipes, key, report)

    leaves = list(functional.leaves)
    for index, path in enumerate(functional.paths):
        if path in walked.tensors and functional.trainable[index]:
            leaves[index] = _like(walked.tensors[path].dequantize(), leaves[index])
    rebuilt = functional.rebuild(leaves)
    errors = [error for error in walked.output_error if error == error]
    return Quantized(
        rebuilt["params"],
        walked.tensors,
        walked.info,
        first.assignment.skipped,
        max(errors, default=0.0),
        walked.peak,
        rebuilt.get("model"),
        rebuilt.get("variables"),
    )


def adapt(model: Any, variables: Any, params: Any, kwargs: dict | None) -> Functional:
    """The model as a pure function, whatever framework it is from."""
    kwargs = kwargs or {}
    kind = "a Linen module" if is_linen(model) else "an NNX model" if is_nnx(model) else "a function"
    wanted = {"a Linen module": "variables", "an NNX model": None, "a function": "params"}[kind]
    for name, value in (("variables", variables), ("params", params)):
        if value is not None and name != wanted:
            raise ValueError(f"{kind} takes {wanted or 'neither variables nor params'}; got {name}=...")
    if is_linen(model):
        return from_linen(model, variables, kwargs)
    if is_nnx(model):
        return from_nnx(model, kwargs)
    if not callable(model):
        raise ValueError(f"model is a Linen module, an NNX model or a function fn(params, *inputs); got {model!r}.")
    if params is None:
        raise ValueError("A function needs its parameters: jpfq.quantize(fn, batches, rules, params=params).")
    return from_function(model, params, kwargs)


class Analysis(NamedTuple):
    """A model traced on one shape of batch, and what the rules make of it."""

    program: Program
    sites: list[Site]  # to be quantized
    assignment: Assignment


def analyse(functional: Functional, rules: Sequence[Rule], example: Any) -> Analysis:
    """Traces a model, finds its kernels and gives each its rule. Values are not looked at: shapes will do."""
    program = trace(functional.fn, functional.paths, functional.leaves, example)
    sites, reasons = find_sites(program)
    state = {path for path, ok in zip(functional.paths, functional.trainable, strict=True) if not ok}
    sites = [site for site in sites if site.path not in state]
    reasons = {path: reason for path, reason in reasons.items() if path not in state}
    trainable = [path for path in functional.paths if path not in state]
    assignment = assign(rules, list(dict.fromkeys(site.path for site in sites)), reasons, trainable)
    sites = [site for site in sites if site.path in assignment.recipes]
    for path, recipe in assignment.recipes.items():
        if recipe.rotation is not None:
            _check_rotation(path, [site for site in sites if site.path == path], program)
    return Analysis(program, sites, assignment)


def _check_rotation(path, sites, program):
    """Dequantizing turns a kernel back as a whole, so it must be one matrix as it stands."""
    shape = program.params[sites[0].leaf].aval.shape
    if len(sites) > 1 or any(eqn.primitive.name not in CASTS for eqn, _ in sites[0].chain.steps):
        raise ValueError(
            f"Hadamard cannot be folded into {path} {shape}: the model reshapes, transposes or slices this kernel before it "
            "multiplies, or uses it more than once. Give it a rule without rotation."
        )


def _check_finite(functional, analysis):
    for path, leaf in zip(functional.paths, functional.leaves, strict=True):
        if path in analysis.assignment.recipes and not bool(jnp.isfinite(leaf).all()):
            raise ValueError(f"The kernel {path} holds NaN or infinity.")


def _check_key(assignment, key):
    for path, recipe in assignment.recipes.items():
        if recipe.rounding.random and key is None:
            raise ValueError(f"{recipe.rounding} of {path} draws random numbers: pass key=jax.random.key(...).")


def _like(new, old):
    """A new leaf placed as the old one was."""
    return jax.device_put(new, old.sharding) if isinstance(old, jax.Array) else new

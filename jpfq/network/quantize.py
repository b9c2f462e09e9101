"""`quantize`: a model, batches and rules in, a quantized model out."""

import dataclasses
import functools
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from ..matrix import Devices, Info, QTensor
from ..matrix.gram import is_traced
from ..scalar import Guard
from .activation import Activations, Rounded
from .apply import run
from .batches import Shaped, read_batches, shapes_of
from .bias import find_biases
from .curvature import curvatures
from .functional import Functional, flatten, from_function
from .hosts import check_hosts, leaves_of, spans_hosts
from .integer import Integers, Overflow
from .linen import from_linen, is_linen
from .mesh import automatic, check_runs, context, devices_of, on_mesh_of
from .nnx import from_nnx, is_nnx
from .program import Program, trace_twice
from .progress import progress_bar
from .resume import Kept, stoppable
from .rules import Assignment, Rule, as_rules, assign
from .serve import Served
from .sites import CASTS, Site, find_sites, with_taps
from .stream import Stream
from .table import table
from .tune import fake_quant, on_grid, tunable
from .walk import Making, Walked, stops, walk


@dataclasses.dataclass(frozen=True)
class Quantized:
    """The result of `quantize`.

    params: the parameters, structure, types and sharding as given, with dequantized weights in place of the quantized.
    variables: likewise all variables, for a Linen module. model: likewise a new model, for NNX.
    tensors, info: by path of the quantized kernel. skipped: by path of every other kernel, the reason.
    inputs: by path, how the inputs of a kernel are rounded, once for each use of it. biases: paths of those corrected.
    output_error: relative error of the model's outputs on the calibration data, the largest over its output arrays.

    Example:
        >>> quantized = jpfq.quantize(model, batches, 4, variables=variables)
        >>> logits = model.apply(quantized.variables, X)
        >>> list(quantized.tensors), quantized.skipped
        (['hidden/kernel', 'head/kernel'], {})
    """

    params: Any
    tensors: dict[str, QTensor]
    info: dict[str, Info]
    skipped: dict[str, str]
    inputs: dict[str, list[Rounded]]
    biases: tuple[str, ...]
    output_error: float
    peak_bytes: int  # of live activations of both networks while calibrating, on the device
    _functional: Functional  # with the quantized leaves
    _model: Any = None
    _variables: Any = None
    _shapes: Any = None  # of a batch

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

    def apply(self, batch: Any) -> Any:
        """The network's outputs with weights and activations as quantized, for a batch of the form calibrated on.

        Where no activations are quantized, the model itself with the quantized parameters does the same.

        Args:
            batch: one batch, of any number of samples.

        Example:
            >>> quantized.apply(X).shape
            (64, 8)
        """
        inputs, batch = jax.tree.map(automatic, (self.inputs, batch))
        with context():
            return self._run(self._functional.leaves, inputs, batch)

    @functools.cached_property
    def _run(self):
        return jax.jit(functools.partial(run, dataclasses.replace(self._functional, leaves=())))

    def apply_integer(self, batch: Any, *, accumulator: Guard | None = None, overflow: Overflow = "wrap") -> Any:
        """`apply` with the products of kernels whose inputs are quantized made of integers, scales applied afterwards.

        Args:
            batch: as for `apply`.
            accumulator: bits and tile of the signed integers that hold sums, such as `jpfq.Accumulator(16, tile=64)`, which
                need not be what the weights were made for; left out, 32 bits over all inputs.
            overflow: what becomes of a sum that does not fit: "wrap", or "saturate" at every sum on the way, inputs in the
                order of the kernel.

        Example:
            >>> rule = jpfq.Rule(".*", bits=4, activation_bits=8, accumulator=jpfq.Accumulator(16, tile=16))
            >>> integer = jpfq.quantize(model, batches, rule, variables=variables)
            >>> logits = integer.apply_integer(X, accumulator=jpfq.Accumulator(16, tile=16), overflow="saturate")
            >>> bool(jnp.allclose(logits, integer.apply(X), atol=1e-4))
            True
        """
        if accumulator is not None and not isinstance(accumulator, Guard):
            raise ValueError(f"accumulator is such as jpfq.Accumulator(16, tile=64); got {accumulator!r}.")
        bits, tile = (32, None) if accumulator is None else (accumulator.bits, accumulator.tile)
        return self._integers(batch, bits, tile, overflow)

    @functools.cached_property
    def _integers(self):
        return Integers(self._functional, self.tensors, self.inputs)

    @property
    def tunable(self) -> Any:
        """The parameters to train with codes fixed: `params`, with a `Steps` in place of each quantized kernel."""
        return tunable(self.params, self.tensors)

    def tuned(self, params: Any) -> "Quantized":
        """This with trained parameters, given as `fake_quant` takes them: the network that was trained, on its grids.

        Kernels given as arrays go to their nearest codes. `info` stays that of the quantization, the state of the model
        (such as BatchNorm's statistics) what it was; the error of the outputs is unknown, nan.

        Args:
            params: in the structure of `tunable` or of `params`.

        Example:
            >>> tuned = quantized.tuned(quantized.tunable)  # nothing trained in between
            >>> bool((tuned.params["head"]["kernel"] == quantized.params["head"]["kernel"]).all())
            True
        """
        tensors, functional = on_grid(params, self.tensors), self._functional
        paths, values, _ = flatten(fake_quant(params, self.tensors))
        wanted = {path for path, trainable in zip(functional.paths, functional.trainable, strict=True) if trainable}
        if set(paths) != wanted:
            raise ValueError(f"The trained parameters differ from the model's in {sorted(set(paths) ^ wanted)}.")
        new = dict(zip(paths, values, strict=True))
        old = zip(functional.paths, functional.leaves, functional.trainable, strict=True)
        leaves = tuple(like(new[path], leaf) if trainable else leaf for path, leaf, trainable in old)
        rebuilt = functional.rebuild(leaves)
        return dataclasses.replace(
            self,
            params=rebuilt["params"],
            tensors=tensors,
            output_error=float("nan"),
            _functional=dataclasses.replace(functional, leaves=leaves),
            _model=rebuilt.get("model"),
            _variables=rebuilt.get("variables"),
        )

    def serve(self) -> Served:
        """The network with its kernels packed in memory, for inference: a function of a batch.

        It holds nothing of this result's dequantized weights, so these can be let go. Outputs are those of `apply`.

        Example:
            >>> served = quantized.serve()
            >>> logits = served(X)
        """
        return Served.of(self._functional, self.tensors, self.inputs)

    def save(self, folder: str | os.PathLike, *, entropy_coded: bool = False, overwrite: bool = False) -> int:
        """Writes all of this result, but the model's own code, into a folder that `jpfq.load` reads.

        Codes are packed at their storage bits, five ternary ones to a byte; everything else is kept as it is. The folder
        appears whole or not at all, whatever happens meanwhile.

        Args:
            folder: a new folder, or one of a saved result if `overwrite` says so.
            entropy_coded: whether to code the codes near their entropy where that is shorter. Takes the package
                constriction: pip install 'jpfq[entropy]'.
            overwrite: whether to replace a saved result. Until the new one is whole, the old one stays.

        Returns:
            The bytes on disk.

        Example:
            >>> size = quantized.save("model-w4")
            >>> again = jpfq.load("model-w4", model)
        """
        from .checkpoint import save  # which knows this class

        return save(self, folder, entropy_coded=entropy_coded, overwrite=overwrite)

    def report(
        self,
        path: str | os.PathLike,
        *,
        params: Any = None,
        sweep: Any = None,
        title: str | None = None,
        overwrite: bool = False,
    ) -> Path:
        """Writes a page of HTML to look at: figures, errors along the depth, bits, sizes, histograms, reasons.

        The file needs nothing besides itself, works by day and night, on paper and on a phone. It appears whole or not at
        all. Takes the package matplotlib: pip install 'jpfq[demo]'.

        Args:
            path: an .html file.
            params: the float parameters in the structure of `quantized.params`, to show their weights beside the codes.
            sweep: what `jpfq.sweep` returned, to show its settings and their front too.
            title: of the page.
            overwrite: whether to replace a file.

        Returns:
            The file.

        Raises:
            ValueError: the file cannot be written there, or the parameters are those of another network.

        Example:
            >>> page = quantized.report("report.html", params=variables["params"], title="ResNet20, 4 bits")
        """
        from .report import report  # which knows this class

        return report(self, path, params=params, sweep=sweep, title=title, overwrite=overwrite)

    def to_qwix(self, batch: Any, model: Any = None, kwargs: dict | None = None) -> Any:
        """The network for the runtime of qwix, with integer kernels: for serving where that is in use.

        Takes the package qwix. It holds kernels of up to 8 bits with a sign, and convolutions where inputs are quantized to
        4 or 8 bits like their weights. Outputs are those of `apply` up to the rounding of sums.

        Args:
            batch: an input, of the form calibrated on.
            model: the Linen module; for NNX the model is known.
            kwargs: arguments of the model that are no data, as for `quantize`.

        Returns:
            For NNX a model; for Linen (module, variables), to be run by `module.apply(variables, batch)`.

        Raises:
            ValueError: kernels that qwix cannot hold, all of them listed with the reason.

        Example:
            >>> module, held = quantized.to_qwix(X, model)
            >>> bool(jnp.allclose(module.apply(held, X), quantized.apply(X), atol=1e-5))
            True
        """
        from .qwix import to_qwix

        return to_qwix(self, batch, model, kwargs)

    def export(self, kind: Literal["compressed-tensors"], folder: str | os.PathLike, **options: Any) -> dict[str, str]:
        """Writes the result in a format of others. "compressed-tensors" is what vLLM loads: see `jpfq.network.export`.

        Args:
            kind: "compressed-tensors".
            folder: a new folder.
            **options: of that format.

        Returns:
            By path, the reason for each quantized kernel that the format cannot hold and that is written dequantized.

        Example:
            >>> quantized.export("compressed-tensors", "model-vllm")  # nothing is left out
            {}
        """
        from .export import FORMATS

        _check_choice("kind", kind, tuple(FORMATS))
        return FORMATS[kind](self, folder, **options)

    @property
    def nbytes(self) -> int:
        """Bytes of the quantized kernels, packed."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def bits_per_weight(self) -> float:
        """Mean packed bits of the quantized weights, steps included."""
        return 8 * self.nbytes / max(1, sum(tensor.codes.size for tensor in self.tensors.values()))

    def summary(self) -> str:
        """A table of all kernels: what became of each, and at what error.

        Example:
            >>> print(quantized.summary())
            kernel ...
            hidden/kernel ...
            2 kernels quantized to 5.00 bits per weight ...
        """
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
        if any(info.reach is not None for info in self.info.values()):
            lines.append(self._accumulators())
        if self.skipped:
            lines.append(table(("left as it is", "because"), list(self.skipped.items())))
        if self.inputs or self.biases:
            lines.append(
                f"Inputs of {len(self.inputs)} kernels are rounded while the network runs; {len(self.biases)} biases took "
                "the mean error of their layer."
            )
        error = "unknown since training" if self.output_error != self.output_error else f"{self.output_error:.2%}"
        lines.append(
            f"{len(self.tensors)} kernels quantized to {self.bits_per_weight:.2f} bits per weight ({self.nbytes:,} bytes); "
            f"{len(self.skipped)} left as they are. Relative error of the outputs: {error}. "
            f"Peak of live activations: {self.peak_bytes:,} bytes."
        )
        return "\n\n".join(lines)

    def _accumulators(self):
        """A table of the kernels whose sums are bounded: asked for, needed, and what their types alone would need."""
        rows = []
        for path, info in self.info.items():
            if info.reach is not None:
                reach, tensor, (B, _, out, _) = info.reach, self.tensors[path], info.reach.ends.shape
                n = tensor.codes.size // (B * out)
                widths = (int(reach.sums.bits), reach.sums.size(n), reach.bits, reach.types_bits(tensor.grid, n))
                widths = (*widths, reach.outer_bits)
                rows.append((path, *map(str, widths), f"{int(info.reach.ends.max()):,}"))
        return table(("sums of", "bits", "tile", "needed", "of any codes", "outer bits", "largest sum"), rows)


def quantize(
    model: Any,
    batches: Iterable | Callable[[int], Iterable],
    rules: int | Rule | Sequence[Rule],
    *,
    variables: Any = None,
    params: Any = None,
    kwargs: dict | None = None,
    key: jax.Array | None = None,
    reference: Literal["float", "block"] = "float",
    offload: bool = False,
    strict: bool = False,
    checkpoint: str | os.PathLike | None = None,
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
            Or a function from 0, 1, .. to batches of one size, for fresh data at each stop, as in GPFQ22: these run through
            all layers before it, so that the time grows with the square of the depth.
        rules: what is quantized how: a number of bits for all kernels, or rules by path of which the first match wins.
        variables: of a Linen module, as `module.init` returns them.
        params: of a function, a pytree of arrays.
        kwargs: arguments of the model that are no data, such as {"train": False}.
        key: for roundings and patches that draw random numbers.
        reference: what a layer's output is to be near to: "float", what the float network has there, as in the papers;
            "block", what the float layers of its own block make of what the quantized network has at the start of the
            block, as Brevitas does for transformers. A block is a path up to its first part with a number in it.
        offload: whether batches wait in the memory of the host, so that the device holds one at a time.
        strict: whether to refuse a model that has kernels which cannot be quantized, rather than list them.
        checkpoint: a folder in which each layer is kept as soon as it is done, for a long run. The same call goes on from
            there, whenever it was stopped, and ends with the same codes; a call with another model, other data, settings or
            versions is refused and told what differs. SIGTERM, as of a machine that is taken away, lets the layer at work
            end and then exits with status 143. Of fresh batches, the first ones are compared. Delete the folder when done.
        progress: whether to show a progress bar; None shows it on a terminal only.

    Returns:
        A `Quantized`. What was given is not changed.

    Raises:
        ValueError: input that cannot be used, with what to do about it.

    Example:
        >>> rules = [jpfq.Rule("head/.*", skip=True), jpfq.Rule(".*", bits=4)]
        >>> quantized = jpfq.quantize(model, batches, rules, variables=variables)
        >>> list(quantized.tensors), list(quantized.skipped)
        (['hidden/kernel'], ['head/kernel'])
    """
    with context():
        rules = as_rules(rules)
        functional = adapt(model, variables, params, kwargs)
        _check_choice("reference", reference, ("float", "block"))
        fresh = None if isinstance(batches, Iterable) or not callable(batches) else batches
        settings = {"rules": rules, "key": key, "reference": reference, "offload": offload, "strict": strict}
        placed, shaped, devices = place(functional, batches if fresh is None else fresh(0), settings, offload)
        if fresh and (len(shaped) > 1 or reference == "block"):
            raise ValueError("Fresh batches for each layer must be of one size, and the reference the float network.")
        traced = [find_kernels(placed, group.example) for group in shaped]
        analyses = rule_all(placed, traced, rules, strict)
        first, key = analyses[0], automatic(typed(key))
        check_key(first.assignment, key)
        kept = None
        if checkpoint is not None:
            programs = [one.program for one in traced]
            kept = Kept.of(checkpoint, placed, programs, shaped, devices, rules, key=key, reference=reference)
        groups, rebases = stops(first.sites), reference == "block"
        coupled = couple(placed, analyses, shaped, groups, key)
        making = Making(first.assignment.recipes, activations_of(first.assignment), key, coupled)
        streams = streams_of(
            placed, analyses, shaped, groups, offload=offload, rebases=rebases, keeps=fresh is not None
        )
        shapes, example = [x.shape for x in shaped[0].leaves[0]], shapes_of(shaped[0].example)
        del shaped  # the streams let inputs go once they are used
        with progress_bar(len(first.sites), progress) as report, stoppable(kept):
            block, refresh = block_of if rebases else None, _refresh(fresh, shapes, offload) if fresh else None
            (walked,), peak = walk(streams, [making], report, block, refresh, devices, kept)
        return assemble(functional, walked, first.assignment.skipped, peak, example, devices)


def place(
    functional: Functional, batches: Any, settings: dict[str, Any], offload: bool
) -> tuple[Functional, list[Shaped], Devices | None]:
    """The model and the batches where they are to be computed, and the devices that neurons are split over.

    Several hosts are compared first, in `settings` too.
    """
    placed = dataclasses.replace(functional, leaves=tuple(map(automatic, functional.leaves)))
    if jax.process_count() > 1 and isinstance(batches, Iterable):
        batches = list(batches)
        if spans_hosts([*placed.leaves, *leaves_of(batches)]):
            check_hosts(placed, batches, settings)
    shaped = read_batches(batches, on_host=offload)
    devices = devices_of([*placed.leaves, *(x for group in shaped for leaves in group.leaves for x in leaves)])
    if any(a is not b for a, b in zip(functional.leaves, placed.leaves, strict=True)):
        check_runs(placed, shaped[0].example)
    return placed, shaped, devices


def rule_all(
    functional: Functional, traced: "Sequence[Traced]", rules: Sequence[Rule], strict: bool
) -> "list[Analysis]":
    """What the rules make of a model, for each shape of batch it is traced on; the same kernels must be quantized."""
    analyses = [ruled(functional, one, rules, strict) for one in traced]
    for other in analyses[1:]:
        if [(s.path, s.layout) for s in other.sites] != [(s.path, s.layout) for s in analyses[0].sites]:
            raise ValueError("The model multiplies other kernels for batches of another size: calibrate with one size.")
    check_finite(functional, analyses[0].assignment)
    return analyses


def streams_of(functional: Functional, analyses, shaped: Sequence[Shaped], groups, **settings) -> list[Stream]:
    """One stream for each shape of batch; `groups` are the numbers of the sites at each stop."""
    return [
        Stream(
            a.program,
            functional.leaves,
            group.leaves,
            group.weights,
            [[a.sites[i] for i in stop] for stop in groups],
            **settings,
        )
        for a, group in zip(analyses, shaped, strict=True)
    ]


def assemble(
    functional: Functional,
    walked: Walked,
    skipped: dict[str, str],
    peak: int,
    example: Any,
    devices: Devices | None = None,
) -> Quantized:
    """The result of a walk over batches of the shapes of `example`. Without `devices`, pure in the arrays of `walked`."""
    leaves = list(functional.leaves)
    for index, path in enumerate(functional.paths):
        if functional.trainable[index]:
            if path in walked.tensors:
                leaves[index] = like(walked.tensors[path].dequantize(), leaves[index])
            elif path in walked.biases:
                leaves[index] = like(walked.biases[path].astype(leaves[index].dtype), leaves[index])
    rebuilt = functional.rebuild(leaves)
    tensors, info, inputs = walked.tensors, walked.info, walked.inputs
    if devices is not None:  # codes lie as their kernel does, and all else on its mesh
        home = dict(zip(functional.paths, functional.leaves, strict=True))
        tensors = {path: _placed(tensor, home[path]) for path, tensor in tensors.items()}
        info, inputs = ({path: on_mesh_of(home[path], x) for path, x in found.items()} for found in (info, inputs))
    return Quantized(
        rebuilt["params"],
        tensors,
        info,
        skipped,
        inputs,
        tuple(walked.biases),
        largest(walked.output_error),
        peak,
        dataclasses.replace(functional, leaves=tuple(map(automatic, leaves))),
        rebuilt.get("model"),
        rebuilt.get("variables"),
        example,
    )


def largest(errors) -> Any:
    """The largest of the outputs' errors; 0 where none is a floating number."""
    errors = jnp.where(jnp.isnan(jnp.asarray(errors)), 0, jnp.asarray(errors)).max(initial=0)
    return errors if is_traced(errors) else float(errors)


def typed(key: jax.Array | None) -> jax.Array | None:
    """A key of the new kind, whose shape () says that it is one, from either kind."""
    if key is None or jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    return jax.random.wrap_key_data(key)


def couple(functional: Functional, analyses, shaped: Sequence[Shaped], groups, key: jax.Array | None) -> dict:
    """By stop and position, how the neurons of a site are coupled, and its curvature over all batches."""
    first = analyses[0]
    how = {i: first.assignment.rules[site.path].coupling for i, site in enumerate(first.sites)}
    how = {i: coupling for i, coupling in how.items() if coupling is not None}
    if not how:
        return {}
    key = jax.random.fold_in(jax.random.key(0) if key is None else key, zlib.crc32(b"coupling"))
    total: dict = {}
    for number, (a, group) in enumerate(zip(analyses, shaped, strict=True)):
        sites = {i: a.sites[i] for i in how}
        part = jax.random.fold_in(key, number)
        found = curvatures(a.program, functional.leaves, group.leaves, group.weights, sites, how, part)
        total |= {i: F if i not in total else total[i] + F for i, F in found.items()}
    for i, F in total.items():
        if not 0 < float(jnp.trace(F.sum(0))) < float("inf"):
            raise ValueError(
                f"coupling: by derivatives of the float network, its outputs do not depend on {first.sites[i].path}, or "
                "more than numbers can hold. Return logits, not labels; calibrate in float32; or couple other kernels only."
            )
    places = {i: (stop, position) for stop, group in enumerate(groups) for position, i in enumerate(group)}
    return {places[i]: (coupling, total[i]) for i, coupling in how.items()}


def _refresh(fresh, shapes, offload):
    """Gives a stream other batches."""

    def refresh(stream, number):
        groups = read_batches(fresh(number), on_host=offload)
        for group in groups:
            if len(groups) > 1 or [x.shape for x in group.leaves[0]] != shapes:
                raise ValueError(f"The batches for stop {number} are not all of the first one's shapes {shapes}.")
        return stream.anew(groups[0].leaves, groups[0].weights, number)

    return refresh


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


class Traced(NamedTuple):
    """A model traced on one shape of batch."""

    program: Program
    sites: list[Site]
    reasons: dict[str, str]  # by path of every other kernel, why it cannot be quantized


class Analysis(NamedTuple):
    """A traced model, and what the rules make of it."""

    program: Program
    sites: list[Site]  # to be quantized
    assignment: Assignment


def analyse(functional: Functional, rules: Sequence[Rule], example: Any, strict: bool = False) -> Analysis:
    """Traces a model, finds its kernels and gives each its rule. Values are not looked at: shapes will do."""
    return ruled(functional, find_kernels(functional, example), rules, strict)


def find_kernels(functional: Functional, example: Any) -> Traced:
    """Traces a model and finds its kernels."""
    program = trace_twice(functional.fn, functional.paths, functional.leaves, example)
    sites, reasons = find_sites(program)
    state = {path for path, ok in zip(functional.paths, functional.trainable, strict=True) if not ok}
    sites = [site for site in sites if site.path not in state]
    return Traced(program, sites, {path: reason for path, reason in reasons.items() if path not in state})


def ruled(functional: Functional, traced: Traced, rules: Sequence[Rule], strict: bool = False) -> Analysis:
    """Gives each kernel its rule."""
    program, sites, reasons = traced
    trainable = [path for path, ok in zip(functional.paths, functional.trainable, strict=True) if ok]
    assignment = assign(rules, list(dict.fromkeys(site.path for site in sites)), reasons, trainable)
    refused = {path: reason for path, reason in reasons.items() if assignment.skipped.get(path) == reason}
    if strict and refused:
        listing = "\n".join(f"  {path}: {reason}" for path, reason in refused.items())
        raise ValueError(f"strict=True, and these kernels cannot be quantized:\n{listing}\nSkip them by a rule.")
    sites = [site for site in sites if site.path in assignment.recipes]
    corrected = any(assignment.rules[site.path].correct_bias for site in sites)
    biases = find_biases(program, sites, list(functional.trainable)) if corrected else {}
    sites = [_as_ruled(site, assignment.rules[site.path], biases.get(site.index)) for site in sites]
    program, sites = with_taps(program, sites)
    for path, recipe in assignment.recipes.items():
        if recipe.rotation is not None:
            _check_rotation(path, [site for site in sites if site.path == path], program)
    return Analysis(program, sites, assignment)


def _as_ruled(site, rule, bias):
    """A site with what its rule says of the layer."""
    activations = rule.inputs()
    if activations is not None:
        activations.refuse(site.layout, site.path)
    bias = bias if rule.correct_bias else None
    return dataclasses.replace(site, activations=activations, patches=rule.patches, bias=bias)


def block_of(site: Site) -> Any:
    """The block of a site: its path up to the first part with a number; in a stack of layers the place in the stack."""
    parts = site.path.split("/")
    end = next((i for i, part in enumerate(parts[:-1]) if any(c.isdigit() for c in part)), len(parts) - 1)
    places = [int(eqn.invars[1].val) for eqn, _ in site.chain.steps if eqn.primitive.name == "dynamic_slice"]
    return tuple(places) or tuple(parts[: end + 1])


def _check_rotation(path, sites, program):
    """Dequantizing turns a kernel back as a whole, so it must be one matrix as it stands."""
    shape = program.params[sites[0].leaf].aval.shape
    if len(sites) > 1 or any(eqn.primitive.name not in CASTS for eqn, _ in sites[0].chain.steps):
        raise ValueError(
            f"Hadamard cannot be folded into {path} {shape}: the model reshapes, transposes or slices this kernel before it "
            "multiplies, or uses it more than once. Give it a rule without rotation."
        )


def _check_choice(name, value, choices):
    if value not in choices:
        raise ValueError(f"{name} is {' or '.join(map(repr, choices))}; got {value!r}.")


def activations_of(assignment: Assignment) -> dict[str, Activations | None]:
    """How the inputs of each kernel are quantized."""
    return {path: rule.inputs() for path, rule in assignment.rules.items()}


def check_finite(functional: Functional, assignment: Assignment) -> None:
    """Raises where a kernel to be quantized is not finite."""
    for path, leaf in zip(functional.paths, functional.leaves, strict=True):
        if path in assignment.recipes and not bool(jnp.isfinite(leaf).all()):
            raise ValueError(f"The kernel {path} holds NaN or infinity.")


def check_key(assignment: Assignment, key: jax.Array | None) -> None:
    """Raises where random numbers are drawn and there is no key."""
    for path, recipe in assignment.recipes.items():
        patches = assignment.rules[path].patches
        for part in (recipe.rounding, patches):
            if part is not None and part.random and key is None:
                raise ValueError(f"{part} of {path} draws random numbers: pass key=jax.random.key(...).")


def _placed(tensor, leaf):
    """A tensor whose codes lie as its kernel does."""
    step, zero = on_mesh_of(leaf, (tensor.step, tensor.zero))
    return dataclasses.replace(tensor, codes=like(tensor.codes, leaf), step=step, zero=zero)


def like(new: jax.Array, old: Any) -> Any:
    """A new leaf placed as the old one was."""
    placed = isinstance(old, jax.Array) and not is_traced(old)
    return jax.device_put(new, old.sharding) if placed else new

"""`quantize`: a model, batches and rules in, a quantized model out."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any, Literal

import jax

from ..calibrate.batches import Shaped, naming, read_batches, shapes_of
from ..calibrate.embeddings import Quantizations
from ..calibrate.hosts import check_hosts, leaves_of, spans_hosts
from ..calibrate.loop import CalibrationResult, TrackSettings, calibrate
from ..calibrate.progress import Step, progress_of
from ..calibrate.stops import group_by_input
from ..calibrate.stream import Stream, StreamOptions
from ..matrix import Devices, QTensor
from ..matrix.explicit_mesh import automatic, context, is_traced
from ..model.adapters import adapt
from ..model.functional import Functional, check_values
from ..model.mesh import check_runs, devices_of, like, on_auto_axes, on_mesh_of
from ..model.random_keys import typed
from ..model.sites import Site
from ..scalar.checks import check_choice
from .analysis import Analysis, activations_of, analyse_all, block_of, check_key, couple, find_all_kernels
from .embeddings import begin
from .held_out import held_out_error, read_held_out
from .plan import steps_of
from .quantized import Quantized
from .rules import Rule, as_rules


def quantize(
    model: Any,
    batches: Iterable | Callable[[int], Iterable],
    rules: int | Rule | Sequence[Rule],
    *,
    variables: Any = None,
    params: Any = None,
    kwargs: dict | None = None,
    key: jax.Array | None = None,
    held_out: Iterable | None = None,
    reference: Literal["float", "block"] = "float",
    offload: bool = False,
    strict: bool = False,
    checkpoint: str | os.PathLike | None = None,
    progress: bool | None = None,
) -> Quantized:
    """Quantizes the weights of a trained model, layer by layer, on calibration data.

    Each kernel is chosen so that its output, on the inputs of the quantized network, is close to the output of the float
    kernel on the inputs of the float network. The model runs once in float and once quantized, whatever its depth.

    Args:
        model: a Linen module (with `variables`), an NNX model, or any function fn(params, *inputs) (with `params`).
        batches: calibration data, read once: arrays, tuples of positional arguments, or dicts of keyword arguments. A
            `Weighted` batch excludes padding from the statistics. Arrays of random keys are inputs like others, for a VAE
            for example. Batches and sequences may have different sizes; each new shape is traced and compiled separately
            (drop a smaller last batch to save that time).
            Or a function from 0, 1, .. to batches of one size, for fresh data at each stop, as in GPFQ22. These run through
            all layers before the stop, so the time grows with the square of the depth.
        rules: a number of bits for all kernels, or rules by path of which the first match applies.
        variables: of a Linen module, as `module.init` returns them.
        params: of a function, a pytree of arrays.
        kwargs: arguments of the model that are not data, such as {"train": False}.
        key: for roundings and patches that draw random numbers.
        held_out: batches like `batches` that nothing is calibrated on. The error of the outputs on them is
            `held_out_error` of the result; they are kept until the end and then run through both networks.
        reference: the target for the output of a layer. "float": its output in the float network, as in the papers.
            "block": the output of the float layers of its block, applied to the quantized network's values at the start of
            the block, as in Brevitas for transformers. A block is a path up to its first part with a number in it.
        offload: whether waiting batches are moved to host memory, so that the device holds one at a time.
        strict: whether to raise if some kernels cannot be quantized, instead of listing them.
        checkpoint: a folder for a long run, where each layer is saved as soon as it is done. If the run is stopped, the
            same call resumes there and ends with the same codes. A call with another model, other data, settings or
            versions is refused, with the differences. All batches are compared by checksums (of fresh batches, only those
            of the first stop and of the stop where the run ended, because the others are not read again). While the call
            runs, other processes cannot use the folder. On SIGTERM the current layer finishes and is saved; the exit
            status is 143. Delete the folder when the run is complete.
        progress: whether to show progress. None shows a bar on a terminal and in Jupyter, and elsewhere logs a line every
            few seconds (logger "jpfq", level INFO). True prints these lines to standard error instead.

    Returns:
        A `Quantized`. The arguments are not changed.

    Raises:
        ValueError: an argument cannot be used; the message says what to do.

    Examples:
        >>> rules = [jpfq.Rule("head/.*", skip=True), jpfq.Rule(".*", bits=4)]
        >>> quantized = jpfq.quantize(model, batches, rules, variables=variables)
        >>> list(quantized.tensors), list(quantized.skipped)
        (['hidden/kernel'], ['head/kernel'])
    """
    rules = as_rules(rules)
    functional = adapt(model, variables, params, kwargs)
    with context(functional.leaves), contextlib.ExitStack() as stack:
        check_choice("reference", reference, ("float", "block"))
        fresh = None if isinstance(batches, Iterable) or not callable(batches) else batches
        settings = {"rules": rules, "key": key, "reference": reference, "offload": offload, "strict": strict}
        placed, shaped, devices = place(functional, batches if fresh is None else fresh(0), settings, offload)
        if fresh and (len(shaped) > 1 or reference == "block"):
            raise ValueError("Fresh batches for each layer must have one size, and need reference='float'.")
        traced = find_all_kernels(placed, shaped)
        analyses = analyse_all(placed, traced, rules, strict)
        first, key = analyses[0], automatic(typed(key))
        check_key(first.assignment, key)
        store, stopping = None, contextlib.nullcontext()
        if checkpoint is not None:
            from ..storage.checkpoint import Checkpoint, stoppable

            programs = [one.program for one in traced]
            own = {"key": key, "reference": reference, "fresh batches": fresh is not None}
            store = Checkpoint.of(checkpoint, placed, programs, shaped, devices, rules, **own)
            stack.enter_context(contextlib.closing(store))
            stopping = stoppable(store)
        groups, rebases = group_by_input(first.points), reference == "block"
        coupled = couple(placed, analyses, shaped, groups, key, store.sites if store else ())
        track = TrackSettings(first.assignment.recipes, activations_of(first.assignment), key, coupled)
        options = StreamOptions(offload, rebases, keeps_history=fresh is not None)
        streams = streams_of(placed, analyses, shaped, groups, options=options)
        counts, solved = [len(group.leaves) for group in shaped], store.sites if store else ()
        shapes, example = [x.shape for x in shaped[0].leaves[0]], shapes_of(shaped[0].example)
        finite = [group.finite for group in shaped]
        held = None if held_out is None else read_held_out(placed, held_out, example, rules, first, offload)
        with (
            progress_of(lambda: steps(analyses, counts, solved, fresh is not None), progress) as reporter,
            stopping,
            naming(finite),
        ):
            embedded = begin(placed, analyses, shaped, streams, key, reporter, devices)
            del shaped  # so that the streams can free inputs after their use
            block = block_of if rebases else None
            refresh = _fresh_streams(fresh, shapes, offload, store, finite) if fresh else None
            (result,), peak = calibrate(streams, [track], reporter, block, refresh, devices, store)
        result = with_embeddings(result, embedded)
        quantized = assemble(functional, result, first.assignment.skipped, peak, example, uses_of(first.sites))
        tied = {embedding.path: len(embedding.products) for embedding in first.embeddings}
        quantized = dataclasses.replace(quantized, embeddings=tied)
        if held is None:
            return quantized
        error = held_out_error(placed, held, quantized._functional.leaves, result.inputs, StreamOptions(offload))
        return dataclasses.replace(quantized, held_out=error)


def steps(analyses: Sequence[Analysis], counts: Sequence[int], solved: Container, fresh: bool) -> list[Step]:
    """The layers in the order of calibration."""
    return [step for stop in steps_of(analyses, counts, solved=solved, fresh=fresh) for step in stop]


def place(
    functional: Functional, batches: Any, settings: dict[str, Any], offload: bool
) -> tuple[Functional, list[Shaped], Devices | None]:
    """The model and the batches on Auto axes, checked, and the devices over which neurons are split.

    The arguments of several hosts are compared first, including `settings`.
    """
    placed = on_auto_axes(functional)
    if jax.process_count() > 1 and isinstance(batches, Iterable):
        batches = list(batches)
        if spans_hosts([*placed.leaves, *leaves_of(batches)]):
            check_hosts(placed, batches, settings)
    check_values(zip(placed.paths, placed.leaves, strict=True), "Quantizing")
    shaped = read_batches(batches, on_host=offload)
    of_batches = ((f"an input of a batch of shape {x.shape}", x) for g in shaped for leaves in g.leaves for x in leaves)
    check_values([*zip(placed.paths, placed.leaves, strict=True), *of_batches], "Quantizing")
    devices = devices_of([*placed.leaves, *(x for group in shaped for leaves in group.leaves for x in leaves)])
    if any(a is not b for a, b in zip(functional.leaves, placed.leaves, strict=True)):
        check_runs(placed, shaped[0].example)
    return placed, shaped, devices


def streams_of(
    functional: Functional,
    analyses: Sequence[Analysis],
    shaped: Sequence[Shaped],
    groups: Sequence[Sequence[int]],
    laned: Sequence[bool] = (False,),
    options: StreamOptions = StreamOptions(),
) -> list[Stream]:
    """One stream for each shape of batch; `groups` are the indices of the sites at each stop."""
    return [
        Stream(
            a.program,
            functional.leaves,
            group.leaves,
            group.weights,
            [[a.points[i] for i in stop] for stop in groups],
            laned,
            dataclasses.replace(options, replaced=a.replaced),
        )
        for a, group in zip(analyses, shaped, strict=True)
    ]


def assemble(
    functional: Functional,
    result: CalibrationResult,
    skipped: dict[str, str],
    peak: int,
    example: Any,
    uses: dict[str, int] | None = None,
) -> Quantized:
    """The final result, from that of calibration. Pure if `result` is traced.

    peak: bytes of live activations. example: the shapes of a batch.
    """
    leaves = list(functional.leaves)
    for index, path in enumerate(functional.paths):
        if functional.trainable[index]:
            if path in result.tensors:
                leaves[index] = like(result.tensors[path].dequantize(), leaves[index])
            elif path in result.biases:
                leaves[index] = like(result.biases[path].astype(leaves[index].dtype), leaves[index])
    rebuilt = functional.rebuild(leaves)
    outputs = result.output_error.overall
    tensors, info, inputs = result.tensors, result.info, result.inputs
    home = dict(zip(functional.paths, functional.leaves, strict=True))
    if not any(
        map(is_traced, jax.tree.leaves(result.tensors))
    ):  # codes are placed like their kernel, the rest beside them
        tensors = {path: placed_like(tensor, home[path]) for path, tensor in tensors.items()}
        info = {path: on_mesh_of(home[path], x) for path, x in info.items()}
        leaf = next((x for x in functional.leaves if isinstance(x, jax.Array)), None)  # operands have no kernel
        seen: dict = {}  # kernels with the same input share one quantizer
        place = lambda path, rounded: seen.setdefault(id(rounded), on_mesh_of(home.get(path, leaf), rounded))
        inputs = {path: [place(path, rounded) for rounded in found] for path, found in inputs.items()}
    return Quantized(
        rebuilt["params"],
        tensors,
        info,
        skipped,
        inputs,
        tuple(result.biases),
        outputs.error_or_nan,
        peak,
        dataclasses.replace(functional, leaves=tuple(map(automatic, leaves))),
        rebuilt.get("model"),
        rebuilt.get("variables"),
        example,
        uses or {},
        outputs,
    )


def with_embeddings(result: CalibrationResult, embedded: Quantizations) -> CalibrationResult:
    """The result of calibration with the embeddings first."""
    tensors, info = ({path: pair[i] for path, pair in embedded.items()} for i in (0, 1))
    return result._replace(tensors=tensors | result.tensors, info=info | result.info)


def uses_of(sites: Sequence[Site]) -> dict[str, int]:
    """The number of products that share the codes of a kernel, by path of each shared kernel."""
    return {site.path: len(site.shares) for site in sites if site.shares}


def _fresh_streams(fresh, shapes, offload, store, finite):
    """A function that replays a stream on fresh batches, and updates `finite` for them."""

    def refresh(stream, number):
        groups = read_batches(fresh(number), on_host=offload)
        for group in groups:
            if len(groups) > 1 or [x.shape for x in group.leaves[0]] != shapes:
                raise ValueError(
                    f"The batches for stop {number} do not all have the shapes of the first ones, {shapes}."
                )
        if store is not None:
            store.check_batches(number, groups[0])
        finite[:] = [groups[0].finite]
        return stream.replay(groups[0].leaves, groups[0].weights, number)

    return refresh


def placed_like(tensor: QTensor, leaf: Any) -> QTensor:
    """A tensor whose codes are placed like its kernel."""
    step, zero = on_mesh_of(leaf, (tensor.step, tensor.zero))
    return dataclasses.replace(tensor, codes=like(tensor.codes, leaf), step=step, zero=zero)

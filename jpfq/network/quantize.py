"""`quantize`: a model, batches and rules in, a quantized model out."""

import contextlib
import dataclasses
import os
import zlib
from collections.abc import Callable, Container, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from ..matrix import Devices
from ..matrix.automatic import automatic, context
from ..matrix.gram import are_finite, is_traced
from ..matrix.layout import ConvLayout
from .activation import Activations
from .batches import Shaped, naming, read_batches, shapes_of
from .bias import find_biases
from .curvature import curvatures
from .functional import PARTITION, Functional, check_arrays, check_values, from_function
from .hosts import check_hosts, leaves_of, spans_hosts
from .linen import from_linen, is_linen
from .mesh import check_runs, devices_of, like, on_auto_axes, on_mesh_of
from .nnx import from_nnx, is_nnx
from .program import Program, trace_twice
from .progress import Step, progress_of
from .quantized import Quantized, check_choice
from .resume import Kept, stoppable
from .rules import Assignment, Rule, as_rules, assign
from .sites import CASTS, Site, find_sites, joined, with_taps
from .stream import Stream
from .walk import Making, Walked, served, stops, walk


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
            `Weighted` batch keeps padding out of the statistics; arrays of random keys are inputs too, as of a VAE. Sizes
            may differ, of batches and of sequences; each further shape is traced and compiled anew, which is exact for
            every model (drop a smaller last batch to save the time).
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
            versions is refused and told what differs. All batches are compared, by checksums; of fresh ones those of the
            first stop and of the one at which the run was stopped, as those of layers that are done are not read again.
            While the call runs, another process that is given the folder is refused.
            SIGTERM, as of a machine that is taken away, lets the layer at work end and then exits with status 143. Delete
            the folder when done.
        progress: whether to tell how far it is. None shows a bar on a terminal and in Jupyter, and elsewhere writes a line
            every few seconds into the log (the logger "jpfq", at INFO); True writes these to the standard error there.

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
    rules = as_rules(rules)
    functional = adapt(model, variables, params, kwargs)
    with context(functional.leaves), contextlib.ExitStack() as held:
        check_choice("reference", reference, ("float", "block"))
        fresh = None if isinstance(batches, Iterable) or not callable(batches) else batches
        settings = {"rules": rules, "key": key, "reference": reference, "offload": offload, "strict": strict}
        placed, shaped, devices = place(functional, batches if fresh is None else fresh(0), settings, offload)
        if fresh and (len(shaped) > 1 or reference == "block"):
            raise ValueError("Fresh batches for each layer must be of one size, and the reference the float network.")
        traced = find_all_kernels(placed, shaped)
        analyses = rule_all(placed, traced, rules, strict)
        first, key = analyses[0], automatic(typed(key))
        check_key(first.assignment, key)
        kept = None
        if checkpoint is not None:
            programs = [one.program for one in traced]
            own = {"key": key, "reference": reference, "fresh batches": fresh is not None}
            kept = Kept.of(checkpoint, placed, programs, shaped, devices, rules, **own)
            held.enter_context(contextlib.closing(kept))
        groups, rebases = stops(first.sites), reference == "block"
        coupled = couple(placed, analyses, shaped, groups, key, kept.sites if kept else ())
        making = Making(first.assignment.recipes, activations_of(first.assignment), key, coupled)
        streams = streams_of(
            placed, analyses, shaped, groups, offload=offload, rebases=rebases, keeps=fresh is not None
        )
        counts, solved = [len(group.leaves) for group in shaped], kept.sites if kept else ()
        shapes, example = [x.shape for x in shaped[0].leaves[0]], shapes_of(shaped[0].example)
        finite = [group.finite for group in shaped]
        del shaped  # the streams let inputs go once they are used
        with (
            progress_of(lambda: steps(analyses, counts, solved, fresh is not None), progress) as report,
            stoppable(kept),
            naming(finite),
        ):
            block = block_of if rebases else None
            refresh = _refresh(fresh, shapes, offload, kept, finite) if fresh else None
            (walked,), peak = walk(streams, [making], report, block, refresh, devices, kept)
        return assemble(functional, walked, first.assignment.skipped, peak, example, uses_of(first.sites))


def steps(analyses: "Sequence[Analysis]", counts: Sequence[int], solved: Container, fresh: bool) -> list[Step]:
    """The layers as a walk does them."""
    from .plan import steps_of  # a plan is one of what is here

    return [step for stop in steps_of(analyses, counts, solved=solved, fresh=fresh) for step in stop]


def place(
    functional: Functional, batches: Any, settings: dict[str, Any], offload: bool
) -> tuple[Functional, list[Shaped], Devices | None]:
    """The model and the batches where they are to be computed, and the devices that neurons are split over.

    Several hosts are compared first, in `settings` too.
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


def rule_all(
    functional: Functional, traced: "Sequence[Traced]", rules: Sequence[Rule], strict: bool
) -> "list[Analysis]":
    """Applies the rules to a model, for each shape of batch it is traced on; the same kernels must be quantized."""
    analyses = [ruled(functional, one, rules, strict) for one in traced]
    for other in analyses[1:]:
        if [_product(s) for s in other.sites] != [_product(s) for s in analyses[0].sites]:
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
    uses: dict[str, int] | None = None,
) -> Quantized:
    """The result of a walk over batches of the shapes of `example`. Pure where `walked` is traced."""
    leaves = list(functional.leaves)
    for index, path in enumerate(functional.paths):
        if functional.trainable[index]:
            if path in walked.tensors:
                leaves[index] = like(walked.tensors[path].dequantize(), leaves[index])
            elif path in walked.biases:
                leaves[index] = like(walked.biases[path].astype(leaves[index].dtype), leaves[index])
    rebuilt = functional.rebuild(leaves)
    outputs = walked.output_error.whole
    tensors, info, inputs = walked.tensors, walked.info, walked.inputs
    home = dict(zip(functional.paths, functional.leaves, strict=True))
    if not any(
        map(is_traced, jax.tree.leaves(walked.tensors))
    ):  # codes lie as their kernel does, and all else beside them
        tensors = {path: _placed(tensor, home[path]) for path, tensor in tensors.items()}
        info = {path: on_mesh_of(home[path], x) for path, x in info.items()}
        seen: dict = {}  # kernels that read the same share one rounding
        place = lambda path, rounded: seen.setdefault(id(rounded), on_mesh_of(home[path], rounded))
        inputs = {path: [place(path, rounded) for rounded in found] for path, found in inputs.items()}
    return Quantized(
        rebuilt["params"],
        tensors,
        info,
        skipped,
        inputs,
        tuple(walked.biases),
        outputs.figure,
        peak,
        dataclasses.replace(functional, leaves=tuple(map(automatic, leaves))),
        rebuilt.get("model"),
        rebuilt.get("variables"),
        example,
        uses or {},
        outputs,
    )


def uses_of(sites: Sequence[Site]) -> dict[str, int]:
    """By path of each kernel that is shared, how many products it serves with the same codes."""
    return {site.path: len(site.shares) for site in sites if site.shares}


def typed(key: jax.Array | None) -> jax.Array | None:
    """A key of the new kind, whose shape () says that it is one, from either kind."""
    if key is None or jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    return jax.random.wrap_key_data(key)


def couple(
    functional: Functional, analyses, shaped: Sequence[Shaped], groups, key: jax.Array | None, solved: Container = ()
) -> dict:
    """By stop and position, how the neurons of a site are coupled, and its curvature over all batches.

    Sites that are measured together are left out where all of them are solved; where one is not, what is compiled for them
    stays the same, and so its curvature, to the bit.
    """
    first = analyses[0]
    how = {i: first.assignment.rules[site.path].coupling for i, site in enumerate(first.sites)}
    how = {i: coupling for i, coupling in how.items() if coupling is not None}
    uses = served([[first.sites[i] for i in group] for group in groups])  # a shared matrix has one curvature
    places = {groups[stop][i]: place for place, shared in uses.items() for stop, i in shared}
    needed = {coupling.measured for i, coupling in how.items() if places[i] not in solved}
    how = {i: coupling for i, coupling in how.items() if coupling.measured in needed}
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
    found: dict = {}
    for i, coupling in how.items():
        _, before = found.get(places[i], (coupling, None))
        found[places[i]] = coupling, total[i] if before is None else before + total[i]
    return found


def _refresh(fresh, shapes, offload, kept, finite):
    """Gives a stream other batches; of these `finite` is told."""

    def refresh(stream, number):
        groups = read_batches(fresh(number), on_host=offload)
        for group in groups:
            if len(groups) > 1 or [x.shape for x in group.leaves[0]] != shapes:
                raise ValueError(f"The batches for stop {number} are not all of the first one's shapes {shapes}.")
        if kept is not None:
            kept.meet(number, groups[0])
        finite[:] = [groups[0].finite]
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
        functional = from_linen(model, variables, kwargs)
    elif is_nnx(model):
        functional = from_nnx(model, kwargs)
    else:
        _check_function(model, params)
        functional = from_function(model, params, kwargs)
    check_arrays(functional.paths, functional.leaves)
    return functional


def _check_function(model, params):
    """Raises for what is no function of parameters and inputs."""
    if not callable(model):
        raise ValueError(f"model is a Linen module, an NNX model or a function fn(params, *inputs); got {model!r}.")
    if params is None:
        if not jax.tree_util.all_leaves([model]):
            raise ValueError(
                f"model is {type(model).__name__}, a pytree that has its parameters within itself. {PARTITION}"
            )
        raise ValueError("A function needs its parameters: jpfq.quantize(fn, batches, rules, params=params).")


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


def find_all_kernels(functional: Functional, shaped: Sequence[Shaped]) -> list[Traced]:
    """Traces a model on each shape of batch.

    Raises:
        ValueError: it runs on the first and not on another.
    """
    shapes = lambda group: ", ".join(str(x.shape) for x in group.leaves[0])
    first, *others = shaped
    traced = [find_kernels(functional, first.example)]
    for group in others:
        try:
            traced.append(find_kernels(functional, group.example))
        except Exception as error:
            raise ValueError(
                f"The model runs on the first batch, of shapes {shapes(first)}, but not on one of shapes {shapes(group)}: "
                f"{error}"
            ) from error
    return traced


def _product(site):
    """The parts of a site that all shapes of batches must share; the padding of a convolution may depend on sizes."""
    layout = site.layout
    layout = dataclasses.replace(layout, padding=()) if isinstance(layout, ConvLayout) else layout
    return site.path, layout


def ruled(functional: Functional, traced: Traced, rules: Sequence[Rule], strict: bool = False) -> Analysis:
    """Gives each kernel its rule."""
    program, sites, reasons = traced
    trainable = [path for path, ok in zip(functional.paths, functional.trainable, strict=True) if ok]
    assignment = assign(rules, list(dict.fromkeys(site.path for site in sites)), reasons, trainable)
    refused = {path: reason for path, reason in reasons.items() if assignment.skipped.get(path) == reason}
    if strict and refused:
        listing = "\n".join(f"  {path}: {reason}" for path, reason in refused.items())
        raise ValueError(f"strict=True, and these kernels cannot be quantized:\n{listing}\nSkip them by a rule.")
    program, sites = joined(program, [site for site in sites if site.path in assignment.recipes])
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
    several = any(site.first != sites[0].first for site in sites)
    if several or any(eqn.primitive.name not in CASTS for eqn, _ in sites[0].chain.steps):
        raise ValueError(
            f"Hadamard cannot be folded into {path} {shape}: the model reshapes, transposes or slices this kernel before it "
            "multiplies, or uses it in more ways than one. Give it a rule without rotation."
        )


def activations_of(assignment: Assignment) -> dict[str, Activations | None]:
    """The settings by which the inputs of each kernel are quantized."""
    return {path: rule.inputs() for path, rule in assignment.rules.items()}


def check_finite(functional: Functional, assignment: Assignment) -> None:
    """Raises where a kernel to be quantized is not finite."""
    leaves = dict(zip(functional.paths, functional.leaves, strict=True))
    paths = [path for path in functional.paths if path in assignment.recipes]
    for path, finite in zip(paths, are_finite([leaves[path] for path in paths]), strict=True):
        if not finite:
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

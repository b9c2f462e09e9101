"""Sweeps: many settings of one model in one run of calibration.

The float network runs once. Settings that differ only in numbers are lanes of one program: their quantized networks, Grams,
solves and scores have a leading axis. Settings that differ otherwise (method, order, group size) are tracks of the same run,
which take turns at each layer. A separate run is needed only for settings that quantize other kernels or other inputs.
"""

import collections
import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from ..calibrate.batches import Shaped, naming, shapes_of
from ..calibrate.loop import TrackSettings, calibrate
from ..calibrate.progress import Reporter, Step, progress_of
from ..calibrate.stops import group_by_input
from ..calibrate.stream import StreamOptions
from ..matrix.explicit_mesh import automatic, context, no_mesh
from ..matrix.lanes import lane, over_lanes, stack
from ..model.adapters import adapt
from ..model.functional import Functional
from ..model.mesh import LanesMesh
from ..model.random_keys import typed
from ..network.analysis import Analysis, activations_of, analyse_all, check_key, couple, find_all_kernels
from ..network.plan import plan_of, steps_of
from ..network.quantize import assemble, place, streams_of, uses_of
from ..network.quantized import Quantized
from ..scalar.predicates import is_count
from .space import METRICS, Space, in_words
from .sweep_result import Chunk, Sweep

CACHE = 16  # compiled functions of losses; the least recently used is evicted


class _Setting(NamedTuple):
    """One point of a space, applied to the model."""

    point: dict[str, Any]
    analyses: list[Analysis]  # by shape of batch
    key: jax.Array | None

    @property
    def first(self) -> Analysis:
        return self.analyses[0]


def sweep(
    model: Any,
    batches: Iterable,
    space: Space,
    *,
    evaluate: Callable[[Quantized], Any] | None = None,
    lanes: int | None = None,
    sharding: NamedSharding | None = None,
    variables: Any = None,
    params: Any = None,
    kwargs: dict | None = None,
    key: jax.Array | None = None,
    offload: bool = False,
    strict: bool = False,
    memory: int | None = None,
    progress: bool | None = None,
) -> Sweep:
    """Quantizes a model under many settings at once.

    Each result is the same as that of `quantize` with this setting.

    Args:
        model, batches, variables, params, kwargs, offload, strict, progress: the same as for `jpfq.quantize`.
        space: the settings.
        evaluate: a function from a `Quantized` to a loss, a scalar array; smaller is better. It may use `params`,
            `variables`, `model` and `apply`. Like any function under `jax.jit`, it must consist of JAX operations, and is
            compiled once per model, so other values that it reads must not change.
        lanes: the largest number of settings in one program; None for no limit. Fewer take less memory.
        sharding: splits the settings over devices: `NamedSharding(mesh, PartitionSpec("sweep"))`, for example. Model and
            batches are then on other axes of that mesh, or on no mesh; neurons are not split, and `lanes` is rounded up to
            a multiple of the devices along that axis. None computes all settings where the model is.
        key: for random roundings and patches, the same for all settings. An axis `seed` of the space gives each its own.
        memory: the limit in bytes; None for the memory of the device.

    Raises:
        ValueError: `quantize` would refuse a setting, or there is not enough memory for so many at once.

    Examples:
        >>> sweep = jpfq.sweep(model, batches, jpfq.Space(bits=[2, 3, 4]), variables=variables)
        >>> quantized = sweep.best(bits_per_weight=3.5)
        >>> quantized.bits_per_weight
        3.0
    """
    if not isinstance(space, Space):
        raise ValueError(f"space is a jpfq.Space, such as jpfq.Space(bits=[2, 3, 4]); got {space!r}.")
    if lanes is not None and not is_count(lanes):
        raise ValueError(f"lanes is a positive number of settings, or None; got {lanes!r}.")
    if callable(batches) and not isinstance(batches, Iterable):
        raise ValueError("A sweep does not support fresh batches for each layer: pass batches instead of a function.")
    functional = adapt(model, variables, params, kwargs)
    with context(functional.leaves):
        compared = {"space": [tuple(map(str, point.items())) for point in space.points], "key": key, "lanes": lanes}
        placed, shaped, devices = place(functional, batches, compared, offload)
        mesh = None if sharding is None else LanesMesh.of(sharding)
        if mesh is not None:
            placed, shaped = _on(mesh, placed, shaped)
            devices, key = None, mesh.place(key)
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh.mesh):
            settings = _settings(placed, shaped, space, automatic(typed(key)), strict)
            runs = _partition(settings, range(len(settings)), _run_key)
            _check_memory(settings, runs, shaped, lanes, offload, memory)
            chunks, size = [], _Size(lanes, 1 if mesh is None else mesh.size)
            finite = [group.finite for group in shaped]
            counts = [len(group.leaves) for group in shaped]
            steps = lambda: [step for indices in runs for step in _steps(settings, indices, size, counts)]
            with progress_of(steps, progress) as reporter, naming(finite):
                for indices in runs:
                    chunks += _calibrate(placed, shaped, settings, indices, size, offload, reporter, devices)
            example = shapes_of(shaped[0].example)
            losses = {} if evaluate is None else _losses(functional, placed.leaves, settings, chunks, evaluate, example)
    records: list = [None] * len(settings)
    for chunk in chunks:
        with no_mesh():
            shaped_tensors = jax.eval_shape(lambda tensors: lane(tensors, 0), chunk.result.tensors)
        for where, index in enumerate(chunk.indices):
            records[index] = _record(settings[index], chunk, where, shaped_tensors, losses.get(index))
    assignments = [setting.first.assignment for setting in settings]
    uses = [uses_of(setting.first.sites) for setting in settings]
    return Sweep(records, assignments, uses, chunks, functional, example, mesh)


class _Size(NamedTuple):
    """The number of settings that are lanes of one program."""

    most: int | None  # the limit
    multiple: int  # devices along the axis of settings, which have equal shares

    def of(self, count: int) -> int:
        """The lanes of one program for `count` settings."""
        return -(-min(self.most or count, count) // self.multiple) * self.multiple


def _on(mesh: LanesMesh, functional: Functional, shaped: Sequence[Shaped]) -> tuple[Functional, list[Shaped]]:
    """The model and the batches on the mesh of a sweep."""
    place = lambda tree: jax.tree.map(mesh.place, tree)
    functional = dataclasses.replace(functional, leaves=place(functional.leaves))
    placed = lambda g: g._replace(example=place(g.example), leaves=place(g.leaves), weights=place(g.weights))
    return functional, list(map(placed, shaped))


def _settings(functional, shaped, space, key, strict) -> list[_Setting]:
    """Applies each point of a space to the model."""
    traced = find_all_kernels(functional, shaped)
    settings = []
    for point in space.points:
        rules = space.rules_of(point)
        own = jax.random.key(point["seed"]) if "seed" in point else key
        try:
            setting = _Setting(point, analyse_all(functional, traced, rules, strict), own)
            check_key(setting.first.assignment, own)
            _refuse_embeddings(setting.first)
        except ValueError as error:
            raise ValueError(f"The setting ({in_words(point)}): {error}") from error
        settings.append(setting)
    return settings


def _refuse_embeddings(analysis):
    """Raises if rules name embeddings, which have no lanes."""
    if analysis.embeddings:
        raise ValueError(
            f"a sweep leaves embeddings in float, and a rule names {analysis.embeddings[0].path}: leave that rule out here, "
            "and give it to jpfq.quantize."
        )


def _parts(settings, indices, lanes: _Size) -> list[list[int]]:
    """The settings of a run by track; the last of each is repeated to fill it up."""
    parts = []
    for alike in _partition(settings, indices, _track_key):
        size = lanes.of(len(alike))
        for start in range(0, len(alike), size):
            part = alike[start : start + size]
            parts.append(part + part[-1:] * (size - len(part)))  # one size, one program
    return parts


def _steps(settings, indices, lanes: _Size, counts: Sequence[int]) -> list[Step]:
    """The layers of a run in order: at each stop those of one track after the other."""
    found = []
    for part in _parts(settings, indices, lanes):
        size = len(set(part))
        of = f", {size} of {len(settings)} settings" if size < len(settings) else ""
        stops = steps_of(settings[part[0]].analyses, counts)
        found.append([[s._replace(name=s.name + of, work=len(part) * s.work) for s in stop] for stop in stops])
    return [step for tracks in zip(*found, strict=True) for stop in tracks for step in stop]


def _calibrate(
    functional, shaped: Sequence[Shaped], settings, indices, lanes: _Size, offload, reporter: Reporter, devices
) -> list[Chunk]:
    """One run of calibration, for settings with the same stops."""
    first = settings[indices[0]]
    groups = group_by_input(first.first.points)
    parts = _parts(settings, indices, lanes)
    track_settings = [_track_settings(functional, shaped, settings, part, groups) for part in parts]
    streams = streams_of(functional, first.analyses, shaped, groups, [True] * len(parts), StreamOptions(offload))
    results, peak = calibrate(streams, track_settings, reporter, devices=devices)
    return [Chunk(part, found, peak) for part, found in zip(parts, results, strict=True)]


def _track_settings(functional, shaped, settings, part, groups) -> TrackSettings:
    """The `TrackSettings` of some settings as lanes."""
    own = [settings[i] for i in part]
    assignments = [setting.first.assignment for setting in own]
    recipes = stack([assignment.recipes for assignment in assignments])
    activations = stack([activations_of(assignment) for assignment in assignments])
    keys = None if own[0].key is None else jnp.stack([setting.key for setting in own])
    seen: dict = {}  # seed -> curvatures, as they depend on nothing else that differs
    for setting in own:
        seed = setting.point.get("seed")
        if seed not in seen:
            seen[seed] = couple(functional, setting.analyses, shaped, groups, setting.key)
    couplings = [
        {
            at: (setting.first.assignment.rules[setting.first.sites[groups[at[0]][at[1]]].path].coupling, F)
            for at, (_, F) in seen[setting.point.get("seed")].items()
        }
        for setting in own
    ]
    return TrackSettings(recipes, activations, keys, stack(couplings), tuple(in_words(s.point) for s in own))


def _losses(functional, leaves, settings, chunks, evaluate, example) -> dict[int, float]:
    """The losses that `evaluate` returns, by index of the setting."""
    scores, losses = _scores(functional, evaluate), {}
    shapes, structure = jax.tree.flatten(example)
    static = structure, tuple((x.shape, x.dtype) for x in shapes)
    for chunk in chunks:
        skipped = tuple(settings[chunk.indices[0]].first.assignment.skipped.items())
        try:
            found = scores(chunk.result, leaves, skipped, chunk.peak, static)
        except (jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError) as error:
            raise ValueError(
                "evaluate is compiled, but it converts arrays to Python numbers or NumPy arrays, with float() or np.asarray "
                f"for example. Use jax.numpy, and return an array of shape (). JAX says: {error}"
            ) from error
        losses |= dict(zip(chunk.indices, np.asarray(found).tolist(), strict=True))
    return losses


_compiled: collections.OrderedDict[Any, Callable] = collections.OrderedDict()  # the last few, by model and `evaluate`


def _scores(functional, evaluate) -> Callable:
    """A compiled function for the losses of all lanes, cached by model and `evaluate`."""
    key = functional.identity, evaluate
    if functional.identity is None or key not in _compiled:
        bare = dataclasses.replace(functional, leaves=())

        def scores(result, leaves, skipped, peak, static):
            structure, shapes = static
            example = structure.unflatten([jax.ShapeDtypeStruct(*x) for x in shapes])

            def one(result, leaves):
                own = dataclasses.replace(bare, leaves=leaves)
                loss = jnp.asarray(evaluate(assemble(own, result, dict(skipped), peak, example)))
                if loss.ndim or not jnp.issubdtype(loss.dtype, jnp.number):
                    raise ValueError(
                        f"evaluate must return one number for a network; got shape {loss.shape}, {loss.dtype}."
                    )
                return loss.astype(float)

            return over_lanes(one, (result, leaves), (True, False))

        compiled = jax.jit(scores, static_argnames=("skipped", "peak", "static"))
        if functional.identity is None:
            return compiled
        _compiled[key] = compiled
        while len(_compiled) > CACHE:
            _compiled.popitem(last=False)
    _compiled.move_to_end(key)
    return _compiled[key]


def _record(setting: _Setting, chunk: Chunk, where: int, shaped: dict, loss: float | None) -> dict[str, Any]:
    """The record of one setting. Sizes follow from the shapes of its tensors."""
    recipes = setting.first.assignment.recipes
    tensors = [dataclasses.replace(tensor, grid=recipes[path].grid) for path, tensor in shaped.items()]
    nbytes = sum(tensor.nbytes for tensor in tensors)
    output_error = lane(chunk.result.output_error, where).overall.error_or_nan
    metrics = (
        output_error if loss is None else loss,
        output_error,
        8 * nbytes / sum(t.codes.size for t in tensors),
        nbytes,
    )
    return setting.point | dict(zip(METRICS, metrics, strict=True))


def _partition(settings, indices: Iterable[int], key: Callable) -> list[list[int]]:
    """The indices grouped by the key of their setting, in order of first appearance."""
    parts: dict = {}
    for i in indices:
        parts.setdefault(key(settings[i]), []).append(i)
    return list(parts.values())


def _run_key(setting: _Setting):
    """A key, equal for settings of one run: the stops, and the data that are gathered there."""
    return tuple(
        (
            tuple((s.path, s.index, s.patches, s.bias is not None, s.activations is not None) for s in analysis.sites),
            tuple(map(tuple, group_by_input(analysis.points))),
            tuple((o.path, o.cached) for o in analysis.operands),
        )
        for analysis in setting.analyses
    )


def _track_key(setting: _Setting):
    """A key, equal for settings of one program: everything but their numbers."""
    assignment = setting.first.assignment
    couplings = {path: rule.coupling for path, rule in assignment.rules.items()}
    leaves, structure = jax.tree.flatten((assignment.recipes, activations_of(assignment), couplings))
    return structure, tuple(jnp.shape(x) for x in leaves), setting.key is None


def _check_memory(settings, runs, shaped, lanes, offload, memory):
    """Raises if the settings would not fit into memory, by the plan of one times their number."""
    limit = _device_memory() if memory is None else memory
    if limit is None:
        return
    for indices in runs:
        plan = plan_of(settings[indices[0]].first, sum(len(group.leaves) for group in shaped))
        solving = max(line.workspace for line in plan.lines)
        count = len(indices)
        held = (plan.stages["calibration"].total - solving) * (1 if offload else count)
        total = held + solving * min(lanes or count, count)
        if total <= limit:
            continue
        fit = (limit - held) // solving
        remedy = f"pass lanes={fit}" if fit >= 1 else "sweep over fewer settings at a time"
        if not offload and fit < 1:
            remedy = "pass offload=True, which moves waiting batches to host memory, with lanes=1; or " + remedy
        raise ValueError(
            f"{count} settings at once take about {total / 2**30:.2f} GiB, but there are {limit / 2**30:.2f} GiB: {remedy}."
        )


def _device_memory() -> int | None:
    """The memory of the device in bytes, or of the host if that is the device; None if unknown."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    if jax.default_backend() == "cpu" and hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None

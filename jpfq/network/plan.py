"""`plan`: previews `quantize` from shapes alone. Lists the kernels, the reasons for skipping, memory and arithmetic."""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Container, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..calibrate.batch_gram import at_once
from ..calibrate.batches import shapes_of
from ..calibrate.embeddings import by_rows
from ..calibrate.gather import rows_shape
from ..calibrate.liveness import forks, needs
from ..calibrate.progress import Step
from ..calibrate.stops import SiteIndex, group_by_input, matrix_uses
from ..matrix import Natural, code_dtype, slice_width
from ..matrix.arrays import HALVES
from ..matrix.conv_gram import at_a_time, copies, correlates, pays
from ..matrix.explicit_mesh import context
from ..matrix.layout import ConvLayout, Layout
from ..matrix.patches import DEFAULT
from ..model.adapters import adapt
from ..model.compat import is_literal
from ..model.mesh import on_auto_axes
from ..model.sites import Site, Tap
from ..scalar import Bounded
from .analysis import Analysis, analyse
from .embeddings import at_products
from .plan_parts import Line as Line
from .plan_parts import Memory as Memory
from .rules import Rule, as_rules
from .size import Size, packed_bytes, parameters_of, sizes_in_words, total_size
from .summary import left
from .table import table


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan of a run. Print it.

    lines: one for each matrix of a kernel that will be quantized.
    skipped: the reason, by path of every other kernel.
    stages: memory by stage: "calibration", "result", and "derivatives" if neurons are coupled. It does not include the
        process itself and compiled programs.
    flops: the arithmetic.
    parameters: path and shape of every parameter.
    packed: bytes of each quantized kernel, by path.

    Examples:
        >>> plan = jpfq.plan(model, batches[0], 4, variables=variables, batches=2)
        >>> [(line.path, line.rows) for line in plan.lines]
        [('hidden/kernel', 128), ('head/kernel', 128)]
    """

    lines: list[Line]
    skipped: dict[str, str]
    stages: dict[str, Memory]
    flops: float  # of forward passes at the sites, Grams and recursions
    parameters: tuple[tuple[str, Any], ...]  # path and shape of every one
    packed: dict[str, int]  # bytes of each quantized kernel, by path

    @property
    def size(self) -> Size:
        """The size of all parameters afterwards: quantized ones packed, the others in their own type."""
        return total_size(self.parameters, self.packed)

    @property
    def memory(self) -> int:
        """Bytes of arrays at the peak."""
        return max(stage.total for stage in self.stages.values())

    def __str__(self) -> str:
        by_path: dict[str, list[Line]] = {}
        for line in self.lines:
            by_path.setdefault(line.path, []).append(line)
        rows, bounded = [], any(isinstance(line.recipe.rounding, Bounded) for line in self.lines)
        for path, lines in by_path.items():
            first = lines[0]
            B, n, out = first.dims
            shape = f"{n:,} x {out:,}" + (f", {B * len(lines)} times" if B * len(lines) > 1 else "")
            shape += f", shared by {first.uses} products" if first.uses > 1 else ""
            recipe = first.recipe
            how = (str(recipe.grid), type(recipe.scale).__name__, type(recipe.method).__name__, first.form)
            how = (*how, _size(max(line.workspace for line in lines)), *((_sums(recipe.rounding),) if bounded else ()))
            rows.append((path, shape, f"{first.rows:,}", *how))
        head = ("kernel", "inputs x neurons", "rows", "grid", "scale", "method", "form", "workspace")
        text = [table((*head, *(("sums",) if bounded else ())), rows)]
        text += left(self.skipped, [path for path, _ in self.parameters if path not in by_path])
        weights = sum(math.prod(line.dims) for line in self.lines)
        nbytes = sum(self.packed.values())
        stage, peak = max(self.stages.items(), key=lambda item: item[1].total)
        parts = ", ".join(f"{name} {_size(size)}" for name, size in dataclasses.asdict(peak).items() if size)
        sizes = sizes_in_words(8 * nbytes / max(1, weights), nbytes, self.size)
        text.append(
            f"{len(by_path)} kernels with {weights:,} weights to quantize to {sizes}. "
            f"Peak memory about {_size(self.memory)} ({stage}: {parts}), besides the process itself and compiled programs; "
            f"arithmetic about {self.flops:.3g} operations."
        )
        return "\n\n".join(text)


def _sums(rounding):
    """A phrase for the integer sums that a rounding bounds."""
    if not isinstance(rounding, Bounded):
        return "of any size"
    sums = rounding.sums
    return f"{int(sums.bits)} bits, {'all inputs' if sums.tile is None else f'tiles of {sums.tile}'}"


def plan(
    model: Any,
    batch: Any,
    rules: int | Rule | Sequence[Rule],
    *,
    variables: Any = None,
    params: Any = None,
    kwargs: dict | None = None,
    batches: int = 1,
) -> Plan:
    """Previews what `quantize` would do with `batches` batches like `batch`, from shapes only. Allocates nothing.

    Args:
        model, rules, variables, params, kwargs: the same as for `quantize`, with arrays or `jax.ShapeDtypeStruct`s.
        batch: one batch, or its shapes.
        batches: the number of calibration batches.

    Raises:
        ValueError: `quantize` would raise, whatever the values.

    Examples:
        >>> print(jpfq.plan(model, batches[0], 4, variables=variables, batches=len(batches)))
        kernel ...
        2 kernels with 1,280 weights to quantize to 5.00 bits per weight (800 bytes), the whole model to 5.82 ...
    """
    functional = on_auto_axes(adapt(model, variables, params, kwargs))
    with context(functional.leaves):
        shape_of = lambda x: jax.ShapeDtypeStruct(np.shape(x), jnp.result_type(x))
        parameters = [(path, shape_of(leaf)) for path, leaf in parameters_of(functional)]
        return plan_of(analyse(functional, as_rules(rules), shapes_of(batch)), batches, parameters)


def plan_of(analysis: Analysis, batches: int, parameters: Sequence[tuple[str, Any]] = ()) -> Plan:
    """The plan for an analysed model with parameters of these paths and shapes."""
    variables, equations = forks(analysis.program, analysis.sites, analysis.replaced)
    rows, lines = embedding_lines(analysis, batches), _lines(analysis, variables, batches)
    for line in [*rows.values(), *lines.values()]:
        line.recipe.refuse(line.rows, line.dims[1], line.path)
    forward = sum(_forward(site, batches) for site in analysis.sites)
    stages = {"calibration": _calibration(analysis, equations, lines, batches), "result": _result(analysis, lines)}
    for embedding in analysis.embeddings:
        if embedding.products:
            own = at_products(analysis, embedding)
            passed = _calibration(
                own, set(), dict.fromkeys((s.first for s in own.sites), rows[embedding.path]), batches
            )
            stages[f"the embedding {embedding.path}"] = passed
    if curvature := _curvature(analysis):
        program = analysis.program
        values = sum(_bytes(v) for e in program.equations if not program.is_fixed(e) for v in e.outvars)
        stages["derivatives"] = Memory(_parameters(analysis), activations=2 * values, workspace=2 * curvature)
    flops = forward + sum(line.flops for line in [*rows.values(), *lines.values()])
    every, skipped, packed = [*rows.values(), *lines.values()], analysis.assignment.skipped, collections.Counter()
    for line in every:
        packed[line.path] += packed_bytes(line.dims, line.recipe)
    return Plan(every, skipped, stages, flops, tuple(parameters), dict(packed))


def steps_of(
    analyses: Sequence[Analysis],
    batches: Sequence[int],
    *,
    solved: Container[SiteIndex] = (),
    fresh: bool = False,
) -> list[list[Step]]:
    """The layers in the order of calibration, by stop, with the work of each.

    Args:
        analyses: one for each shape of batch.
        batches: the number of batches of each shape.
        solved: sites that need not be solved again.
        fresh: whether fresh batches run through all layers before each stop.
    """
    forked = [forks(a.program, a.sites, a.replaced)[0] for a in analyses]
    lines = [_lines(a, variables, n) for a, variables, n in zip(analyses, forked, batches, strict=True)]
    sites, assignment = analyses[0].sites, analyses[0].assignment
    groups = group_by_input(sites)
    uses = matrix_uses([[sites[i] for i in group] for group in groups])
    through = lambda i: sum(_forward(a.sites[i], n) for a, n in zip(analyses, batches, strict=True))
    forward = [sum(map(through, group)) for group in groups]
    forward = list(itertools.accumulate(forward)) if fresh else forward
    count, found, waiting = itertools.count(1), [], 0.0  # work before the last use of a shared matrix
    embedded = [embedding_lines(a, n) for a, n in zip(analyses, batches, strict=True)]
    total = len(uses) + len(embedded[0])
    for path, line in embedded[0].items():
        work = sum(of[path].flops for of in embedded) + (sum(forward) / 2 if line.form == "gram" else 0)
        found.append(
            [Step(f"layer {next(count)} of {total}", path, work, (line.dims, str(jax.tree.structure(line.recipe))))]
        )
    for index, group in enumerate(groups):
        own_sites = [(p, i) for p, i in enumerate(group) if (index, p) in uses]
        passed, waiting = (waiting + forward[index], 0.0) if own_sites else (0.0, waiting + forward[index])
        steps = []
        for position, i in own_sites:
            site, known = sites[i], (index, position) in solved
            own = [of[site.first] for of in lines]
            work = passed / len(own_sites) + sum(0 if known else line.flops for line in own)
            settings = jax.tree.structure((assignment.recipes[site.path], site.activations))
            data = tuple(
                (a.sites[i].data.aval.shape, a.sites[i].data in v) for a, v in zip(analyses, forked, strict=True)
            )
            kind = None if known else (site.layout, str(site.data.aval.dtype), data, own[0].form, settings)
            steps.append(Step(f"layer {next(count)} of {total}", site.path, work, kind))
        found.append(steps)
    return found


def _lines(analysis: Analysis, forked: set, batches: int) -> dict[int, Line]:
    """The plan for each matrix, by its first product. `forked` has the variables in which the networks differ."""
    uses: dict[int, list[Site]] = {}
    for site in analysis.sites:
        uses.setdefault(site.first, []).append(site)
    return {first: _line(sites, forked, analysis, batches) for first, sites in uses.items()}


def embedding_lines(analysis: Analysis, batches: int) -> dict[str, Line]:
    """The plan for each embedding, by path. One that no product uses has no data but its rows."""
    found = {}
    for embedding in analysis.embeddings:
        if embedding.products:
            own = at_products(analysis, embedding)
            found[embedding.path] = _line(own.sites, set(), own, batches)
            continue
        recipe = by_rows(analysis.assignment.embeddings[embedding.path])
        B, n, out = embedding.layout.dims
        width = slice_width((B, n, out), recipe)
        passes = 0 if recipe.finish is None else recipe.finish.passes
        flops = 2.0 * ((2 if recipe.scale.runs > 1 else 1) * recipe.scale.runs + 4 * passes + 4) * n * n * out
        found[embedding.path] = Line(
            embedding.path, (B, n, out), 0, recipe, "rows", 4 * (16 * n * width + 3 * n * out), flops
        )
    return found


def _forward(site: Site, batches: int) -> float:
    """The arithmetic of a product in both networks."""
    return 4.0 * batches * math.prod(rows_shape(site.layout, site.data.aval.shape)) * math.prod(site.layout.dims)


def _line(uses: Sequence[Site], forked: set, analysis: Analysis, batches: int) -> Line:
    """Memory and arithmetic for one matrix. Numbers of temporaries are those that XLA reports for compiled functions."""
    path, dims, count = uses[0].path, uses[0].layout.dims, len(uses)
    uses = list({site.reads: site for site in uses}.values())  # uses with the same input have one Gram
    B, n, out = dims
    layouts = [(site.patches or DEFAULT).layout(site.layout) for site in uses]
    picked = [_picked(site, layout, batches) for site, layout in zip(uses, layouts, strict=True)]
    shapes = [site.data.aval.shape for site in uses]
    windows = map(rows_shape, layouts, shapes)
    counts = [math.prod(rows) if drawn is None else drawn for drawn, rows in zip(picked, windows, strict=True)]
    rows = sum(counts) * batches
    recipe = analysis.assignment.recipes[path]
    networks = 2 if any(site.data in forked for site in uses) else 1
    if recipe.prefers_rows(rows, n, out):
        work = B * (2 * networks * rows * n + 3 * rows * out + 6 * n * out)
        flops = 6.0 * B * rows * n * (out + (recipe.block or n))
        return Line(path, dims, rows, recipe, "data", 4 * work, flops, count)
    matrices = 3 if networks == 2 else 1  # H, C, drift
    passes = 0 if recipe.finish is None else recipe.finish.passes
    bare = recipe.method.local and isinstance(recipe.order, Natural) and networks == 1
    squares, columns = (7, 16) if passes else (2 if bare else 4, 12)
    whole = [drawn is None and pays(layout, rows) for drawn, layout in zip(picked, layouts, strict=True)]
    grams = [_gram(*of, networks) for of in zip(layouts, shapes, counts, whole, strict=True)]
    multiplied, held = sum(gram[0] for gram in grams), max(gram[1] for gram in grams)
    gather = held + (1 + len(uses)) * matrices * n * n
    width = slice_width(dims, recipe)
    solve = (matrices + squares) * n * n + columns * n * width + (3 * n * out if width < out else 0)
    runs = recipe.scale.runs
    products = (2 if runs > 1 else 1) * runs + 4 * passes + 4  # a search of steps measures each of its runs
    flops = 2.0 * B * (multiplied * batches + products * n * n * out)
    return Line(path, dims, rows, recipe, "gram", 4 * B * max(gather, solve), flops, count)


def _picked(site: Site, layout: Layout, batches: int) -> int | None:
    """The number of rows selected from a batch; None if all are taken."""
    patches = site.patches or DEFAULT
    windows = rows_shape(layout, site.data.aval.shape)
    total = batches * math.prod(windows)
    drawn = jax.eval_shape(lambda: patches.pick(layout, windows, jax.random.key(0), total))
    return None if drawn is None else drawn.size


def _gram(layout: Layout, shape: tuple[int, ...], rows: int, whole: bool, networks: int) -> tuple[float, int]:
    """The cost of the Gram of one batch and one matrix: multiplications, and elements in memory at once.

    whole: whether all rows are taken, and enough of them for correlations to pay. With row weights or several devices,
    which are not known here, correlations are not used.
    """
    B, n, _ = layout.dims
    if whole and isinstance(layout, ConvLayout) and correlates(layout, shape):
        channels, samples = n // math.prod(layout.window), shape[layout.data_spec[0]]
        size = math.prod(shape) // samples
        together = min(samples, at_a_time(layout, size, networks, at_once()))
        elements = copies(layout, networks) * size // B  # of one sample; in memory twice, as pieces and joined
        return networks**2 * copies(layout, 1) * channels * size * samples // B, 2 * elements * together
    patches = 3 if B * rows * n > math.prod(shape) else 0  # copies of the inputs of a convolution
    together = min(rows * n, at_once() // B) if patches else rows * n
    symmetric = 0.75 if n >= HALVES else 1
    matrices = 2 * symmetric + 1 if networks == 2 else symmetric
    return matrices * rows * n * n, together * (patches * networks + networks - 1)


def _calibration(analysis: Analysis, forked_equations: set[int], lines: dict[int, Line], batches: int) -> Memory:
    """Memory of calibration: the loop over stops with sizes in place of arrays."""
    program, groups = analysis.program, group_by_input(analysis.sites)
    ends = [min(analysis.sites[i].first for i in group) for group in groups]
    solved = matrix_uses([[analysis.sites[i] for i in group] for group in groups])
    first_need, last_need = needs(program)
    live = {v: _bytes(v) for v in program.inputs}  # of one batch
    kernels: dict = {}  # variable or (path, product) -> bytes and the last equation that needs it
    codes, start, moments = 2 * _embedded(analysis), 0, []  # their values, and by another chain for a product
    moment = functools.partial(Memory, _parameters(analysis))
    curvature = _curvature(analysis)
    for index_of_stop, end in enumerate([*ends, len(program.equations)]):
        before, inside = sum(live.values()), 0
        computed = [v for i, need in first_need.items() if start <= need < end for v in program.equations[i].outvars]
        kernels.update((v, (_bytes(v), last_need[v])) for v in computed if v in last_need)
        for index, eqn in enumerate(program.equations[start:end], start):
            if not program.is_fixed(eqn):
                inside = max([inside, *map(_bytes, eqn.outvars)])
                networks = 2 if index in forked_equations else 1
                live.update((v, networks * _bytes(v)) for v in eqn.outvars if program.last_use.get(v, -1) >= end)
        if index_of_stop < len(groups):
            data = analysis.sites[groups[index_of_stop][0]].data
            live.update({data: _bytes(data)} if isinstance(data, Tap) else {})  # rounded inputs
        moving = sum(live.values()) + 2 * inside  # the batch at work holds its old and its new values
        live = {v: size for v, size in live.items() if program.last_use.get(v, -1) >= end}
        waiting = (batches - 1) * (max(before, sum(live.values())) if index_of_stop < len(groups) else before)
        held = sum(size for size, _ in kernels.values())
        moments.append(moment(waiting + moving, held, curvature, codes))
        if index_of_stop == len(groups):
            break  # outputs are compared and freed batch by batch
        kernels = {v: (size, last) for v, (size, last) in kernels.items() if last >= end}
        for site in [analysis.sites[i] for p, i in enumerate(groups[index_of_stop]) if (index_of_stop, p) in solved]:
            held, workspace = sum(size for size, _ in kernels.values()), lines[site.first].workspace + curvature
            moments.append(moment(batches * sum(live.values()), held, workspace, codes))
            uses = site.shares or (site.index,)
            kernels[site.path, site.first] = _bytes(site.weight), max(uses)
            codes += site.weight.aval.size * code_dtype(lines[site.first].recipe.grid).itemsize
        start = end
    return max(moments, key=lambda moment: moment.total)


def _result(analysis: Analysis, lines: dict[int, Line]) -> Memory:
    """Memory of the result: parameters, codes, and the kernels dequantized from them."""
    codes = sum(math.prod(line.dims) * code_dtype(line.recipe.grid).itemsize for line in lines.values())
    params = zip(analysis.program.paths, analysis.program.params, strict=True)
    result = sum(_bytes(v) for path, v in params if path in analysis.assignment.recipes)
    return Memory(_parameters(analysis), codes=codes + _embedded(analysis) // 4, result=result + _embedded(analysis))


def _embedded(analysis: Analysis) -> int:
    """Bytes of the parameters of all embeddings to quantize."""
    return sum(_bytes(analysis.source.params[embedding.leaf]) for embedding in analysis.embeddings)


def _parameters(analysis: Analysis) -> int:
    return sum(map(_bytes, analysis.program.params))


def _curvature(analysis: Analysis) -> int:
    """Bytes of the curvatures (out, out) of coupled neurons, which exist until the end."""
    rules = analysis.assignment.rules
    coupled = [s.layout.dims for s in analysis.sites if s.path in rules and rules[s.path].coupling is not None]
    return sum(4 * B * out * out for B, _, out in coupled)


def _bytes(v) -> int:
    if is_literal(v) or not hasattr(v.aval, "shape"):
        return 0
    return math.prod(v.aval.shape) * getattr(v.aval.dtype, "itemsize", 4)


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1024
    raise AssertionError

"""`plan`: previews `quantize` from shapes alone. Lists the kernels, the reasons for skipping, memory and arithmetic."""

import dataclasses
import itertools
import math
from collections.abc import Container, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ..calibrate.batches import shapes_of
from ..calibrate.liveness import forks
from ..calibrate.progress import Step
from ..calibrate.stops import SiteIndex, group_by_input, matrix_uses
from ..matrix.explicit_mesh import context
from ..model.adapters import adapt
from ..model.mesh import on_auto_axes
from ..model.operands import find_operands
from ..model.traced import find_kernels
from ..scalar import Bounded
from .analysis import Analysis, apply_rules
from .embeddings import at_products
from .plan_memory import Memory, of_calibration, of_derivatives, of_result
from .plan_work import Line, embedding_lines, forward_flops, lines_of
from .rules import Rule, as_rules
from .servers import Form, Servers, form_of, servers
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
    operands: the grid and the steps, or "float", by name of the operands of products without weights, such as queries
        and keys.

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
    operands: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def size(self) -> Size:
        """The size of all parameters afterwards: quantized ones packed, the others in their own type."""
        return total_size(self.parameters, self.packed)

    @property
    def memory(self) -> int:
        """Bytes of arrays at the peak."""
        return max(stage.total for stage in self.stages.values())

    def servers(self, *, dynamic_inputs: Literal["int8", "fp8"] | None = None) -> Servers:
        """The servers that would load each layer, and the product it meets there, or why not.

        Args:
            dynamic_inputs: as for `Quantized.export`.

        Examples:
            >>> print(jpfq.plan(model, batches[0], jpfq.formats.nvfp4(), variables=variables).servers())
            kernel ...
        """
        return servers({line.path: _form(line) for line in self.lines}, dynamic_inputs)

    def __str__(self) -> str:
        by_path: dict[str, list[Line]] = {}
        for line in self.lines:
            by_path.setdefault(line.path, []).append(line)
        rows, bounded = [], any(isinstance(line.recipe.rounding, Bounded) for line in self.lines)
        rounded = any(line.inputs is not None for line in self.lines)
        for path, lines in by_path.items():
            first = lines[0]
            B, n, out = first.dims
            shape = f"{n:,} x {out:,}" + (f", {B * len(lines)} times" if B * len(lines) > 1 else "")
            shape += f", shared by {first.uses} products" if first.uses > 1 else ""
            recipe = first.recipe
            how = (str(recipe.grid), type(recipe.scale).__name__, type(recipe.method).__name__, first.form)
            how = (
                *how,
                _size(max(line.workspace for line in lines)),
                *((str(first.inputs or "float"),) if rounded else ()),
            )
            how = (*how, *((_sums(recipe.rounding),) if bounded else ()))
            rows.append((path, shape, f"{first.rows:,}", *how))
        head = ("kernel", "inputs x neurons", "rows", "grid", "scale", "method", "form", "workspace")
        head = (*head, *(("its inputs",) if rounded else ()), *(("sums",) if bounded else ()))
        text = [table(head, rows)] if rows else []
        text += left(self.skipped, [path for path, _ in self.parameters if path not in by_path])
        if self.operands:
            text.append(table(("operand of a product without weights", "rounded to"), list(self.operands.items())))
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


def _form(line: Line) -> Form:
    matrices, *shape = line.dims
    refused = f"it is used as {matrices} matrices" if matrices > 1 else ""
    recipe = line.recipe
    refused = "its inputs are rotated" if recipe.rotation is not None else refused
    group = getattr(recipe.scale.per, "size", None)
    shape = (shape[0], shape[1])
    return form_of(recipe.grid, recipe.step_dtype, group, shape, line.inputs, conv=line.conv, refused=refused)


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
        traced = find_kernels(functional, shapes_of(batch))
        found = plan_of(apply_rules(functional, traced, as_rules(rules)), batches, parameters)
        names = {operand.path: "float" for operand in find_operands(traced.program, traced.sites)}
        return dataclasses.replace(found, operands=names | found.operands)


def plan_of(analysis: Analysis, batches: int, parameters: Sequence[tuple[str, Any]] = ()) -> Plan:
    """The plan for an analysed model with parameters of these paths and shapes, without operands that stay in float."""
    variables, equations = forks(analysis.program, analysis.points, analysis.replaced)
    rows, lines = embedding_lines(analysis, batches), lines_of(analysis, variables, batches)
    for line in [*rows.values(), *lines.values()]:
        line.recipe.refuse(line.rows, line.dims[1:], line.path)
    forward = sum(forward_flops(site, batches) for site in analysis.sites)
    stages = {"calibration": of_calibration(analysis, equations, lines, batches), "result": of_result(analysis, lines)}
    for embedding in analysis.embeddings:
        if embedding.products:
            own = at_products(analysis, embedding)
            passed = of_calibration(
                own, set(), dict.fromkeys((s.first for s in own.sites), rows[embedding.path]), batches
            )
            stages[f"the embedding {embedding.path}"] = passed
    if derivatives := of_derivatives(analysis):
        stages["derivatives"] = derivatives
    flops = forward + sum(line.flops for line in [*rows.values(), *lines.values()])
    every, skipped = [*rows.values(), *lines.values()], analysis.assignment.skipped
    kernels: dict[str, list[Line]] = {}
    for line in every:
        kernels.setdefault(line.path, []).append(line)
    packed = {path: packed_bytes([line.dims for line in own], own[0].recipe) for path, own in kernels.items()}
    operands = {operand.path: str(operand.activations) for operand in analysis.operands}
    return Plan(every, skipped, stages, flops, tuple(parameters), packed, operands)


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
    forked = [forks(a.program, a.points, a.replaced)[0] for a in analyses]
    lines = [lines_of(a, variables, n) for a, variables, n in zip(analyses, forked, batches, strict=True)]
    sites, assignment = analyses[0].points, analyses[0].assignment
    groups = group_by_input(sites)
    uses = matrix_uses([[sites[i] for i in group] for group in groups])
    through = lambda i: sum(forward_flops(a.points[i], n) for a, n in zip(analyses, batches, strict=True))
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


def _size(count: float) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:,.0f} {unit}" if unit == "bytes" else f"{count:,.1f} {unit}"
        count /= 1024
    raise AssertionError

"""`plan`: what `quantize` would do, from shapes alone: which kernels, how, which not and why, memory and arithmetic."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from ..matrix import Recipe
from .batches import shapes_of
from .compat import is_literal
from .quantize import Analysis, adapt, analyse
from .rules import Rule, as_rules
from .sites import Site
from .stream import forks
from .table import table
from .walk import rows_shape, stops


@dataclasses.dataclass(frozen=True)
class Line:
    """What will happen at one site."""

    path: str
    dims: tuple[int, int, int]  # matrices, inputs, neurons
    rows: int  # calibration rows in all
    recipe: Recipe
    form: str
    workspace: int  # bytes for its data and its solve, beside what is live
    flops: float  # of its Gram (or data form) and its recursion


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan of a run. Print it."""

    lines: list[Line]
    skipped: dict[str, str]
    memory: int  # bytes at the peak: parameters, live activations of both networks, statistics, solve
    flops: float  # of forward passes at the sites, statistics and recursions

    def __str__(self) -> str:
        by_path: dict[str, list[Line]] = {}
        for line in self.lines:
            by_path.setdefault(line.path, []).append(line)
        rows = []
        for path, lines in by_path.items():
            first = lines[0]
            B, n, out = first.dims
            shape = f"{n:,} x {out:,}" + (f", {B * len(lines)} times" if B * len(lines) > 1 else "")
            recipe = first.recipe
            how = (str(recipe.grid), type(recipe.scale).__name__, type(recipe.method).__name__, first.form)
            rows.append((path, shape, f"{first.rows:,}", *how, _size(max(line.workspace for line in lines))))
        text = [table(("kernel", "inputs x neurons", "rows", "grid", "scale", "method", "form", "workspace"), rows)]
        if self.skipped:
            text.append(table(("left as it is", "because"), list(self.skipped.items())))
        weights = sum(math.prod(line.dims) for line in self.lines)
        text.append(
            f"{len(by_path)} kernels with {weights:,} weights to quantize, {len(self.skipped)} left as they are. "
            f"Peak memory about {_size(self.memory)}; arithmetic about {self.flops:.3g} operations."
        )
        return "\n".join(text)


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
    """What `quantize` would do with `batches` batches like `batch`. Looks at shapes only and allocates nothing.

    Args:
        model, rules, variables, params, kwargs: as for `quantize`; `jax.ShapeDtypeStruct`s may stand for arrays.
        batch: one batch, or its shapes.
        batches: how many of them will be calibrated on.

    Raises:
        ValueError: whatever `quantize` would refuse without looking at values.

    Example:
        >>> print(jpfq.plan(model, batches[0], 4, variables=variables, batches=len(batches)))
    """
    analysis = analyse(adapt(model, variables, params, kwargs), as_rules(rules), shapes_of(batch))
    lines = [_line(site, analysis, batches) for site in analysis.sites]
    forward = sum(4.0 * line.rows * math.prod(line.dims) for line in lines)
    memory = _peak(analysis, lines, batches)
    return Plan(lines, analysis.assignment.skipped, memory, forward + sum(line.flops for line in lines))


def _line(site: Site, analysis: Analysis, batches: int) -> Line:
    B, n, out = site.layout.dims
    per_batch = math.prod(rows_shape(site.layout, site.data.aval.shape))
    rows = per_batch * batches
    recipe = analysis.assignment.recipes[site.path]
    forked, _ = forks(analysis.program, analysis.sites)
    networks = 2 if site.data in forked else 1
    matrices = 3 if networks == 2 else 1  # H, C, drift
    copies = max(0, math.prod(site.layout.dims[:2]) * per_batch - site.data.aval.size) > 0  # patches are copies
    block = recipe.block or n
    panel = 7 * n * out  # weights, target, values, codes, errors
    if recipe.prefers_rows(rows, n, out):
        work = B * (networks * rows * n + 3 * rows * out + panel)
        flops = 6.0 * B * rows * n * (out + block)
        return Line(site.path, (B, n, out), rows, recipe, "data", 4 * work, flops)
    gather = B * per_batch * n * (2 * networks if copies else networks - 1)  # patches, and the difference X - Xq
    feedback = 2 if recipe.method.local else 0
    work = B * (matrices * n * n + max(matrices * n * n + gather // B, feedback * n * n + panel))
    flops = B * (2.0 * matrices * rows * n * n + (4.0 if feedback else 0.0) * n * n * out)
    return Line(site.path, (B, n, out), rows, recipe, "gram", 4 * work, flops)


def _peak(analysis: Analysis, lines: Sequence[Line], batches: int) -> int:
    """The walk with sizes in place of arrays."""
    program, groups = analysis.program, stops(analysis.sites)
    _, forked_equations = forks(program, analysis.sites)
    params = sum(_bytes(v) for v in program.params)
    live = {v: _bytes(v) * batches for v in program.inputs}
    done = 0  # bytes of codes, and of quantized weights still to be used
    start, peak = 0, 0
    ends = [min(analysis.sites[i].index for i in group) for group in groups]
    for number, end in enumerate([*ends, len(program.equations)]):
        inside = 0
        for index, eqn in enumerate(program.equations[start:end], start):
            if program.is_fixed(eqn):
                continue
            for v in eqn.outvars:
                size = _bytes(v) * (2 if index in forked_equations else 1)
                inside = max(inside, _bytes(v))
                if program.last_use.get(v, -1) >= end:
                    live[v] = size * (batches if number < len(groups) else 1)  # outputs are let go batch by batch
        peak = max(peak, sum(live.values()) + 2 * inside + done)
        live = {v: size for v, size in live.items() if program.last_use.get(v, -1) >= end}
        if number < len(groups):
            peak = max(peak, sum(live.values()) + done + max(lines[i].workspace for i in groups[number]))
            done += sum(2 * _bytes(analysis.sites[i].weight) for i in groups[number])
        start = end
    return params + peak


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

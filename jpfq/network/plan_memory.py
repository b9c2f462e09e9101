"""The memory of a plan, by stage and purpose: the loops of `quantize` with sizes in place of arrays."""

import dataclasses
import functools
import math

from ..calibrate.liveness import needs
from ..calibrate.stops import group_by_input, matrix_uses
from ..matrix import code_dtype
from ..model.compat import is_literal
from ..model.sites import Tap
from .analysis import Analysis
from .plan_work import Line


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a stage, by purpose."""

    parameters: int  # the caller's own
    activations: int = 0  # of both networks, all batches
    kernels: int = 0  # computed from parameters, or dequantized, while a product needs them
    workspace: int = 0  # Grams and solves, curvature, derivatives
    codes: int = 0  # of the kernels quantized so far
    result: int = 0  # the dequantized parameters that are returned

    @property
    def total(self) -> int:
        """The sum over all purposes."""
        return sum(dataclasses.astuple(self))


def of_calibration(analysis: Analysis, forked_equations: set[int], lines: dict[int, Line], batches: int) -> Memory:
    """Memory of calibration: the loop over stops with sizes in place of arrays."""
    program, points, groups = analysis.program, analysis.points, group_by_input(analysis.points)
    ends = [min(points[i].first for i in group) for group in groups]
    solved = matrix_uses([[points[i] for i in group] for group in groups])
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
            data = points[groups[index_of_stop][0]].data
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


def of_result(analysis: Analysis, lines: dict[int, Line]) -> Memory:
    """Memory of the result: parameters, codes, and the kernels dequantized from them."""
    codes = sum(math.prod(line.dims) * code_dtype(line.recipe.grid).itemsize for line in lines.values())
    params = zip(analysis.program.paths, analysis.program.params, strict=True)
    result = sum(_bytes(v) for path, v in params if path in analysis.assignment.recipes)
    return Memory(_parameters(analysis), codes=codes + _embedded(analysis) // 4, result=result + _embedded(analysis))


def of_derivatives(analysis: Analysis) -> Memory | None:
    """Memory of the derivatives that coupling measures; None where no neurons are coupled."""
    program, curvature = analysis.program, _curvature(analysis)
    if not curvature:
        return None
    values = sum(_bytes(v) for e in program.equations if not program.is_fixed(e) for v in e.outvars)
    return Memory(_parameters(analysis), activations=2 * values, workspace=2 * curvature)


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

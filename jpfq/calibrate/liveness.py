"""Liveness: between which equations fixed values are needed, and from where on the two networks differ."""

from collections.abc import Container, Sequence
from typing import Any

from ..model.compat import is_literal
from ..model.operands import Operand
from ..model.program import Program
from ..model.sites import Site, Tap


def needs(program: Program) -> tuple[dict[int, int], dict[Any, int]]:
    """The equations on data that need each fixed value, so that it can be computed late and freed early.

    Returns:
        By index of each fixed equation that is evaluated, in order: the first equation on data that needs its value. By
        fixed variable: the last equation that needs it. Outputs count as read by the last equation.
    """
    first: dict[int, int] = {}
    span: dict = {v: (len(program.equations) - 1,) * 2 for v in program.outputs if not is_literal(v)}
    for index, eqn in reversed(list(enumerate(program.equations))):
        here = [(index, index)]
        if program.is_fixed(eqn):
            here = [span[v] for v in eqn.outvars if v in span] + here * bool(eqn.effects)
            if not here:
                continue
            if not any(v in program.broadcasts for v in eqn.outvars):
                first[index] = min(low for low, _ in here)
        for v in eqn.invars:
            if not is_literal(v) and v in program.fixed:
                every = [*here, span[v]] if v in span else here
                span[v] = min(low for low, _ in every), max(high for _, high in every)
    return dict(reversed(first.items())), {v: high for v, (_, high) in span.items()}


def forks(program: Program, sites: Sequence[Site | Operand], replaced: Container = ()) -> tuple[set, set[int]]:
    """The variables in which the networks differ, and the equations that compute them.

    They are those downstream of a quantized site, of a rounded operand, and of an equation on data that reads one of the
    variables `replaced`.
    """
    quantized, variables, equations = {site.index for site in sites}, set(), set()
    variables.update(site.data for site in sites if isinstance(site.data, Tap))
    for index, eqn in enumerate(program.equations):
        read = [v for v in eqn.invars if not is_literal(v)]
        differs = any(v in variables for v in read) or (
            replaced and not program.is_fixed(eqn) and any(v in replaced for v in read)
        )
        if index in quantized or differs:
            variables.update(eqn.outvars)
            equations.add(index)
    return variables, equations

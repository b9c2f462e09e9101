"""Stops: groups of sites that read one input, and the uses of a matrix at several stops."""

import collections
from collections.abc import Sequence

from ..model.operands import Operand
from ..model.sites import Site

SiteIndex = tuple[int, int]  # the stop of a site, and its position there


def group_by_input(sites: Sequence[Site | Operand]) -> list[list[int]]:
    """The stops, in the order of execution: for each, the indices of the sites that read its input, or of one operand."""
    groups: dict = {}
    for index, site in enumerate(sites):
        groups.setdefault(site.reads, []).append(index)
    return sorted(groups.values(), key=lambda indices: min(sites[index].first for index in indices))


def matrix_uses(stops: Sequence[Sequence[Site | Operand]]) -> dict[SiteIndex, list[SiteIndex]]:
    """The uses of each matrix in order, by the last of them: there all its inputs have been seen, so it is quantized."""
    uses = collections.defaultdict(list)
    for index, stop in enumerate(stops):
        for position, site in enumerate(stop):
            if isinstance(site, Operand):
                continue  # there is no matrix
            uses[site.shares or site.index].append((index, position))
    return {indices[-1]: indices for indices in uses.values()}

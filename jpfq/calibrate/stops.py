"""Places of sites: which share a stop, and which one matrix."""

import collections
from collections.abc import Sequence

from ..model.sites import Site

Place = tuple[int, int]  # of a site: its stop, and its position there


def stops(sites: Sequence[Site]) -> list[list[int]]:
    """Numbers of the sites that read the same input, in the order of execution."""
    groups: dict = {}
    for number, site in enumerate(sites):
        groups.setdefault(site.reads, []).append(number)
    return sorted(groups.values(), key=lambda numbers: min(sites[number].first for number in numbers))


def served(stops: Sequence[Sequence[Site]]) -> dict[Place, list[Place]]:
    """By the place where each matrix is quantized, which is the last of its uses, the places of all of them, in order."""
    uses = collections.defaultdict(list)
    for number, stop in enumerate(stops):
        for position, site in enumerate(stop):
            uses[site.shares or site.index].append((number, position))
    return {places[-1]: places for places in uses.values()}

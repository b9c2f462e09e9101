"""`Traced`: a model traced for one shape of batch, with the sites that sites.py finds in it."""

from typing import Any, NamedTuple

from .functional import Functional
from .program import Program, trace_twice
from .sites import Site, find_sites


class Traced(NamedTuple):
    """A model traced for one shape of batch."""

    program: Program
    sites: list[Site]
    reasons: dict[str, str]  # by path of every other kernel, the reason why it cannot be quantized


def find_kernels(functional: Functional, example: Any) -> Traced:
    """Traces a model and finds its kernels."""
    program = trace_twice(functional.fn, functional.paths, functional.leaves, example)
    sites, reasons = find_sites(program)
    state = {path for path, ok in zip(functional.paths, functional.trainable, strict=True) if not ok}
    sites = [site for site in sites if site.path not in state]
    return Traced(program, sites, {path: reason for path, reason in reasons.items() if path not in state})

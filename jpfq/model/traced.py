"""`Traced`: a model traced for one shape of batch, with the sites and the embeddings that are found in it."""

from typing import Any, NamedTuple

from .embeddings import Embedding, find_all
from .functional import Functional
from .program import Program, trace_twice
from .sites import Site


class Traced(NamedTuple):
    """A model traced for one shape of batch."""

    program: Program
    sites: list[Site]
    reasons: dict[str, str]  # by path of every other kernel, the reason why it is none of them
    embeddings: list[Embedding]  # some of these


def find_kernels(functional: Functional, example: Any) -> Traced:
    """Traces a model and finds its kernels and embeddings."""
    program = trace_twice(functional.fn, functional.paths, functional.leaves, example)
    sites, reasons, embeddings = find_all(program)
    state = {path for path, ok in zip(functional.paths, functional.trainable, strict=True) if not ok}
    sites = [site for site in sites if site.path not in state]
    reasons = {path: reason for path, reason in reasons.items() if path not in state}
    return Traced(program, sites, reasons, [embedding for embedding in embeddings if embedding.path not in state])

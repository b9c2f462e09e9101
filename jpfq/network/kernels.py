"""The kernels of a model, for the shapes of its batches."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from .batches import Shaped
from .functional import Functional
from .program import Program, trace_twice
from .sites import Site, find_sites


class Traced(NamedTuple):
    """A model traced on one shape of batch."""

    program: Program
    sites: list[Site]
    reasons: dict[str, str]  # by path of every other kernel, why it cannot be quantized


def find_kernels(functional: Functional, example: Any) -> Traced:
    """Traces a model and finds its kernels."""
    program = trace_twice(functional.fn, functional.paths, functional.leaves, example)
    sites, reasons = find_sites(program)
    state = {path for path, ok in zip(functional.paths, functional.trainable, strict=True) if not ok}
    sites = [site for site in sites if site.path not in state]
    return Traced(program, sites, {path: reason for path, reason in reasons.items() if path not in state})


def find_all_kernels(functional: Functional, shaped: Sequence[Shaped]) -> list[Traced]:
    """Traces a model on each shape of batch.

    Raises:
        ValueError: it runs on the first and not on another.
    """
    shapes = lambda group: ", ".join(str(x.shape) for x in group.leaves[0])
    first, *others = shaped
    traced = [find_kernels(functional, first.example)]
    for group in others:
        try:
            traced.append(find_kernels(functional, group.example))
        except Exception as error:
            raise ValueError(
                f"The model runs on the first batch, of shapes {shapes(first)}, but not on one of shapes {shapes(group)}: "
                f"{error}"
            ) from error
    return traced

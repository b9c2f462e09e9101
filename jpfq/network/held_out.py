"""The error of the outputs on batches held out: the two networks run once more, where nothing is chosen."""

import dataclasses
import functools
import operator
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax

from ..calibrate.activation import ActivationQuantizer
from ..calibrate.batches import Shaped, read_batches, shapes_of
from ..calibrate.output_error import Comparison, OutputError
from ..calibrate.stops import group_by_input
from ..calibrate.stream import Stream, StreamOptions
from ..model.functional import Functional, check_values
from ..model.sites import Site
from .analysis import Analysis, analyse_all, find_all_kernels
from .embeddings import put
from .rules import Rule


class HeldOut(NamedTuple):
    """Batches that are kept for the end, and the model traced for each of their shapes."""

    analyses: list[Analysis]
    shaped: list[Shaped]


def read_held_out(
    functional: Functional, batches: Iterable, example: Any, rules: Sequence[Rule], calibrated: Analysis, offload: bool
) -> HeldOut:
    """Reads and checks batches that are held out. `example` has the shapes of a batch that is calibrated on.

    Raises:
        ValueError: they cannot be read, differ from the example in more than sizes, or the model does not run on them.
    """
    form = lambda batch: (jax.tree.structure(batch), [(x.ndim, x.dtype) for x in jax.tree.leaves(batch)])
    try:
        shaped = read_batches(batches, on_host=offload)
        values = ((f"an input of shape {x.shape}", x) for g in shaped for leaves in g.leaves for x in leaves)
        check_values(values, "Quantizing")
        if form(shaped[0].example) != form(example):
            raise ValueError(
                f"these batches have the form {shapes_of(shaped[0].example)}; those before have {example}."
            )
        analyses = analyse_all(functional, find_all_kernels(functional, shaped), rules, False)
    except Exception as error:  # of the model, too
        raise ValueError(f"held_out: {error}") from error
    paths = [[point.path for point in analysis.points] for analysis in (calibrated, *analyses)]
    if any(own != paths[0] for own in paths):
        raise ValueError(
            "held_out: the model uses other kernels or products for these batches than for those it is calibrated on."
        )
    return HeldOut(analyses, shaped)


def held_out_error(
    functional: Functional,
    held: HeldOut,
    quantized: Sequence,
    inputs: dict[str, list[ActivationQuantizer]],
    options: StreamOptions,
) -> OutputError:
    """The error of the outputs of the network with `quantized` leaves, as that on the calibration batches is measured."""
    found = []
    for analysis, shaped in zip(held.analyses, held.shaped, strict=True):
        stops = [[analysis.points[i] for i in group] for group in group_by_input(analysis.points)]
        own = dataclasses.replace(options, replaced=analysis.replaced)
        stream = Stream(analysis.program, functional.leaves, shaped.leaves, shaped.weights, stops, options=own)
        put(stream, analysis, {embedding.path: quantized[embedding.leaf] for embedding in analysis.embeddings})
        for index, stop in enumerate(stops):
            stream.advance(index)
            if stop[0].activations is not None:
                stream.round_inputs(stop[0].data, 0, _rounding(inputs[stop[0].path][stop[0].use]))
            for site in (point for point in stop if isinstance(point, Site)):
                stream.replace(site.weight, site.chain(quantized[site.leaf]))
                if site.bias is not None:
                    stream.replace(site.bias.operand, site.bias.chain(quantized[site.bias.leaf]))
        for exact, (own,), weights in stream.finish():
            found.append(Comparison.of(exact, own, (), weights))
    return functools.reduce(operator.add, found).error.overall


def _rounding(quantizer: ActivationQuantizer) -> Any:
    return functools.partial(_rounded, quantizer)


@jax.jit
def _rounded(quantizer, x):
    return quantizer(x)

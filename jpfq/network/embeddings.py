"""Embeddings of a model that rules name: quantized before its layers, and put into the streams that begin with them."""

from collections.abc import Mapping, Sequence

import jax

from ..calibrate.batches import Shaped
from ..calibrate.embeddings import Quantizations, quantize_embeddings
from ..calibrate.progress import Reporter
from ..calibrate.stops import group_by_input
from ..calibrate.stream import Stream, StreamOptions
from ..matrix import Devices
from ..model.embeddings import Embedding
from ..model.functional import Functional
from .analysis import Analysis


def begin(
    functional: Functional,
    analyses: Sequence[Analysis],
    shaped: Sequence[Shaped],
    streams: Sequence[Stream],
    key: jax.Array | None,
    reporter: Reporter,
    devices: Devices | None,
) -> Quantizations:
    """Quantizes the embeddings, and puts them into streams that are at their beginning."""
    first = analyses[0]
    own = StreamOptions(streams[0].options.offload)

    def at_products(embedding):
        number = first.embeddings.index(embedding)
        made = []
        for analysis, group in zip(analyses, shaped, strict=True):
            sites = analysis.embeddings[number].products
            stops = [[sites[i] for i in stop] for stop in group_by_input(sites)]
            made.append(Stream(analysis.source, functional.leaves, group.leaves, group.weights, stops, options=own))
        return made

    recipes = first.assignment.embeddings
    found = quantize_embeddings(first.embeddings, recipes, functional.leaves, at_products, key, reporter, devices)
    values = {path: tensor.dequantize() for path, (tensor, _) in found.items()}
    for stream, analysis in zip(streams, analyses, strict=True):
        put(stream, analysis, values)
    return found


def at_products(analysis: Analysis, embedding: Embedding) -> Analysis:
    """The products of an embedding as sites, as the pass before calibration meets them."""
    assignment = analysis.assignment._replace(recipes=analysis.assignment.embeddings, rules={})
    return Analysis(analysis.source, list(embedding.products), assignment, [], analysis.source)


def put(stream: Stream, analysis: Analysis, values: Mapping[str, jax.Array]) -> None:
    """Puts embeddings, by path, into the quantized network of a stream."""
    for embedding in analysis.embeddings:
        for variable, value in embedding.values(values[embedding.path]):
            stream.replace(variable, value)

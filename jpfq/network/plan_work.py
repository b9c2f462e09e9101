"""The work for each matrix of a plan: rows, bytes and arithmetic, from shapes alone."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax

from ..calibrate.batch_gram import at_once
from ..calibrate.embeddings import by_rows
from ..calibrate.gather import rows_shape
from ..matrix import Natural, Recipe, slice_width
from ..matrix.arrays import HALVES
from ..matrix.conv_gram import at_a_time, copies, correlates, pays
from ..matrix.layout import ConvLayout, Layout
from ..matrix.patches import DEFAULT
from ..model.operands import Operand
from ..model.sites import Site
from .analysis import Analysis
from .embeddings import at_products


@dataclasses.dataclass(frozen=True)
class Line:
    """The plan for the matrices of one product."""

    path: str
    dims: tuple[int, int, int]  # matrices, inputs, neurons
    rows: int  # calibration rows of all its uses together
    recipe: Recipe
    form: str
    workspace: int  # bytes for its data and its solve, beside live values
    flops: float  # for its Gram (or data form) and its recursion
    uses: int = 1  # number of products that share it
    inputs: Any = None  # `Activations`, if its inputs are quantized
    conv: bool = False


def lines_of(analysis: Analysis, forked: set, batches: int) -> dict[int, Line]:
    """The plan for each matrix, by its first product. `forked` has the variables in which the networks differ."""
    uses: dict[int, list[Site]] = {}
    for site in analysis.sites:
        uses.setdefault(site.first, []).append(site)
    return {first: _line(sites, forked, analysis, batches) for first, sites in uses.items()}


def embedding_lines(analysis: Analysis, batches: int) -> dict[str, Line]:
    """The plan for each embedding, by path. One that no product uses has no data but its rows."""
    found = {}
    for embedding in analysis.embeddings:
        if embedding.products:
            own = at_products(analysis, embedding)
            found[embedding.path] = _line(own.sites, set(), own, batches)
            continue
        recipe = by_rows(analysis.assignment.embeddings[embedding.path])
        B, n, out = embedding.layout.dims
        width = slice_width((B, n, out), recipe)
        passes = 0 if recipe.finish is None else recipe.finish.passes
        flops = 2.0 * ((2 if recipe.scale.runs > 1 else 1) * recipe.scale.runs + 4 * passes + 4) * n * n * out
        found[embedding.path] = Line(
            embedding.path, (B, n, out), 0, recipe, "rows", 4 * (16 * n * width + 3 * n * out), flops
        )
    return found


def forward_flops(site: Site | Operand, batches: int) -> float:
    """The arithmetic of a product in both networks; 0 for one without a weight, which calibration does not repeat."""
    if isinstance(site, Operand):
        return 0.0
    return 4.0 * batches * math.prod(rows_shape(site.layout, site.data.aval.shape)) * math.prod(site.layout.dims)


def _line(uses: Sequence[Site], forked: set, analysis: Analysis, batches: int) -> Line:
    """Memory and arithmetic for one matrix. Numbers of temporaries are those that XLA reports for compiled functions."""
    path, dims, count = uses[0].path, uses[0].layout.dims, len(uses)
    kind = uses[0].activations, isinstance(uses[0].layout, ConvLayout)
    uses = list({site.reads: site for site in uses}.values())  # uses with the same input have one Gram
    B, n, out = dims
    layouts = [(site.patches or DEFAULT).layout(site.layout) for site in uses]
    picked = [_picked(site, layout, batches) for site, layout in zip(uses, layouts, strict=True)]
    shapes = [site.data.aval.shape for site in uses]
    windows = map(rows_shape, layouts, shapes)
    counts = [math.prod(rows) if drawn is None else drawn for drawn, rows in zip(picked, windows, strict=True)]
    rows = sum(counts) * batches
    recipe = analysis.assignment.recipes[path]
    networks = 2 if any(site.data in forked for site in uses) else 1
    if recipe.prefers_rows(rows, n, out):
        work = B * (2 * networks * rows * n + 3 * rows * out + 6 * n * out)
        flops = 6.0 * B * rows * n * (out + (recipe.block or n))
        return Line(path, dims, rows, recipe, "data", 4 * work, flops, count, *kind)
    matrices = 3 if networks == 2 else 1  # H, C, drift
    passes = 0 if recipe.finish is None else recipe.finish.passes
    bare = recipe.method.local and isinstance(recipe.order, Natural) and networks == 1
    squares, columns = (7, 16) if passes else (2 if bare else 4, 12)
    whole = [drawn is None and pays(layout, rows) for drawn, layout in zip(picked, layouts, strict=True)]
    grams = [_gram(*of, networks) for of in zip(layouts, shapes, counts, whole, strict=True)]
    multiplied, held = sum(gram[0] for gram in grams), max(gram[1] for gram in grams)
    gather = held + (1 + len(uses)) * matrices * n * n
    width = slice_width(dims, recipe)
    solve = (matrices + squares) * n * n + columns * n * width + (3 * n * out if width < out else 0)
    runs = recipe.scale.runs
    products = (2 if runs > 1 else 1) * runs + 4 * passes + 4  # a search of steps measures each of its runs
    flops = 2.0 * B * (multiplied * batches + products * n * n * out)
    return Line(path, dims, rows, recipe, "gram", 4 * B * max(gather, solve), flops, count, *kind)


def _picked(site: Site, layout: Layout, batches: int) -> int | None:
    """The number of rows selected from a batch; None if all are taken."""
    patches = site.patches or DEFAULT
    windows = rows_shape(layout, site.data.aval.shape)
    total = batches * math.prod(windows)
    drawn = jax.eval_shape(lambda: patches.pick(layout, windows, jax.random.key(0), total))
    return None if drawn is None else drawn.size


def _gram(layout: Layout, shape: tuple[int, ...], rows: int, whole: bool, networks: int) -> tuple[float, int]:
    """The cost of the Gram of one batch and one matrix: multiplications, and elements in memory at once.

    whole: whether all rows are taken, and enough of them for correlations to pay. With row weights or several devices,
    which are not known here, correlations are not used.
    """
    B, n, _ = layout.dims
    if whole and isinstance(layout, ConvLayout) and correlates(layout, shape):
        channels, samples = n // math.prod(layout.window), shape[layout.data_spec[0]]
        size = math.prod(shape) // samples
        together = min(samples, at_a_time(layout, size, networks, at_once()))
        elements = copies(layout, networks) * size // B  # of one sample; in memory twice, as pieces and joined
        return networks**2 * copies(layout, 1) * channels * size * samples // B, 2 * elements * together
    patches = 3 if B * rows * n > math.prod(shape) else 0  # copies of the inputs of a convolution
    together = min(rows * n, at_once() // B) if patches else rows * n
    symmetric = 0.75 if n >= HALVES else 1
    matrices = 2 * symmetric + 1 if networks == 2 else symmetric
    return matrices * rows * n * n, together * (patches * networks + networks - 1)

"""A budget of bits: a width for each kernel, for the least error of the network's outputs at a given average width.

The cost of b bits for a kernel is the error at the layer's own output, with each neuron weighted by its influence on the
outputs of the network. Errors come from Grams of the float network and influences from one backward pass with random signs,
so that no network is run per candidate.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..calibrate.batches import naming, read_batches
from ..calibrate.curvature import derivatives, signs, weigh
from ..calibrate.gather import Gather
from ..calibrate.progress import progress_of
from ..calibrate.row_weights import of_outputs
from ..calibrate.stops import group_by_input, matrix_uses
from ..calibrate.stream import Stream
from ..matrix import Gram, solve_all
from ..matrix.explicit_mesh import context
from ..matrix.lanes import each
from ..model.adapters import adapt
from ..model.functional import check_values
from ..model.mesh import on_auto_axes
from ..model.program import Program
from ..model.random_keys import typed
from ..model.sites import Site
from ..scalar import Codes, MinMSE, Nearest, grid_of_bits
from ..scalar.exponent import exponent_of, reduced
from .analysis import analyse, check_key
from .plan import steps_of
from .rules import Rule


def budget(
    model: Any,
    batches: Iterable,
    average_bits: float,
    *,
    candidates: Sequence[int] = (2, 3, 4, 5, 6, 8),
    rule: Rule | None = None,
    variables: Any = None,
    params: Any = None,
    kwargs: dict | None = None,
    key: jax.Array | None = None,
    progress: bool | None = None,
) -> list[Rule]:
    """Chooses a width for each kernel, with at most `average_bits` per weight on average, and returns rules for it.

    Args:
        model, batches, variables, params, kwargs, progress: the same as for `jpfq.quantize`.
        average_bits: the largest mean width of the codes over all quantized weights; steps are not counted.
        candidates: widths to choose from.
        rule: the settings of all kernels apart from their width; None for the recommended ones.
        key: for the random signs; None for fixed ones.

    Returns:
        One rule per kernel, in the order of the model, to print, edit and pass to `jpfq.quantize`; and one for `products`
        and `cache` of the given rule, if it has them.

    Raises:
        ValueError: no candidate fits the average, or `jpfq.quantize` would raise.

    Examples:
        >>> rules = jpfq.budget(model, batches, 3.5, variables=variables)
        >>> quantized = jpfq.quantize(model, batches, rules, variables=variables)
    """
    widths = sorted(set(candidates))
    if len(widths) < 2 or not widths[0] <= average_bits <= widths[-1]:
        raise ValueError(
            "average_bits must lie between the smallest and the largest of at least two candidates; got "
            f"{average_bits} and candidates {list(candidates)}."
        )
    rule = rule or Rule(".*", bits=widths[0])
    if rule.grid is not None:
        raise ValueError(
            f"budget chooses bits, so its rule has bits=.., which it replaces, and no grid; got {rule.grid}."
        )
    functional = on_auto_axes(adapt(model, variables, params, kwargs))
    check_values(zip(functional.paths, functional.leaves, strict=True), "budget")
    with context(functional.leaves):
        return _budget(functional, batches, average_bits, widths, rule, key, progress)


def _budget(functional, batches, average_bits, widths, rule, key, progress):
    (shaped, *others) = read_batches(batches)
    if others:
        raise ValueError("budget takes batches of one shape: drop a smaller last batch.")
    about = {name: getattr(rule, name) for name in ("products", "cache") if getattr(rule, name) is not None}
    operands = [Rule(rule.pattern, **about)] if about else []  # weights alone are measured
    rule = dataclasses.replace(rule, products=None, cache=None)
    analysis = analyse(functional, [rule], shaped.example)
    if analysis.embeddings:
        raise ValueError(
            f"budget chooses bits of kernels, and the rule names {analysis.embeddings[0].path}, an embedding."
        )
    check_key(analysis.assignment, key)
    program, sites = analysis.program, analysis.sites
    counted = of_outputs(program, functional.leaves, shaped.leaves[:1], shaped.weights[:1])[0]
    draw = jax.random.key(0) if key is None else key
    weights = _influence(program, functional.leaves, shaped.leaves[0], sites, draw, counted)
    groups = group_by_input(sites)
    stream = Stream(
        program, functional.leaves, shaped.leaves, shaped.weights, [[sites[i] for i in stop] for stop in groups]
    )
    paths = list(dict.fromkeys(site.path for site in sites))
    sizes = dict.fromkeys(paths, 0)
    costs = {path: np.zeros(len(widths)) for path in paths}
    uses = matrix_uses(stream.stops)
    steps = lambda: [step for stop in steps_of([analysis], [len(shaped.leaves)]) for step in stop]
    with progress_of(steps, progress) as reporter:
        for index, group in enumerate(groups):
            reporter.doing("gathering")
            stream.advance(index)
            gather = functools.cache(lambda stop: Gather([stream], stop, typed(key)))
            for position, i in enumerate(group):
                if (index, position) not in uses:
                    continue  # a shared matrix waits for its last use
                reporter.doing("gathering")
                site, recipe = sites[i], analysis.assignment.recipes[sites[i].path]
                W = site.matrices(stream.value(program.params[site.leaf]))
                plain = dataclasses.replace(recipe, scale=MinMSE(), finish=None, rounding=Nearest(), form="gram")
                with naming([shaped.finite]):
                    grams: dict[Any, Any] = {use: gather(use[0]).of(Gram).data for use in uses[index, position]}
                gram = functools.reduce(Gram.merge, grams.values())
                sizes[site.path] += W.size
                reporter.doing("solving")
                for j, bits in enumerate(widths):
                    q = solve_all(W, gram, dataclasses.replace(plain, grid=Codes.of(grid_of_bits(bits))), None).q
                    for (stop, where), own in grams.items():
                        influence = weights[stream.stops[stop][where].index]
                        most = float(influence.max()) or 1.0
                        cost, k = _cost(own, W, q, jnp.asarray(influence / most, W.dtype))
                        costs[site.path][j] += math.ldexp(most * float(cost), 2 * int(k))
                reporter.done()
    if wrong := [path for path in paths if not np.isfinite(costs[path]).all()]:
        raise ValueError(f"The calibration data of {wrong[0]} overflow: its Gram is not finite. Scale the inputs down.")
    chosen = allocate(np.stack([costs[p] for p in paths]), [sizes[p] for p in paths], widths, average_bits)
    rule_of = functools.partial(dataclasses.replace, rule, grid=None)
    rules = [rule_of(pattern=re.escape(path), bits=widths[j]) for path, j in zip(paths, chosen, strict=True)]
    return rules + operands


def allocate(costs: np.ndarray, sizes: Sequence[int], widths: Sequence[int], average: float) -> list[int]:
    """Chooses the width of each kernel greedily, spending bits where they lower the cost most.

    Args:
        costs: (kernels, widths). Steps are taken along their convex hull: one that saves less than the next joins it.
        sizes: the number of weights of each kernel.
        widths: ascending.
        average: the largest mean number of bits per weight.
    """
    choice = [0] * len(sizes)
    left = average * sum(sizes) - widths[0] * sum(sizes)
    while True:
        best, saved = None, 0.0
        for i, (size, now) in enumerate(zip(sizes, choice, strict=True)):
            for j in range(now + 1, len(widths)):
                price = size * (widths[j] - widths[now])
                gain = (costs[i, now] - costs[i, j]) / price
                if price <= left + 1e-9 and gain > saved:
                    best, saved = (i, j, price), gain
        if best is None:
            return choice
        i, j, price = best
        choice[i] = j
        left -= price


def _influence(program: Program, leaves, batch, sites: Sequence[Site], key, counted) -> dict[int, np.ndarray]:
    """The mean square derivative of the outputs by each neuron's output (B, out) in float64, by index of the product.

    `counted` has the weights of the outputs. Rows of a product that reach no counted output add nothing, in all layers.
    """

    @jax.jit
    def influence(leaves, batch, key, counted):
        found = derivatives(program, leaves, batch, sites, lambda outputs: weigh(signs(key, outputs), counted))
        units = {index: exponent_of(jnp.max(jnp.abs(g))) for index, g in found.items()}
        return {index: (jnp.mean(reduced(g, units[index]) ** 2, 0), units[index]) for index, g in found.items()}

    found = jax.device_get(influence(list(leaves), list(batch), key, counted))
    return {index: np.ldexp(square.astype(np.float64), 2 * k) for index, (square, k) in found.items()}


@jax.jit
def _cost(gram: Gram, W, q, weights):
    """The cost of q in units of 4^k, and k."""
    magnitude = jnp.max(each(lambda gram: gram.magnitude, gram))
    own = exponent_of(jnp.max(jnp.abs(W)), magnitude)
    return jnp.sum(each(Gram.square_error, gram, reduced(W, own), reduced(q, own)) * weights), own - gram.power

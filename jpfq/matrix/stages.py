"""The stages of one solve, in one compiled program:

    rotation, order, shrinkage, prepare -> scale -> method -> recursion (for each multiple of the steps, where the scale
    searches) -> finish -> error metrics

for several matrices with data of their own (the feature groups of a convolution, experts). Calibration calls it at each
site.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..scalar import Bounded, Codes, ScaledGrid, WorstCase
from ..scalar.exponent import exponent_of, reduced
from ..scalar.step_types import StepStorage
from .bounds import resolution, rounding, square_bound, target
from .gram import Gram, Rows, as_gram, mean_energy
from .lanes import each
from .metrics import Squares
from .neurons import ALL, Neurons
from .pathfollow import follow
from .qtensor import Info, entropy
from .recipe import Recipe
from .recursion import Path, Recursion, substitute
from .split import infinite


class Solution(NamedTuple):
    """The result for B matrices of one kernel."""

    codes: jax.Array  # (B, in, out) integers, as floats
    q: jax.Array  # (B, in, out) their values, rotated back
    step: jax.Array  # (B, groups, out), or (1, 1, 1) where all share one
    zero: jax.Array
    info: Info


def solve_all(
    W: jax.Array,
    data: Gram | Rows,
    recipe: Recipe,
    key: jax.Array | None,
    count: jax.Array | None = None,
    first: jax.Array | None = None,
) -> Solution:
    """Quantizes B matrices W (B, in, out), with a leading axis of B on every array of `data`.

    A scale per tensor is shared by all B, unless a search or a finish moves it. The key is folded with the indices of
    matrix, neuron and input coordinate. One program serves all grids. `count` is the number of neurons where W is padded
    (buckets.py), and `first` the index of its first neuron where W holds a run of them (slices.py).
    """
    return _solve_all(W, data, dataclasses.replace(recipe, grid=Codes.of(recipe.grid)), key, count, first)


class _Prepared(NamedTuple):
    """The state of one matrix, permuted into visiting order."""

    order: jax.Array
    W: jax.Array  # the float weights, and their data: all metrics are about these
    data: Any
    trusted: Any  # the data after shrinkage, by which codes and steps are chosen
    ready_W: jax.Array  # weights and data as prepared for the recursion
    ready_data: Any
    dead: jax.Array  # the number of coordinates that are 0 on all rows, before any rotation


@jax.jit
def _solve_all(W, data, recipe, key, count=None, first=None):
    return stages(W, data, recipe, key, Neurons(count, first))


def stages(W: jax.Array, data: Gram | Rows, recipe: Recipe, key: jax.Array | None, neurons: Neurons = ALL) -> Solution:
    """All stages on the neurons W (B, in, out), which may be some of the matrix's; metrics are over all of them."""
    B, n, out = W.shape
    jobs = each(lambda W, data: _prepare(W, data, recipe), W, data)
    ready, importance = each(
        lambda job: (_unpermuted(job.ready_W, job.order), _unpermuted(job.data.diagonal, job.order)), jobs
    )
    levels = _lay(ready, importance, recipe, neurons)
    store = StepStorage.over(levels.step, recipe.step_dtype, recipe.grid.alphabet().reach, neurons.max)
    beyond, levels = store.exceeds(levels.step), store.levels(levels)
    shared = recipe.scale.shared
    split = lambda x: x[None] if shared else jnp.moveaxis(x.reshape(x.shape[0], B, out), 1, 0)
    step, zero, beyond = (
        jnp.broadcast_to(x, (B, *x.shape[1:])) for x in map(split, (levels.step, levels.zero, beyond))
    )

    magnitude = each(lambda job: job.data.magnitude, jobs)
    k = exponent_of(neurons.max(jnp.abs(jobs.W)), jnp.max(magnitude))

    def one(job, weights, step, zero, beyond, b):
        draw = None if key is None else jax.random.fold_in(key, b)
        recursion = Recursion(levels.with_steps(step, zero), job.order, out, recipe.rounding, draw)
        recursion = recursion._replace(neurons=neurons, stored=store.levels)
        *found, metrics, ends = _quantize(job, weights, recursion, recipe, lambda x, sign=1: reduced(x, sign * k))
        metrics["saturated_steps"] = jnp.sum(beyond) if shared else neurons.sum(beyond)
        return *found, metrics, ends

    codes, q, step, zero, parts, ends = each(one, jobs, ready, step, zero, beyond, jnp.arange(B))
    reach = WorstCase(recipe.rounding.sums, ends) if isinstance(recipe.rounding, Bounded) else None
    if shared and not recipe.moves_step:
        step, zero = step[:1], zero[:1]
    sums = {name: x.sum() for name, x in parts.items()}
    real = None if data.inputs is None else each(lambda gram: gram.real[:, None], data)
    rows = jnp.asarray(B * n if real is None else real.sum(), W.dtype)
    weights = rows * jnp.asarray(neurons.real(out), W.dtype)
    for name in ("saturation", "sparsity"):
        sums[name] = parts[name].astype(W.dtype).sum() / weights
    sums["energy"] = jnp.where(jnp.isnan(magnitude).any(), jnp.nan, sums["energy"])
    info = Info(**sums, entropy=entropy(codes, neurons, real), exponent=k - data.power, reach=reach)
    return Solution(codes, q, step, zero, info)


def _lay(W, importance, recipe, neurons) -> ScaledGrid:
    """The levels of the matrices W (B, in, out) side by side: step and zero (groups, B out), or (1, 1)."""
    if not recipe.scale.local:
        W = neurons.whole(W)
    B, n, out = W.shape
    flat = lambda x: jnp.moveaxis(x, 0, 1).reshape(n, B * out)
    levels = recipe.scale(flat(W), recipe.grid, flat(jnp.broadcast_to(importance[..., None], W.shape)))
    if recipe.scale.local or recipe.scale.shared:
        return levels
    each_own = lambda x: jnp.repeat(x, B * out // x.shape[1], axis=1)  # neurons of a block have equal steps here
    own = lambda x: neurons.own(each_own(x).reshape(-1, B, out)).reshape(x.shape[0], -1)
    return dataclasses.replace(levels, step=own(levels.step), zero=own(levels.zero))


def _prepare(W, data, recipe) -> _Prepared:
    trusted, dead = data, jnp.sum(data.unseen)
    if recipe.rotation is not None:
        W, data, trusted = recipe.rotation.rotate(W), recipe.rotation.gram(data), recipe.rotation.gram(data.awake())
    p = recipe.order(trusted)
    if p is not None:
        W, data, trusted = W[p], data.permute(p), trusted.permute(p)
    trusted = trusted if recipe.shrinkage is None else recipe.shrinkage(trusted)
    ready = W, trusted
    for part in recipe.prepare:
        if not part.needs_levels:
            ready = part(*ready, None)
    ready_W, ready_data = ready
    return _Prepared(jnp.arange(W.shape[0]) if p is None else p, W, data, trusted, ready_W, ready_data, dead)


def _quantize(job: _Prepared, weights, recursion: Recursion, recipe: Recipe, reduce):
    """Codes, values, steps and metrics of one matrix; `weights` are the prepared ones in their original order.

    `reduce` divides values by a power of two, so that their squares neither overflow nor underflow.
    """
    W, data, neurons = job.ready_W, job.ready_data, recursion.neurons
    for part in recipe.prepare:
        if part.needs_levels:
            W, data = part(W, data, recursion.spread())
    carry, inputs_of = recipe.rounding.init_all(W, job.order)
    recursion = recursion._replace(carry=carry)
    system = None
    if isinstance(data, Rows) and not recipe.needs_gram:
        inputs = inputs_of(recursion.spread())
        path, _ = follow(W, data, recipe.method, recursion, block=recipe.block, inputs=inputs)
    else:
        system = recipe.method(W, as_gram(data))
        path, recursion = _run(system, job, recursion, recipe, inputs_of, reduce)
    known = None if path.arguments is None else recipe.method
    squares = Squares.of(job.data, reduce(job.W), neurons, known)
    floor, bound, failed = jnp.nan, jnp.nan, 0
    if system is not None:
        exact = recipe.prepare == () and isinstance(job.data, Gram) and job.data.C is None  # then W0 is W
        floor, vague = 0.0, 0.0
        if not exact:
            W0 = reduce(target(system))
            floor, rest = squares.error(W0, W0)  # on an infinitely fine grid the codes are the arguments
            vague = neurons.sum(rounding(job.data, squares.W, W0)) + rest
            if job.data.inputs is not None:  # C may be there only because others in the bucket have it
                floor, vague = (jnp.where((job.data.C == 0).all(), 0, x) for x in (floor, vague))
        if system.cost is not None:
            most = reduce(recipe.rounding.error(recursion.spread()))
            bound = (jnp.sqrt(floor + vague) + jnp.sqrt(neurons.sum(square_bound(system.cost, most)))) ** 2
        failed = neurons.sum(~jnp.isfinite(system.base))
        failed += 0 if system.L is None else infinite(system.L)
    codes, levels, stored = path.codes, recursion.levels, recursion.stored
    small, large = (lambda levels: levels.scaled(reduce)), (lambda levels: levels.scaled(lambda x: reduce(x, -1)))
    if recipe.finish is not None:
        after = recursion._replace(rounding=recipe.rounding.for_finish, carry=None, refit=None)
        run = after._replace(levels=small(levels), stored=lambda levels: small(stored(large(levels))))
        codes, levels = recipe.finish(reduce(job.W), as_gram(job.trusted), codes, run, recipe.block)
        levels = large(levels)
        if recipe.finish.frees_step:
            last = after if recipe.finish.descends else recursion._replace(carry=None, refit=None)
            codes = _rounded_dead(job, codes, last._replace(levels=levels))
    recursion = recursion._replace(levels=levels)
    q = recursion.values(codes)
    bounded = recipe.rounding
    ends = bounded.reach(codes, recursion.spread(), job.order) if isinstance(bounded, Bounded) else None

    groups = levels.step.shape[0]
    nonzero = jnp.any(weights.reshape(groups, -1, weights.shape[1]) != 0, axis=1)
    as_number = lambda x: jnp.asarray(x, W.dtype)
    counted = lambda x: neurons.sum(x if job.data.inputs is None else x & job.data.real[:, None])
    made, none = reduce(q), jnp.zeros_like(q)
    error, rest = squares.error(made, None if path.arguments is None else reduce(path.arguments))
    of_error, of_energy = (neurons.sum(rounding(job.data, squares.W, x)) for x in (made, none))
    vague = resolution(error, squares.energy, of_error + rest, of_energy)
    metrics = {
        "square_error": error,
        "energy": squares.energy,
        "saturation": counted(path.saturated),
        "dead": job.dead,
        "sparsity": counted(q == 0),
        "zero_steps": neurons.sum((levels.step == 0) & nonzero),
        "square_floor": as_number(floor),
        "square_bound": jnp.where(error > bound + vague, jnp.nan, as_number(bound + 2 * vague)),
        "square_rounding": vague,
        "failed": jnp.asarray(failed),
    }
    codes, q = _unpermuted(codes, job.order), _unpermuted(q, job.order)
    if recipe.rotation is not None:
        q = recipe.rotation.unrotate(q)
    return codes, q, levels.step, levels.zero, metrics, ends


def _run(system, job, recursion, recipe, inputs_of, reduce) -> tuple[Path, Recursion]:
    """The path of the recursion, and the recursion with the levels that it ended on."""
    block = recipe.block
    if recipe.refits and system.L is not None:
        given, block = recursion, recipe.refits
        recursion = given._replace(refit=lambda W: given.stored(recipe.scale(W, recipe.grid)))

    def run(recursion):
        inputs = () if recursion.refit else inputs_of(recursion.spread())
        path = substitute(system.base, system.L, recursion, block=block, about=system.about, inputs=inputs)
        return path._replace(shift=None, arguments=path.arguments if path.shift is None else None)

    multiples = recipe.scale.multiples(system.base.dtype)
    if multiples is None:
        path = run(recursion._replace(keeps=recipe.untouched and recipe.method.below is not None))
        return path, recursion if path.refit is None else recursion._replace(levels=path.refit)

    least, rounds = multiples
    levels, shared = recursion.levels, recursion.shared
    trusted = as_gram(job.trusted)
    blind = (mean_energy(trusted.diagonal) == 0).astype(system.base.dtype)  # without data, weights decide between steps
    at = lambda c: levels.scaled(lambda x: x * jnp.atleast_2d(c))
    scaled = lambda c: recursion._replace(levels=recursion.stored(at(c)))

    def attempt(state, x):
        (best_error, best_c, best_path), centre = state
        offset, new_round = x
        centre = jnp.where(new_round, best_c, centre)
        c = jnp.maximum(centre + offset, least / 2)  # a step stays positive
        path = run(scaled(c))
        both = reduce(job.W), reduce(path.q)
        error = trusted.excess(*both) + blind * jnp.sum((both[0] - both[1]) ** 2, 0)
        error = recursion.neurons.sum(error) if shared else error
        better, found = error < best_error, (error, c, path)
        keep = lambda new, old: jnp.where(better[None] if new.ndim == 2 and better.ndim else better, new, old)
        return (jax.tree.map(keep, found, (best_error, best_c, best_path)), centre), None

    blank, c = jnp.zeros_like(system.base), jnp.full(1 if shared else recursion.out, least, system.base.dtype)
    start = jnp.full(() if shared else c.shape, jnp.inf, c.dtype), c, Path(blank, blank, blank > 0)
    first = jnp.concatenate([jnp.arange(x.size) == 0 for x in rounds])
    ((_, c, path), _), _ = lax.scan(attempt, (start, c), (jnp.concatenate(rounds), first))
    return path, scaled(c)


def _rounded_dead(job, codes, recursion):
    """The codes with those of dead weights rounded again, because the steps have changed."""
    live = job.data.diagonal[:, None] > 0
    if not isinstance(recursion.rounding, Bounded):
        return jnp.where(live, codes, recursion.alone(job.W))
    after = recursion.rounding.for_finish
    if after is None:
        return codes  # those that keep the bound
    run, inputs = recursion._replace(rounding=after, key=None).again(codes)
    return substitute(jnp.where(live, recursion.values(codes), job.W), None, run, inputs=inputs).codes


def _unpermuted(x, order):
    """Coordinates in visiting order put back in their original order."""
    return jnp.zeros_like(x).at[order].set(x)

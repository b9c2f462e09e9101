"""Neurons that compensate for each other's errors.

To second order, an error E = W - q (in, out) of a layer changes the network's loss by tr(F E^T H E), where F is the
mean of g g^T over rows, g the derivative by the layer's outputs (Kronecker-factored curvature: Martens, Grosse 2015; for
quantization: YAQA, arXiv 2505.22988). A layer by itself has F = I. So neurons depend on one another through F as input
coordinates do through H, and the same substitution serves both: blocks of neurons one after the other, each aimed at

    W_b + E_before T^T,     F + lam I = V V^T,  V block upper triangular,  T the part of (V diag(V_bb)^-1)^T before b

which is where the later neurons, were they not rounded, would leave the least. Within a block each neuron stands alone.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from ..scalar import Codes, WorstCase
from ..scalar.exponent import exponent_of, reduced
from ..scalar.grid import Number
from .arrays import matmul
from .bounds import resolution, rounding
from .damping import MeanDiagonal, factor
from .gram import Gram
from .lanes import each
from .prepare import LeastSquares
from .qtensor import entropy
from .recipe import Recipe
from .stages import Solution, solve_all
from .triangular import solve_triangular


def solve_coupled(
    W: jax.Array, gram: Gram, F: jax.Array, recipe: Recipe, key: jax.Array | None, damping: Number, block: int
) -> Solution:
    """`solve_all` for neurons that are coupled; each ends with a step of its own. Compiled once for all grids.

    Args:
        W: weights (B, in, out).
        gram: with a leading axis of B.
        F: curvature (B, out, out); its scale does not matter.
        damping: share of the mean of diag(F) that is added to it.
        block: neurons at a time.
    """
    return _solve_coupled(W, gram, F, dataclasses.replace(recipe, grid=Codes.of(recipe.grid)), key, damping, block)


@functools.partial(jax.jit, static_argnames="block")
def _solve_coupled(W, gram, F, recipe, key, damping, block):
    B, _, out = W.shape
    order = jnp.argsort(-jnp.diagonal(F, axis1=1, axis2=2), axis=1, stable=True)  # the largest curvature first
    back = jnp.argsort(order, axis=1)
    take = lambda x, order: jnp.take_along_axis(x, order[:, None], 2)
    goal = take(each(lambda W, gram: _aligned(W, gram, recipe), W, gram), order)
    T = each(lambda F, p: feedback(F[p][:, p], damping, block), F, order)
    more = -out % block  # neurons of no weight, which change nothing
    goal = jnp.pad(goal, ((0, 0), (0, 0), (0, more)))
    own = dataclasses.replace(gram, C=None, drift=None)
    live = gram.diagonal[..., None] > 0  # dead weights make up for nothing

    def visit(E, first):
        cut = lambda x, axis: jax.lax.dynamic_slice_in_dim(x, first, block, axis)
        exact = cut(goal, 2)
        draw = None if key is None else jax.random.fold_in(key, first)
        moved = jnp.where(live, each(lambda E, T: matmul(E, T.T), E, cut(T, 1)), 0)
        made = solve_all(exact + moved, own, recipe, draw)
        return jax.lax.dynamic_update_slice_in_dim(E, exact - made.q, first, 2), made

    _, made = jax.lax.scan(visit, jnp.zeros_like(goal), jnp.arange(0, out, block))
    join = lambda x: take(jnp.moveaxis(x, 0, 2).reshape(B, x.shape[2], -1)[..., :out], back)
    spread = lambda x: jnp.broadcast_to(x, (*x.shape[:3], block))
    codes, q, step, zero = (join(spread(x)) for x in made[:4])
    zeros, reach = jnp.zeros_like(W), made.info.reach
    if reach is not None:
        ends = jnp.moveaxis(reach.ends, 0, 2).reshape(B, reach.ends.shape[2], -1, 2)[:, :, :out]
        reach = WorstCase(recipe.rounding.sums, jnp.take_along_axis(ends, back[:, None, :, None], 2))
    magnitude = each(lambda gram: gram.magnitude, gram)
    k = exponent_of(jnp.max(jnp.abs(W)), jnp.max(magnitude))
    of = lambda f, x: each(f, gram, reduced(W, k), reduced(x, k)).sum()
    error, energy = of(Gram.square_error, q), of(Gram.square_error, zeros)
    info = dataclasses.replace(
        jax.tree.map(lambda x: x.sum(), made.info),
        square_error=error,
        energy=jnp.where(jnp.isnan(magnitude).any(), jnp.nan, energy),
        saturation=made.info.saturation.mean() * ((out + more) / out),
        dead=made.info.dead[0],
        sparsity=jnp.mean(q == 0),
        entropy=entropy(codes),
        square_floor=of(Gram.square_error, take(goal[..., :out], back)),
        square_bound=jnp.asarray(jnp.nan, W.dtype),
        square_rounding=resolution(error, energy, of(rounding, q), of(rounding, zeros)),
        exponent=k - gram.power,
        reach=reach,
    )
    return Solution(codes, q, step, zero, info)


def feedback(F: jax.Array, damping: Number, block: int) -> jax.Array:
    """T (out, out), padded to whole blocks, for neurons in the order of F: row j is what j makes up for of each before."""
    more = -F.shape[0] % block
    V = factor(jnp.pad(F, (0, more)), MeanDiagonal(damping)).V
    within = jnp.kron(jnp.eye(V.shape[0] // block, dtype=F.dtype), jnp.ones((block, block), F.dtype))
    return jnp.tril(solve_triangular(V * within, V.T, trans=1) * (1 - within))


def _aligned(W, gram, recipe):
    """The least squares weights for what the float layer makes of its own inputs."""
    trusted = gram if recipe.shrinkage is None else recipe.shrinkage(gram)
    return LeastSquares()(W, trusted, None)[0]

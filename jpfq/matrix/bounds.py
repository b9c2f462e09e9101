"""Bounds on the error before and after quantizing. The constants are our own derivations, not the papers'.

Throughout, no argument lies beyond the grid ("nothing saturates"), `error` is the largest |a - q| of one rounding (half a
step for nearest, a step for stochastic rounding: `Rounding.error`), and `cost` that of `System`.
"""

import jax
import jax.numpy as jnp

from ..scalar.grid import Number
from .gram import Gram, Rows
from .methods import System
from .recursion import unrounded
from .split import diagonal


def square_bound(cost: jax.Array, error: jax.Array) -> jax.Array:
    """||Xq (W0 - q)||^2 <= sum_t cost_t error_t^2, before any data are quantized.

    W0 is what an infinitely fine grid would return. GPFQ: cost is diag(H), from the identity of `energy_step`; OPTQ, QEP and
    Qronos: the squares of the diagonal of V (Babai's bound; on average a third of it).

    Args:
        cost: (in,). error: (in, out) or (in, 1).

    Returns:
        One bound per neuron (out,) or (1,).
    """
    return jnp.sum((jnp.sqrt(cost)[:, None] * error) ** 2, 0)


def rounding(data: Gram | Rows, W: jax.Array, q: jax.Array) -> jax.Array:
    """The amount by which rounding in floating point may move `square_error(W, q)`, per neuron (out,).

    eps (sum_t |w_t - q_t| ||Xq_t|| + |w_t| ||X_t - Xq_t||)^2: a Gram holds products to within eps of their size, whatever
    cancels among them.
    """
    drift = data.drift if isinstance(data, Gram) else None if data.Xq is None else (data.X - data.Xq,)
    norms = jnp.abs(W - q) * jnp.sqrt(data.diagonal)[:, None]
    if drift is not None:
        squares = jnp.sum(drift[0] ** 2, 0) if isinstance(drift, tuple) else diagonal(drift)
        norms += jnp.abs(W) * jnp.sqrt(squares)[:, None]
    return jnp.finfo(W.dtype).eps * jnp.sum(norms, 0) ** 2


def resolution(error: jax.Array, energy: jax.Array, of_error: jax.Array, of_energy: jax.Array) -> jax.Array:
    """The amount by which rounding may move error / energy, times energy, from `rounding` of the two.

    The kernel that codes stand for is itself rounded, by eps |q|, which moves the error by s, s^2 = eps `of_energy`.
    """
    s2 = jnp.finfo(error.dtype).eps * of_energy
    return of_error + error / jnp.where(energy > 0, energy, 1) * of_energy + 2 * jnp.sqrt(error) * jnp.sqrt(s2) + s2


def energy_step(u: jax.Array, x: jax.Array, e: jax.Array) -> jax.Array:
    """||u_t||^2 of GPFQ for X = Xq, from u = u_{t-1} (rows,), the input x = X_t and the rounding error e = a_t - q_t:

    ||u_t||^2 = ||u_{t-1}||^2 - <u_{t-1}, x>^2 / ||x||^2 + e^2 ||x||^2.
    """
    energy = jnp.vdot(x, x)
    return jnp.vdot(u, u) - jnp.vdot(u, x) ** 2 / energy + e**2 * energy


def steady_error(step: Number, rows: Number, energy: Number) -> jax.Array:
    """The mean ||u||^2 that GPFQ settles at on inputs of random direction: rows step^2 / 12 times ||X_t||^2 = `energy`."""
    return jnp.asarray(rows * step**2 / 12 * energy)


def max_error(error: Number, cost: jax.Array, p: Number = 2.0, scaling: Number = 1.0) -> jax.Array:
    """The largest entry of the final residual Xq (W0 - q) under unbiased stochastic rounding, with `confidence(..)`.

    The residual is below N(0, beta I) in convex order, beta = (pi error^2 / 2) max_t cost_t scaling^2 / (2 scaling - 1),
    hence ||u||_inf <= sqrt(4 p beta log n). With scaling 1 that is error sqrt(2 pi p log n) max_t ||Xq_t||, SPFQ's bound;
    for OPTQ and Qronos take V_tt^2 for cost, for UNI its scaling and diag(H).
    """
    n = cost.shape[0]
    return jnp.sqrt(4 * p * covariance(error, cost, scaling) * jnp.log(jnp.asarray(n, cost.dtype)))


def covariance(error: Number, cost: jax.Array, scaling: Number = 1.0) -> jax.Array:
    """beta of `max_error`: no eigenvalue of the covariance of the final residual is larger."""
    return jnp.pi / 2 * error**2 * scaling**2 / (2 * scaling - 1) * cost.max()


def confidence(rows: int, n: int, p: Number = 2.0) -> jax.Array:
    """At least so probable is `max_error`: 1 - sqrt(2) rows n^-p."""
    return 1 - jnp.sqrt(2.0) * rows * jnp.asarray(n, float) ** -p


def kernel_walk_error(rows: Rows, step: Number) -> jax.Array:
    """||Xq (w - q)|| after `MalySaab` and `MSQ`, per neuron: at most m weights lie between two levels.

    Each is off by half a step at most, so the error is below step / 2 times the sum of the m largest ||Xq_t||.
    """
    norms = jnp.sort(jnp.sqrt(rows.diagonal))[::-1]
    return step / 2 * jnp.sum(norms[: rows.X.shape[0]])


def target(system: System) -> jax.Array:
    """W0 = (I + L)^-1 A, which an infinitely fine grid would return (in, out)."""
    base, L, about, _ = system
    return unrounded(base, L, 0 if about is None else about)

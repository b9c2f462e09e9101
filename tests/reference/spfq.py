"""Stochastic and sparse path following as plain loops in float64 NumPy: SPFQ, the unified recursion, thresholds.

Imports nothing of jpfq. Letters as in `gpfq`. Every random choice is made with a given number `uniform` in [0, 1).
"""

from typing import NamedTuple

import numpy as np

from tests.reference.gpfq import _empty, nearest


class Walk(NamedTuple):
    """What a recursion with any rounding leaves behind, each (n, out)."""

    q: np.ndarray  # value
    argument: np.ndarray  # the real number that was rounded


# SPFQ (Zhang, Saab, arXiv 2309.10975).


def align(W, X, Xq, order):
    """Phase I: weights v with Xq v close to X W. With u_0 = 0, in the first pass and in each of the order - 1 others

        pass 1:  u += w_t X_t,   v_t = <Xq_t, u> / ||Xq_t||^2,   u -= v_t Xq_t
        later:   u += v_t Xq_t,  v_t = <Xq_t, u> / ||Xq_t||^2,   u -= v_t Xq_t

    A column Xq_t = 0, which moves no output, has v_t = w_t (0 in the authors' code).
    """
    W, X, Xq = (np.asarray(x, np.float64) for x in (W, X, Xq))
    V = np.zeros(W.shape)
    for o in range(W.shape[1]):
        u = np.zeros(len(X))
        for r in range(order):
            for t in range(len(W)):
                u = u + (W[t, o] * X[:, t] if r == 0 else V[t, o] * Xq[:, t])
                V[t, o] = _share(Xq[:, t], u) if Xq[:, t].any() else W[t, o]
                u = u - V[t, o] * Xq[:, t]
    return V


def spfq(W, X, Xq, levels, uniforms, order=1):
    """Phase I, then phase II: with v the aligned weights, u_0 = 0 and t = 1 .. n

        q_t = stochastic( v_t + <Xq_t, u_{t-1}> / ||Xq_t||^2 ),   u_t = u_{t-1} + (v_t - q_t) Xq_t

    levels: evenly spaced. uniforms (n, out). A column Xq_t = 0 has the argument v_t.
    """
    path, V = _empty(W), align(W, X, Xq, order)
    Xq = np.asarray(Xq, np.float64)
    for o in range(V.shape[1]):
        u = np.zeros(len(Xq))
        for t in range(len(V)):
            argument = V[t, o] + _share(Xq[:, t], u)
            k = stochastic_index(argument, uniforms[t, o], levels[t, o])
            path.index[t, o], path.q[t, o], path.argument[t, o] = k, levels[t, o][k], argument
            u = u + (V[t, o] - path.q[t, o]) * Xq[:, t]
    return path


def stochastic_index(a, uniform, levels):
    """floor(x) + (uniform < x - floor(x)), x the place of a among evenly spaced levels; then clipped to the list."""
    x = (a - levels[0]) * (len(levels) - 1) / (levels[-1] - levels[0])
    k = int(np.floor(x)) + int(uniform < x - np.floor(x))
    return min(max(k, 0), len(levels) - 1)


# The unified framework (H. Zhang, Saab, arXiv 2412.18184).


def uni(W, X, Xq, C, rounding):
    """With u_0 = 0 and t = 1 .. n, rounding: (argument, t, o) -> value

        q_t = rounding( w_t + <Xq_t, u_{t-1}> / (C ||Xq_t||^2) ),   u_t = u_{t-1} + w_t X_t - q_t Xq_t

    A column Xq_t = 0 has the argument w_t. On aligned weights (X = Xq) with C = 1, this is phase II of SPFQ.
    """
    W, X, Xq = (np.asarray(x, np.float64) for x in (W, X, Xq))
    walk = Walk(np.zeros(W.shape), np.zeros(W.shape))
    for o in range(W.shape[1]):
        u = np.zeros(len(X))
        for t in range(len(W)):
            walk.argument[t, o] = W[t, o] + _share(Xq[:, t], u) / C
            walk.q[t, o] = rounding(walk.argument[t, o], t, o)
            u = u + W[t, o] * X[:, t] - walk.q[t, o] * Xq[:, t]
    return walk


def stochastic(z, uniform, step, top=np.inf):
    """step (floor(x) + Bernoulli(x - floor(x))), x = z / step; then clipped to +-step top."""
    x = z / step
    return step * min(max(np.floor(x) + (uniform < x - np.floor(x)), -top), top)


def prune(z, uniform, c):
    """z where |z| >= c; else c sign(z) with probability |z| / c, and otherwise 0."""
    if abs(z) >= c:
        return z
    return c * np.sign(z) if uniform < abs(z) / c else 0.0


def prune_then_quantize(z, uniforms, c, step, top=np.inf):
    """`stochastic` of `prune`, with one uniform for each, the first for `prune`."""
    return stochastic(prune(z, uniforms[0], c), uniforms[1], step, top)


def one_bit(z, uniform, K):
    """K with probability (1 + z / K) / 2, else -K; z beyond +-K counts as +-K."""
    return K if uniform < (1 + min(max(z / K, -1.0), 1.0)) / 2 else -K


# Sparse GPFQ (Zhang, Zhou, Saab, arXiv 2201.11113).


def sparse_gpfq(W, X, Xq, rounding):
    """GPFQ with any rounding: (argument, t, o) -> value, of the argument <Xq_t, u_{t-1} + w_t X_t> / ||Xq_t||^2.

    A column Xq_t = 0 has argument w_t.
    """
    W, X, Xq = (np.asarray(x, np.float64) for x in (W, X, Xq))
    walk = Walk(np.zeros(W.shape), np.zeros(W.shape))
    for o in range(W.shape[1]):
        u = np.zeros(len(X))
        for t in range(len(W)):
            u = u + W[t, o] * X[:, t]
            walk.argument[t, o] = _share(Xq[:, t], u) if Xq[:, t].any() else W[t, o]
            walk.q[t, o] = rounding(walk.argument[t, o], t, o)
            u = u - walk.q[t, o] * Xq[:, t]
    return walk


def shrink(x, lam):
    """sign(x) max(|x| - lam, 0)."""
    return np.sign(x) * max(abs(x) - lam, 0.0)


def soft_threshold(x, lam, levels):
    """The level nearest to shrink(x): argmin_p (x - p)^2 / 2 + lam |p| over evenly spaced levels that include 0."""
    return levels[nearest(shrink(x, lam), levels)]


def hard_threshold_offset(x, lam, delta, K):
    """0 where |x| <= lam; else the nearest of +-(lam + k delta), k = 0 .. K, on its side; ties go up (their code)."""
    if abs(x) <= lam:
        return 0.0
    k = abs(np.floor(shrink(x, lam) / delta + 0.5))
    return np.sign(x) * (lam + delta * min(k, K))


def hard_threshold_grid(x, lam, levels):
    """0 where |x| <= lam; else the nearest level."""
    return 0.0 if abs(x) <= lam else levels[nearest(x, levels)]


def _share(x, u):
    energy = x @ x
    return x @ u / energy if energy > 0 else 0.0

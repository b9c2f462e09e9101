"""MagR (arXiv 2406.00800): weights of smaller maximum, in float64 NumPy. Imports nothing of jpfq."""

import numpy as np


def project_l1(v, radius):
    """The nearest point of the ball ||x||_1 <= radius to the vector v: sign(v) max(|v| - theta, 0), where with

    u = |v| descending, c_k = u_1 + .. + u_k, and r the last k of k u_k > c_k - radius:  theta = (c_r - radius) / r

    and theta = 0 inside the ball.
    """
    v = np.asarray(v, np.float64)
    if np.abs(v).sum() <= radius:
        return v.copy()
    if radius <= 0:
        return np.zeros(v.shape)
    u = sorted(np.abs(v), reverse=True)
    c, theta = 0.0, 0.0
    for k, entry in enumerate(u, 1):
        c += entry
        if k * entry > c - radius:
            theta = (c - radius) / k
    return np.sign(v) * np.maximum(np.abs(v) - theta, 0.0)


def prox_max_norm(v, a):
    """argmin_x ||x - v||^2 / 2 + a ||x||_inf = v - project_l1(v, a) (Moreau)."""
    return np.asarray(v, np.float64) - project_l1(v, a)


def magr(W, X, threshold, iterations):
    """argmin_V ||X (W - V)||^2 / 2 + sigma a ||V||_inf per neuron, a its entry of threshold (out,), by steps from V = W

    V <- prox_{a ||.||_inf}( V - S (V - W) / sigma ),   S = X^T X,  sigma its largest eigenvalue
    """
    W, X = np.asarray(W, np.float64), np.asarray(X, np.float64)
    S = X.T @ X
    sigma = np.linalg.eigvalsh(S)[-1]
    V = W.copy()
    for _ in range(iterations):
        V = V - S @ (V - W) / sigma
        V = np.stack([prox_max_norm(V[:, o], threshold[o]) for o in range(W.shape[1])], axis=1)
    return V

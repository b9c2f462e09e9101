"""The kernel walk of Maly and Saab (doi 10.1016/j.acha.2023.04.004) as a plain loop in float64 NumPy.

Imports nothing of jpfq. One neuron: w (n,), X (m, n).
"""

import numpy as np


def kernel_walk(w, X, c):
    """Weights z with X z = X w of which at most m lie strictly inside (-c, c): see `kernel_walk_boxes`."""
    return kernel_walk_boxes(w, X, np.full(len(w), -c), np.full(len(w), c))


def kernel_walk_boxes(w, X, low, high):
    """z = w at first; while more than m coordinates are free, that is, began strictly inside their box and have not met

        S    = the first m + 1 free coordinates,   v != 0 with X_S v = 0
        z_S += tau v,  tau > 0 the least at which some coordinate of S meets a bound of its box, where it stays

    v is the last right-singular vector of X_S, its entry of largest magnitude positive. Of coordinates that meet their
    bounds at the same tau the first is fixed in this turn. Coordinates on or outside their box at first are not moved.
    """
    z, X, low, high = (np.array(x, np.float64) for x in (w, X, low, high))
    free = [i for i in range(len(z)) if low[i] < z[i] < high[i]]
    while len(free) > len(X):
        S = free[: len(X) + 1]
        v = kernel_vector(X[:, S])
        bounds = [high[i] if a > 0 else low[i] for i, a in zip(S, v, strict=True)]
        times = [(b - z[i]) / a if a != 0 else np.inf for i, a, b in zip(S, v, bounds, strict=True)]
        k = int(np.argmin(times))
        z[S] = np.clip(z[S] + times[k] * v, low[S], high[S])
        z[S[k]] = bounds[k]
        free.remove(S[k])
    return z


def kernel_vector(A):
    """A unit vector v with A v = 0, A having more columns than rows; the entry of largest magnitude is positive."""
    v = np.linalg.svd(A)[2][-1]
    return v * np.sign(v[np.argmax(np.abs(v))])

"""What polishes codes that another method chose, by direct evaluation in float64 NumPy. Imports nothing of jpfq.

Letters as in `gpfq`; q (n, out) are values out of `levels` (n, out, M), and new values are returned.
"""

import numpy as np


def coordinate_descent(q, W, X, Xq, levels, passes):
    """In each pass, for t = 1 .. n: q_t = argmin_p || X w - Xq q(q_t = p) || over its levels, of equal ones the upper.

    A coordinate with Xq_t = 0 keeps its level.
    """
    q, W, X, Xq = (np.array(x, np.float64) for x in (q, W, X, Xq))
    for o in range(W.shape[1]):
        target = X @ W[:, o]
        for t in list(range(len(W))) * passes:
            if Xq[:, t].any():
                errors = [((target - Xq @ v) ** 2).sum() for v in _variants(q[:, o], t, levels[t, o])]
                q[t, o] = levels[t, o][_last(errors, min)]
    return q


def cosine_descent(q, W, X, Xq, levels, passes, tie=1e-12):
    """Beacon's passes (arXiv 2508.20293): for t = 1 .. n, q_t = argmax_p cos( X w, Xq q(q_t = p) ) over its levels.

    The present level stays unless another is better by more than `tie`, which is a few roundings; of equal others the
    upper. The cosine with a vector 0 is 0.
    """
    q, W, X, Xq = (np.array(x, np.float64) for x in (q, W, X, Xq))
    for o in range(W.shape[1]):
        target = X @ W[:, o]
        for t in list(range(len(W))) * passes:
            cosines = [cosine(target, Xq @ v) for v in _variants(q[:, o], t, levels[t, o])]
            if max(cosines) > cosine(target, Xq @ q[:, o]) + tie:
                q[t, o] = levels[t, o][_last(cosines, max)]
    return q


def beacon_prefix(W, X, Xq, levels, first):
    """Beacon's start: q_t = argmax_p cos( X_{<=t} w_{<=t}, Xq_{<t} q_{<t} + p Xq_t ), of equal levels the upper.

    The cosine leaves the size of q_1 open: first (out,) is its value.
    """
    W, X, Xq = (np.asarray(x, np.float64) for x in (W, X, Xq))
    q = np.zeros(W.shape)
    q[0] = first
    for t in range(1, len(W)):
        for o in range(W.shape[1]):
            target = X[:, : t + 1] @ W[: t + 1, o]
            cosines = [cosine(target, Xq @ v) for v in _variants(q[:, o], t, levels[t, o])]
            q[t, o] = levels[t, o][_last(cosines, max)]
    return q


def free_scale(q, W, X, Xq):
    """c* = <X w, Xq q> / ||Xq q||^2 = argmin_c || X w - c Xq q || per neuron; 1 where Xq q = 0."""
    target, output = np.asarray(X, np.float64) @ W, np.asarray(Xq, np.float64) @ q
    energy = (output**2).sum(0)
    return np.where(energy > 0, (target * output).sum(0) / np.where(energy > 0, energy, 1.0), 1.0)


def cosine(a, b):
    """<a, b> / (||a|| ||b||), 0 where either is 0."""
    norms = np.sqrt((a @ a) * (b @ b))
    return a @ b / norms if norms > 0 else 0.0


def _variants(q, t, levels):
    for p in levels:
        v = q.copy()
        v[t] = p
        yield v


def _last(scores, best):
    return max(k for k, score in enumerate(scores) if score == best(scores))

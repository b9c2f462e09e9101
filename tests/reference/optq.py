"""OPTQ, its order and its geometry as plain loops in float64 NumPy. Imports nothing of jpfq.

Letters as in `gpfq`: W (n, out), X (m, n), H = X^T X, `levels` (n, out, M). `lam` is the number added to the
diagonal of H. A coordinate is dead where H_tt = 0: there H_tt = 1 and the argument is w_t.
"""

import numpy as np

from tests.reference.gpfq import _empty, _visit, minmax, values


def optq(W, X, levels, lam):
    """OPTQ (Frantar et al., algorithm 1): with U upper, U^T U = (X^T X + lam I)^-1, and t = 1 .. n

    q_t = nearest( w_t ),   e = (w_t - q_t) / U_tt,   w_j -= U_tj e  for j > t
    """
    return optq_blocked(W, X, levels, lam, block=1)


def optq_blocked(W, X, levels, lam, block):
    """The same with the updates of the weights behind a block made once, at its end."""
    W, X = _float64(W, X)
    H = X.T @ X
    return _diffuse(W.copy(), _factor(_inverse(H, lam)), levels, block)


def optq_groups_refit(W, X, codes, size, lam, fit, block=1):
    """OPTQ whose grid of each group of `size` inputs is fitted, at the group's start, to the weights as they are then.

    fit: the weights of a group and a neuron -> (step, zero), see `fit_absmax` and `fit_minmax`. Returns the Path and
    the steps and zeros, each (groups, out). The authors' code fits to the weights as they were when the block of inputs
    that the group starts in was begun; `block` inputs each, 1 for the weights of the moment.
    """
    W, X = _float64(W, X)
    H = X.T @ X
    w, U = W.copy(), _factor(_inverse(H, lam))
    n, out = W.shape
    path, levels = _empty(W), np.zeros((n, out, len(codes)))
    steps, zeros = np.zeros((-(-n // size), out)), np.zeros((-(-n // size), out))
    for t in range(n):
        if t % block == 0:
            seen = w.copy()
        if t % size == 0:
            for o in range(out):
                step, zero = steps[t // size, o], zeros[t // size, o] = fit(seen[t : t + size, o])
                levels[t : t + size, o] = values(codes, step, zero)
        e = _round(path, t, w[t], levels) / U[t, t]
        w[t + 1 :] -= np.outer(U[t, t + 1 :], e)
    return path, steps, zeros


def fit_absmax(codes):
    """step = max |w| / max(codes), zero = 0; weights that are all 0 count as 1 (OPTQ's code)."""
    return lambda w: ((max(abs(x) for x in w) or 1.0) / max(codes), 0.0)


def fit_minmax(bits):
    """`minmax` of the weights; the interval [-1, 1] where they are all 0 (OPTQ's code)."""
    return lambda w: minmax(min(w), max(w), bits) if any(x != 0 for x in w) else minmax(-1.0, 1.0, bits)


# Order and geometry.


def min_pivot(H):
    """The order, as an array p of inputs to visit, whose places are filled from the last to the first.

    Each place takes, of the inputs left, the one of least diagonal entry in the Schur complement of H on those left;
    of equal ones the lowest index. The input taken is then eliminated: S -= S_:k S_k: / S_kk, nothing where S_kk <= 0.
    """
    S = np.array(H, np.float64)
    left, p = list(range(len(S))), []
    while left:
        k = min(left, key=lambda i: (S[i, i], i))
        if S[k, k] > 0:
            S = S - np.outer(S[:, k], S[k]) / S[k, k]
        left.remove(k)
        p.insert(0, k)
    return np.array(p, int)


def pivots(X, lam):
    """V_tt^2 for each t: the squared distance of column t of [X; sqrt(lam) I] from the span of its later columns."""
    x = _appended(np.asarray(X, np.float64), lam)
    later = [x[:, t + 1 :] for t in range(x.shape[1])]
    nearest = [rest @ np.linalg.lstsq(rest, x[:, t], rcond=None)[0] for t, rest in enumerate(later)]
    return ((x - np.stack(nearest, axis=1)) ** 2).sum(0)


def babai(path, X, lam):
    """sum_t e_t^2 V_tt^2 per neuron, e the argument less the value: ||[X; sqrt(lam) I] (w - q)||^2 of an OPTQ path."""
    return pivots(X, lam) @ (path.argument - path.q) ** 2


def _float64(*arrays):
    return tuple(np.asarray(a, np.float64) for a in arrays)


def _appended(X, lam):
    return np.concatenate([X, np.sqrt(lam) * np.eye(X.shape[1])])


def _inverse(H, lam):
    return np.linalg.inv(H + np.diag(np.where(np.diag(H) == 0, 1.0, 0.0) + lam))


def _factor(S):
    return np.linalg.cholesky(S).T


def _diffuse(w, U, levels, block=1):
    n, path, E = len(w), _empty(w), np.zeros(w.shape)
    for i in range(0, n, block):
        end = min(i + block, n)
        for t in range(i, end):
            E[t] = _round(path, t, w[t], levels) / U[t, t]
            w[t + 1 : end] -= np.outer(U[t, t + 1 : end], E[t])
        w[end:] -= U[i:end, end:].T @ E[i:end]
    return path


def _round(path, t, arguments, levels):
    for o, argument in enumerate(arguments):
        _visit(path, t, o, argument, levels)
    return path.argument[t] - path.q[t]

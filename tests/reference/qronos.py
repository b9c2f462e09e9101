"""Successors of OPTQ that correct for X - Xq: its targets, GPTAQ and Qronos as plain loops in float64 NumPy.

Imports nothing of jpfq. Letters as in `gpfq`, with G = Xq^T X; `lam` and dead coordinates as in `optq`.
"""

import numpy as np

from tests.reference.gpfq import Path, _empty, _visit
from tests.reference.optq import _appended, _diffuse, _factor, _float64, _inverse, _round, optq


def least_squares(W, X, Xq, lam):
    """W* = (H + lam I)^-1 (G + lam I) W = argmin_V ||X W - Xq V||^2 + lam ||W - V||^2; of several the shortest."""
    W, X, Xq = _float64(W, X, Xq)
    return np.linalg.lstsq(_appended(Xq, lam), _appended(X, lam) @ W, rcond=None)[0]


def qep(W, X, Xq, levels, lam, alpha):
    """QEP (arXiv 2504.09629): OPTQ on W + alpha (H + lam I)^-1 (G - H) W."""
    W, X, Xq = _float64(W, X, Xq)
    H, G = Xq.T @ Xq, Xq.T @ X
    return optq(W + alpha * _inverse(H, lam) @ (G - H) @ W, Xq, levels, lam)


def gptaq(W, X, Xq, levels, lam, alpha, block=None):
    """GPTAQ (arXiv 2504.02692, the authors' code): with U as in OPTQ, P = alpha striu((X - Xq)^T Xq U^T) U

        q_t = nearest( w_t ),   e = (w_t - q_t) / U_tt,   w_j -= U_tj e - P_tj w_t  for j > t

    With `block` inputs to a block, the update of the weights behind a block has q_t in the place of the second w_t: the
    code has overwritten w_t by then. Without, all inputs are one block. A dead coordinate passes nothing on; in the code
    because its w_t is 0.
    """
    W, X, Xq = _float64(W, X, Xq)
    H = Xq.T @ Xq
    w, U = W.copy(), _factor(_inverse(H, lam))
    P = alpha * np.triu((X - Xq).T @ Xq @ U.T, 1) @ U
    P[np.diag(H) == 0] = 0
    n, path = len(W), _empty(W)
    block = n if block is None else block
    for t in range(n):
        end = min(t - t % block + block, n)
        e = _round(path, t, w[t], levels) / U[t, t]
        w[t + 1 : end] -= np.outer(U[t, t + 1 : end], e) - np.outer(P[t, t + 1 : end], w[t])
        w[end:] -= np.outer(U[t, end:], e) - np.outer(P[t, end:], path.q[t])
    return path


def qronos(W, X, Xq, levels):
    """Qronos (arXiv 2505.11695) by its definition: with w = W at first, and t = 1 .. n

    q_t    = argmin_p || X W - sum_{j < t} q_j Xq_j - p Xq_t - sum_{j > t} w_j Xq_j ||
    w_{>t} = argmin_v || X W - sum_{j <= t} q_j Xq_j - sum_{j > t} v_j Xq_j ||       of several the shortest
    """
    W, X, Xq = _float64(W, X, Xq)
    path = _empty(W)
    for o in range(W.shape[1]):
        w, rest = W[:, o].copy(), X @ W[:, o]
        for t in range(len(W)):
            x, later = Xq[:, t], Xq[:, t + 1 :]
            argument = x @ (rest - later @ w[t + 1 :]) / (x @ x) if x @ x > 0 else W[t, o]
            _visit(path, t, o, argument, levels)
            rest = rest - path.q[t, o] * x
            w[t + 1 :] = np.linalg.lstsq(later, rest, rcond=None)[0]
    return path


def qronos_brevitas(W, X, Xq, levels, lam):
    """Qronos in the form of its lemma 3.2 and of Brevitas, + standing for the inputs 2 .. n:

        q_1 = nearest( (G_1 W - H_1+ w_+) / H_11 )                      neither H nor G with lam
        S   = K_++ - K_+1 K_1+ / K_11 = (H_++ + lam I)^-1               K = (H + lam I)^-1
        w_+ = S ( (G + lam I)_+ W - H_+1 q_1 )

    and OPTQ on w_+ with U^T U = S. The argument of a dead coordinate is w_t; in Brevitas it is 0 for the first.
    """
    W, X, Xq = _float64(W, X, Xq)
    H, G = Xq.T @ Xq, Xq.T @ X
    path, K = _empty(W), _inverse(H, lam)
    first = (G[0] @ W - H[0, 1:] @ W[1:]) / H[0, 0] if H[0, 0] > 0 else W[0]
    _round(path, 0, first, levels)
    S = K[1:, 1:] - np.outer(K[1:, 0], K[0, 1:]) / K[0, 0]
    w = S @ ((G + lam * np.eye(len(G)))[1:] @ W - np.outer(H[1:, 0], path.q[0]))
    w = np.where(np.diag(H)[1:, None] == 0, W[1:], w)
    rest = _diffuse(w, _factor(S), levels[1:])
    return Path(*(np.concatenate([a[:1], b]) for a, b in zip(path, rest, strict=True)))


def qronos_ls(W, X, Xq, levels, lam):
    """The variant of arXiv 2508.04853: OPTQ on the least-squares weights."""
    return optq(least_squares(W, X, Xq, lam), Xq, levels, lam)

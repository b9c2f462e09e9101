"""AXE as Brevitas 0.13 has it for GPFQ and OPTQ, as plain loops in float64 NumPy. Imports nothing of jpfq.

Letters as in `gpfq`; `step` (out,) is the distance of levels of each neuron, `codes` the lowest and highest code or a list,
`inputs` = (mu, nu) those of the inputs, P the bits of the accumulator, T the inputs in a tile, `order` that of the inputs.
"""

import numpy as np

from .gpfq import nearest


def thresholds(W, step, inputs, P, T):
    """The soft threshold of each tile and neuron (tiles, out), in units of the weights.

    theta of the projection of a tile of w / step, less its mean, on the l1 ball of radius Z = (2^P - 2) / (nu - mu): with
    magnitudes u_1 >= u_2 >= .. and c their cumulative sums, theta = (c_r - Z) / r for the last r of r u_r > c_r - Z. The
    last tile is filled up with zeros before its mean is taken.
    """
    n, out = W.shape
    tiles, Z = -(-n // T), (2.0**P - 2) / (inputs[1] - inputs[0])
    found = np.zeros((tiles, out))
    for t, o in np.ndindex(tiles, out):
        x = np.zeros(T)
        part = W[t * T : (t + 1) * T, o] / step[o]
        x[: len(part)] = part
        u = np.sort(np.abs(x - x.mean()))[::-1]
        if u.sum() > Z:
            c = np.cumsum(u)
            r = max(k for k in range(1, T + 1) if k * u[k - 1] > c[k - 1] - Z)
            found[t, o] = (c[r - 1] - Z) / r * step[o]
    return found


def limits(p, g, inputs, P):
    """The least and the largest code that may follow positive codes of sum p and negative ones of sum g."""
    (mu, nu), top = inputs, 2 ** (P - 1) - 1
    up, down = [(top - (nu * p + mu * g)) / nu], [(-top - (mu * p + nu * g)) / nu]
    if mu < 0:
        up.append((-top - (mu * p + nu * g)) / mu)
        down.append((top - (nu * p + mu * g)) / mu)
    return min(np.ceil(max(down)), 0), max(np.floor(min(up)), 0)


class Budget:
    """The sums of one neuron's tiles, and what becomes of an argument."""

    def __init__(self, tiles, inputs, P, codes, soft=True):
        self.sums, self.inputs, self.P, self.codes, self.soft = np.zeros((tiles, 2), int), inputs, P, codes, soft

    def __call__(self, a, tile, threshold, step):
        """The thresholded and clipped argument, and its code."""
        least, most = limits(*self.sums[tile], self.inputs, self.P)
        a = np.sign(a) * max(abs(a) - (threshold if self.soft else 0), 0)
        a = min(max(a, step * least), step * most)
        k = self._nearest(a / step, least, most)
        self.sums[tile, 0 if k > 0 else 1] += k
        return a, k

    def _nearest(self, x, least, most):
        """The nearest code of the range (lo, hi), or of the list that fits the limits."""
        if len(self.codes) == 2:
            return int(min(max(np.floor(x + 0.5), self.codes[0]), self.codes[1]))
        fit = [k for k in self.codes if least <= k <= most]
        return int(fit[nearest(x, fit)])


def gpfq(W, X, Xq, step, codes, inputs, P, T, order, soft=True):
    """A2GPFQ: q_t of a_t = ( sum_{j <= t} G_tj w_j - sum_{j < t} H_tj q_j ) / H_tt, w_t where H_tt = 0. Codes (n, out)."""
    H, G = Xq.T @ Xq, Xq.T @ X
    theta, k = thresholds(W, step, inputs, P, T), np.zeros(W.shape, int)
    for o in range(W.shape[1]):
        budget, done = Budget(len(theta), inputs, P, codes, soft), []
        for i in order:
            here = [*done, i]
            a = G[i, here] @ W[here, o] - H[i, done] @ (step[o] * k[done, o])
            a = a / H[i, i] if H[i, i] > 0 else W[i, o]
            _, k[i, o] = budget(a, i // T, theta[i // T, o], step[o])
            done = here
    return k


def optq(W, X, step, codes, inputs, P, T, order, lam, feedback="shrunk", soft=True):
    """A2GPTQ: the thresholded and clipped weight takes the weight's place before the error is passed on.

    With feedback="argument" the error is that of the weight as it was.
    """
    H = X.T @ X
    dead = np.diag(H) == 0
    theta, k = thresholds(W, step, inputs, P, T), np.zeros(W.shape, int)
    H = (H + np.diag(np.where(dead, 1.0, 0.0)) + lam * np.eye(len(H)))[np.ix_(order, order)]
    U = np.linalg.cholesky(np.linalg.inv(H)).T
    for o in range(W.shape[1]):
        budget, w = Budget(len(theta), inputs, P, codes, soft), W[order, o]
        for t, i in enumerate(order):
            a, k[i, o] = budget(w[t], i // T, theta[i // T, o], step[o])
            start = a if feedback == "shrunk" else w[t]
            w[t + 1 :] -= (start - step[o] * k[i, o]) / U[t, t] * U[t, t + 1 :]
    return k

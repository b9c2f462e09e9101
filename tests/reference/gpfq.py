"""The published mathematics as plain loops in float64 NumPy: grids, scales, GPFQ, MSQ, im2col. Imports nothing of jpfq.

Letters as in the library: W (n, out) weights, one column per neuron; X, Xq (m, n) inputs of the layer in the float and in
the quantized network; H = Xq^T Xq, G = Xq^T X. A grid is a list of its values in ascending order.
"""

import itertools
from typing import NamedTuple

import numpy as np

# Grids: the integers of each alphabet and the integer, or half-integer, that stands for 0.


def integer(bits, narrow=False):
    """-2^(b-1) .. 2^(b-1) - 1, the b-bit signed integers; narrow leaves out the lowest."""
    top = 2 ** (bits - 1) - 1
    return list(range(-top if narrow else -top - 1, top + 1)), 0


def symmetric(K):
    """{0, +-1, .., +-K}, the alphabet of GPFQ22 (Zhang, Zhou, Saab, section 2)."""
    return list(range(-K, K + 1)), 0


def equispaced(M):
    """M levels with the same distance, symmetric about 0: GPFQ20 (Lybrand, Saab), alpha linspace(-1, 1, M)."""
    return list(range(M)), (M - 1) / 2


def ternary():
    """{-1, 0, 1}."""
    return [-1, 0, 1], 0


def binary():
    """{-1, 1} as codes {0, 1}."""
    return [0, 1], 0.5


def unsigned(bits):
    """0 .. 2^b - 1; the zero point is fitted to the weights, see `minmax`."""
    return list(range(2**bits)), None


def values(codes, step, zero):
    """The value of each code: step (k - zero)."""
    return np.array([step * (k - zero) for k in codes], np.float64)


def nearest(a, levels):
    """Index of argmin_p |a - p| over the list of levels; of two at equal distance the upper."""
    best = 0
    for k, level in enumerate(levels):
        if abs(a - level) <= abs(a - levels[best]):
            best = k
    return best


# The quantizers. `levels` is (n, out, M): the level list of each weight. All return a Path.


class Path(NamedTuple):
    """What a quantizer leaves behind, each (n, out)."""

    index: np.ndarray  # position in the level list
    q: np.ndarray  # value
    argument: np.ndarray  # the real number that was rounded


def gpfq_state(W, X, Xq, levels):
    """GPFQ20 eq. 1 and GPFQ22 eq. 2: with u_0 = 0 and t = 1 .. n

        q_t = argmin_p || u_{t-1} + w_t X_t - p Xq_t ||  =  nearest( <Xq_t, u_{t-1} + w_t X_t> / ||Xq_t||^2 )
        u_t = u_{t-1} + w_t X_t - q_t Xq_t

    A column Xq_t = 0, which moves no output, has argument w_t (0 in GPFQ22's code).
    """
    W, X, Xq = (np.asarray(x, np.float64) for x in (W, X, Xq))
    path = _empty(W)
    for o in range(W.shape[1]):
        u = np.zeros(X.shape[0])
        for t in range(W.shape[0]):
            target = u + W[t, o] * X[:, t]
            energy = Xq[:, t] @ Xq[:, t]
            _visit(path, t, o, Xq[:, t] @ target / energy if energy > 0 else W[t, o], levels)
            u = target - path.q[t, o] * Xq[:, t]
    return path


def gpfq_gram(W, H, G, levels):
    """The same with the state eliminated, from H = Xq^T Xq and G = Xq^T X alone:

    q_t = nearest( ( sum_{j <= t} G_tj w_j - sum_{j < t} H_tj q_j ) / H_tt )
    """
    W, H, G = (np.asarray(x, np.float64) for x in (W, H, G))
    path = _empty(W)
    for o in range(W.shape[1]):
        for t in range(W.shape[0]):
            total = G[t, : t + 1] @ W[: t + 1, o] - H[t, :t] @ path.q[:t, o]
            _visit(path, t, o, total / H[t, t] if H[t, t] > 0 else W[t, o], levels)
    return path


def msq(W, levels):
    """Memoryless scalar quantization: each weight to its nearest level."""
    W = np.asarray(W, np.float64)
    path = _empty(W)
    for t, o in np.ndindex(W.shape):
        _visit(path, t, o, W[t, o], levels)
    return path


def recursion(A, L, levels):
    """Linear-feedback rounding: q_t = nearest( A_t - sum_{j < t} L_tj q_j )."""
    A, L = np.asarray(A, np.float64), np.asarray(L, np.float64)
    path = _empty(A)
    for o in range(A.shape[1]):
        for t in range(A.shape[0]):
            _visit(path, t, o, A[t, o] - L[t, :t] @ path.q[:t, o], levels)
    return path


def in_order(quantizer, p, W, *data, levels):
    """A quantizer run on the coordinates in the order p, its results put back in place. `data` are (m, n)."""
    path = quantizer(W[p], *(x[:, p] for x in data), levels[p])
    back = np.argsort(p)
    return Path(*(x[back] for x in path))


def relative_error(X, W, Xq, q):
    """||X W - Xq q||_F / ||X W||_F."""
    X, W, Xq, q = (np.asarray(x, np.float64) for x in (X, W, Xq, q))
    return np.sqrt(((X @ W - Xq @ q) ** 2).sum() / ((X @ W) ** 2).sum())


def entropy(codes):
    """-sum_k p_k log2 p_k over the shares p_k of the codes, in bits."""
    total, counts = 0, {}
    for code in np.asarray(codes).ravel().tolist():
        counts[code] = counts.get(code, 0) + 1
        total += 1
    return -sum(c / total * np.log2(c / total) for c in counts.values())


def _empty(W):
    return Path(np.zeros(W.shape, int), np.zeros(W.shape), np.zeros(W.shape))


def _visit(path, t, o, argument, levels):
    path.argument[t, o] = argument
    path.index[t, o] = nearest(argument, levels[t, o])
    path.q[t, o] = levels[t, o][path.index[t, o]]


# Scales: an interval from a set of weights w, and the sets of weights that share one.


def absmax(w, c=1.0):
    """radius = c max |w|."""
    return c * max(abs(x) for x in np.ravel(w))


def median(w, c=1.0):
    """radius = c median |w| (GPFQ20)."""
    return c * quantile(np.abs(np.ravel(w)), 0.5)


def quantile(w, p):
    """The p-quantile, linear between order statistics: position p (N - 1) in the sorted list."""
    w = sorted(np.ravel(w))
    position = p * (len(w) - 1)
    below = int(np.floor(position))
    above = min(below + 1, len(w) - 1)
    return w[below] + (position - below) * (w[above] - w[below])


def mean_of_quantiles(W, p):
    """The mean over neurons of the p-quantile of |w_o| (GPFQ22: its radius, at p = 1)."""
    return sum(quantile(np.abs(W[:, o]), p) for o in range(W.shape[1])) / W.shape[1]


def minmax(low, high, bits):
    """OPTQ's asymmetric grid over [low, high], extended to contain 0: step = (high - low) / (2^b - 1),
    zero = round(-low / step)."""
    low, high = min(low, 0.0), max(high, 0.0)
    step = (high - low) / (2**bits - 1)
    return step, np.floor(-low / step + 0.5)


def mse_search(w, levels_of, candidates, least, norm):
    """The share p in {1, .., least}, evenly spaced, of least sum |w - nearest(w)|^norm; the first of equals.

    levels_of: p -> the level list over the interval shrunk to p times.
    """
    best, choice = np.inf, None
    for i in range(candidates):
        p = 1 + i * (least - 1) / (candidates - 1)
        levels = levels_of(p)
        cost = sum(abs(x - levels[nearest(x, levels)]) ** norm for x in np.ravel(w))
        if cost < best:
            best, choice = cost, p
    return choice


def sets(W, per, size=None):
    """The sets of weights that share one step, as {(group, channel): w}: "tensor", "channel", or "group" of a size."""
    n, out = W.shape
    if per == "tensor":
        return {(0, 0): W}
    size = n if per == "channel" else size
    return {(g, o): W[g * size : (g + 1) * size, o] for g in range(n // size) for o in range(out)}


def level_lists(shape, steps, codes, zeros):
    """(n, out, M): the level list of each weight, from steps and zeros of shape (groups, out) or (1, 1)."""
    n, out = shape
    steps, zeros = (np.broadcast_to(x, (np.shape(x)[0], out)) for x in (steps, zeros))
    size = n // steps.shape[0]
    return np.array(
        [[values(codes, steps[t // size, o], zeros[t // size, o]) for o in range(out)] for t in range(n)], np.float64
    )


# Convolutions.


def im2col(x, window, strides, padding, dilation, data_dilation, groups):
    """The patches of x (samples, *space, channels) that a convolution multiplies with its kernel.

    Returns (groups, samples, *places, prod(window) * channels / groups), a patch being in the order (*window, channel) of
    the channels of its group. Zeros are put between the entries of x where data_dilation > 1, then around by `padding`.
    """
    samples, *space, channels = x.shape
    wide = np.zeros((samples, *((s - 1) * d + 1 for s, d in zip(space, data_dilation, strict=True)), channels))
    wide[(slice(None), *(slice(None, None, d) for d in data_dilation))] = x
    wide = np.pad(wide, [(0, 0), *padding, (0, 0)])
    extent = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
    places = [(s - e) // stride + 1 for s, e, stride in zip(wide.shape[1:-1], extent, strides, strict=True)]
    size = channels // groups
    patches = np.zeros((groups, samples, *places, int(np.prod(window)) * size))
    for g, i, place in itertools.product(range(groups), range(samples), np.ndindex(*places)):
        entries = []
        for offset in np.ndindex(*window):
            at = tuple(p * s + o * d for p, s, o, d in zip(place, strides, offset, dilation, strict=True))
            entries.extend(wide[(i, *at)][g * size : (g + 1) * size])
        patches[(g, i, *place)] = entries
    return patches

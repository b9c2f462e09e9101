"""Float64 references for the difference of two networks: evaluation, search, and the exact extremes of small ones."""

import itertools

import numpy as np


def evaluate(weights, x, activation):
    """The outputs of a dense network: (W, b) by layer, with an activation between them. Batches of networks broadcast."""
    for i, (W, b) in enumerate(weights):
        x = x @ W + b[..., None, :]
        x = activation(x) if i + 1 < len(weights) else x
    return x


def exact(f, q, lower, upper):
    """The exact extremes of q(x) - f(x) over a box, of networks with one hidden layer of ReLU and two inputs.

    The difference is linear between the lines where a hidden unit of either network is 0, so its extremes lie where those
    lines cross each other or the sides of the box, and at its corners.
    """
    normals = [np.concatenate([f[0][0].T, q[0][0].T]), np.eye(2), np.eye(2)]
    offsets = [np.concatenate([f[0][1], q[0][1]]), -lower, -upper]
    lines = list(zip(np.concatenate(normals), np.concatenate(offsets), strict=True))
    points = [np.array(corner) for corner in itertools.product(*zip(lower, upper, strict=True))]
    for (a, c), (b, d) in itertools.combinations(lines, 2):
        M = np.stack([a, b])
        if abs(np.linalg.det(M)) > 1e-12:
            points.append(np.linalg.solve(M, -np.array([c, d])))
    inside = [p for p in points if np.all(p >= lower - 1e-12) and np.all(p <= upper + 1e-12)]
    relu = lambda x: np.maximum(x, 0)
    at = np.array(inside)
    difference = evaluate(q, at, relu) - evaluate(f, at, relu)
    return difference.min(0), difference.max(0)

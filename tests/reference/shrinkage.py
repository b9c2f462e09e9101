"""Shrinkage, entry by entry."""

import numpy as np


def without_chance(M, left, right, rows, trust=1.0):
    """Correlations of M, each times the share of their sum of squares that is more than chance; the diagonal stays."""
    n = len(M)
    pairs = [(i, j) for i in range(n) for j in range(n) if i != j and left[i] > 0 and right[j] > 0]
    c2 = np.array([M[i, j] ** 2 / (left[i] * right[j]) for i, j in pairs])
    chance = ((1 - trust * c2) ** 2).sum() / max(rows - 1, 1)
    kept = 1 - min(max(chance / c2.sum(), 0), 1)
    return np.array([[M[i, j] if i == j else kept * M[i, j] for j in range(n)] for i in range(n)])

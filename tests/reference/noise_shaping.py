"""Noise-shaping quantizers and their condensation as plain loops in float64 NumPy. Imports nothing of jpfq.

Letters as in the papers (Zhang, Kannan, Cloninger, Saab, arXiv 2106.02614; Zhang, Saab, arXiv 2010.00712): z or y a vector
of m measurements, u the state, q the quantized values, r the order, lam the number of codes condensed to one number.
"""

import numpy as np


def midrise(a, K, step):
    """The nearest of the 2K levels +-step/2, +-3 step/2, ..; the upper one at a tie, which 0 is."""
    k = np.floor(a / step)
    return step * (np.clip(k, -K, K - 1) + 0.5)


def sigma_delta_1(z, K, step):
    """q_i = Q(u_{i-1} + z_i), u_i = u_{i-1} + z_i - q_i. Returns q and all u."""
    u, q, states = 0.0, np.zeros(len(z)), np.zeros(len(z))
    for i in range(len(z)):
        q[i] = midrise(u + z[i], K, step)
        u = u + z[i] - q[i]
        states[i] = u
    return q, states


def sigma_delta_2(z, K, step):
    """q_i = Q(2 u_{i-1} - u_{i-2} + z_i), u_i what that leaves; for more than one bit."""
    before, u, q, states = 0.0, 0.0, np.zeros(len(z)), np.zeros(len(z))
    for i in range(len(z)):
        a = 2 * u - before + z[i]
        q[i] = midrise(a, K, step)
        before, u = u, a - q[i]
        states[i] = u
    return q, states


def one_bit(y, h, step):
    """q_i = (step / 2) sign(y_i + sum_j h_j v_{i-j}), v_i what that leaves; h maps lag j to h_j."""
    q, v = np.zeros(len(y)), np.zeros(len(y))
    for i in range(len(y)):
        a = y[i]
        for j, weight in h.items():
            if j <= i:
                a += weight * v[i - j]
        q[i] = step / 2 if a >= 0 else -step / 2
        v[i] = a - q[i]
    return q, v


H2 = {1: 7 / 6, 7: -1 / 6}
H3 = {1: 175 / 144, 7: -25 / 108, 25: 7 / 432}


def beta_scheme(z, K, beta, lam):
    """The paper's: z scaled by (2K - beta) / (2K - 1), step 2 / (2K - 1), u from 0 in every block of lam."""
    step, u, q, states = 2 / (2 * K - 1), 0.0, np.zeros(len(z)), np.zeros(len(z))
    for i in range(len(z)):
        a = (0.0 if i % lam == 0 else beta * u) + z[i] * (2 * K - beta) / (2 * K - 1)
        q[i] = midrise(a, K, step)
        u = a - q[i]
        states[i] = u
    return q, states


def vector(r, lam):
    """v: ones, convolved with themselves r times, of length lam = r n - r + 1."""
    n = (lam - 1) // r + 1
    v = np.ones(1)
    for _ in range(r):
        v = np.convolve(v, np.ones(n))
    return v


def condense(q, v):
    """(I_p kron v^T) q / |v|."""
    p = len(q) // len(v)
    return np.kron(np.eye(p), v) @ q / np.linalg.norm(v)


def hadamard(n):
    """The orthonormal Hadamard matrix in Sylvester's order."""
    H = np.ones((1, 1))
    while len(H) < n:
        H = np.block([[H, H], [H, -H]])
    return H / np.sqrt(n)

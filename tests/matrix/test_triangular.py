"""Triangular systems: those of a batch are those of each matrix, and two of them side by side come to an end."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpfq.matrix.triangular import solve_triangular

MANY = """
import jax, jax.numpy as jnp, jpfq
from jpfq.matrix import Gram, recipe_of, solve_coupled
jax.config.update("jax_enable_x64", True)
k = jax.random.split(jax.random.key(0), 3)
X = jax.nn.relu(jax.random.normal(k[0], (3, 300, 130)))
gram = jax.vmap(Gram.from_data)(X, X + 0.05 * jax.random.normal(k[1], X.shape))
W = jax.random.normal(k[2], (3, 130, 40))
system = jax.jit(jax.vmap(jpfq.GPTAQ()))
recipe = recipe_of(4, None, form="gram", method=jpfq.GPFQ(), scale=jpfq.scale.AbsMax(), finish=None)
F = jnp.einsum("bij,bik->bjk", W, W)
for _ in range(1000):
    jax.block_until_ready(system(W, gram))
for _ in range(300):
    jax.block_until_ready(solve_coupled(W, gram, F, recipe, None, 0.01, 10))
"""


@pytest.mark.parametrize("how", [{}, {"lower": True, "unit_diagonal": True}, {"trans": 1}])
def test_each_of_a_batch_is_solved_by_itself(how, x64):
    k = jax.random.split(jax.random.key(0))
    A, B = jax.random.normal(k[0], (3, 20, 20)) + 9 * jnp.eye(20)[None], jax.random.normal(k[1], (3, 20, 4))
    found = jax.vmap(lambda A, B: solve_triangular(A, B, **how))(A, B)
    part = np.tril(A) if how.get("lower") else np.triu(A)
    if how.get("unit_diagonal"):
        part = part - part * np.eye(20) + np.eye(20)
    expected = np.linalg.solve(part.transpose(0, 2, 1) if how.get("trans") else part, B)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    shared = jax.vmap(lambda B: solve_triangular(A[0], B, **how))(B)
    np.testing.assert_allclose(shared[0], expected[0], rtol=1e-9)


@pytest.mark.slow
def test_solves_side_by_side_come_to_an_end():
    subprocess.run([sys.executable, "-c", MANY], check=True, timeout=400)

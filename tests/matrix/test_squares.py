"""Square errors made of products that are there anyway: each equals what it stands for."""

import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from jpfq.matrix.half import quadratics, triangular
from tests.helpers import PLAIN, assert_close, problem
from tests.reference import gpfq


@pytest.mark.parametrize("n", [1, 700, 2101])
def test_halves_of_a_product(n, x64):
    rng = np.random.default_rng(n)
    M, B = jnp.asarray(rng.standard_normal((2, n, n))), jnp.asarray(rng.standard_normal((n, 3)))
    for k in (-1, 0):
        assert_close(triangular(M[0], B, k), np.tril(M[0], k) @ B)
    for k in (0, 1):
        assert_close(triangular(M[0], B, k, above=True), np.triu(M[0], k) @ B)
    assert_close(quadratics(B, M[0], M[1]), np.einsum("io,kij,jo->k", B, M, B))


def test_what_the_arguments_of_gpfq_tell(x64):
    X, Xq, W = problem(5, n=40, out=6, drift=0.3, dead=(0, 7))
    gram, method = jpfq.Gram.from_data(X, Xq), jpfq.GPFQ()
    system = method(jnp.asarray(W), gram)
    q = np.random.default_rng(1).standard_normal(W.shape)
    e = W - q
    arguments = np.asarray(system.base) + np.asarray(system.L) @ e
    found = method.below(gram, jnp.asarray(e), jnp.asarray(arguments - W))
    expected = np.sum((Xq @ e) ** 2, 0) + 2 * np.sum(e * (np.tril(Xq.T @ (X - Xq)) @ W), 0)
    assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("drift", [0, 0.3])
@pytest.mark.parametrize("method", [jpfq.GPFQ(), jpfq.UNI(3.0), jpfq.OPTQ(), jpfq.MSQ()], ids=str)
def test_figures_of_a_solve_in_several_blocks(method, drift, x64):
    """More inputs than one block holds; some of them dead, and the others out of order."""
    X, Xq, W = problem(6, m=1100, n=1030, out=4, drift=drift, dead=(0, 300))
    settings = PLAIN | {"method": method, "bits": 3, "scale": jpfq.scale.AbsMax(), "order": jpfq.order.Descending()}
    tensor, info = jpfq.solve(W, jpfq.Gram.from_data(X, Xq if drift else None), **settings)
    q, Xq = np.asarray(tensor.dequantize()), Xq if drift else X
    assert_close(info.relative_error, gpfq.relative_error(X, W, Xq, q))
    assert_close(info.energy, np.sum((X @ W) ** 2))
    assert_close(info.square_error, np.sum((X @ W - Xq @ q) ** 2))
    if isinstance(method, jpfq.MSQ) or not drift:
        floor = np.sum(((X - Xq) @ W) ** 2)
        assert_close(info.square_floor, floor)
    else:
        assert 0 < info.square_floor < info.square_error

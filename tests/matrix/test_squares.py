"""Square errors made of products that are there anyway: each equals what it stands for."""

import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from jpfq.matrix.split import halves, triangular
from tests.helpers import PLAIN, assert_close, problem
from tests.reference import gpfq


@pytest.mark.parametrize("n", [1, 255, 700, 2100])
def test_halves_of_a_product(n, x64):
    rng = np.random.default_rng(n)
    M, B = jnp.asarray(rng.standard_normal((n, n))), jnp.asarray(rng.standard_normal((n, 3)))
    assert_close(triangular(M, B), np.tril(M) @ B)
    assert_close(triangular(M, B, above=True), np.triu(M, 1) @ B)
    runs = halves(n)
    assert [first for first, _ in runs[1:]] == [last for _, last in runs[:-1]]
    assert runs[-1][1] == n


@pytest.mark.parametrize("method", [jpfq.GPFQ(), jpfq.UNI(3.0)], ids=["GPFQ", "UNI"])
def test_quadratic_from_what_is_fed(method, x64):
    X, Xq, W = problem(5, n=40, out=6, drift=0.3, dead=(0, 7))
    gram = jpfq.Gram.from_data(X, Xq)
    system = method(jnp.asarray(W), gram)
    e = np.random.default_rng(1).standard_normal(W.shape)
    found = method.quadratic(gram, jnp.asarray(e), jnp.asarray(np.asarray(system.L) @ e))
    assert_close(found, np.sum((Xq @ e) ** 2, 0))


@pytest.mark.parametrize("drift", [0, 0.3])
@pytest.mark.parametrize("method", [jpfq.GPFQ(), jpfq.UNI(3.0), jpfq.OPTQ(), jpfq.MSQ()], ids=str)
def test_figures_of_a_solve_in_several_runs(method, drift, x64):
    """More inputs than one run of coordinates holds; some of them dead, and the others out of order."""
    X, Xq, W = problem(6, m=700, n=600, out=4, drift=drift, dead=(0, 300))
    settings = PLAIN | {"method": method, "bits": 3, "scale": jpfq.AbsMax(), "order": jpfq.Descending()}
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

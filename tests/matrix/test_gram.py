"""Gram: sums over rows. Batches, weights, devices, permutations; the error it predicts is the error itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jpfq
from jpfq.matrix import arrays
from tests.helpers import assert_close, problem

M, N = 24, 6


def integers(seed=0, m=M):
    """Data of small integers: every sum over them is exact in float32, in any order."""
    rng = np.random.default_rng(seed)
    draw = lambda: rng.integers(-4, 5, (m, N)).astype(np.float32)
    return draw(), draw()


def assert_grams_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b)


def test_fields_are_the_products():
    X, Xq = integers()
    gram = jpfq.Gram.from_data(X, Xq)
    np.testing.assert_array_equal(gram.H, Xq.T @ Xq)
    np.testing.assert_array_equal(gram.C, Xq.T @ (X - Xq))
    np.testing.assert_array_equal(gram.drift, (X - Xq).T @ (X - Xq))
    np.testing.assert_array_equal(gram.G, Xq.T @ X)
    np.testing.assert_array_equal(gram.diagonal, (Xq**2).sum(0))
    np.testing.assert_array_equal(gram.sum_X, X.sum(0))
    np.testing.assert_array_equal(gram.sum_Xq, Xq.sum(0))
    assert gram.count == M
    assert_close(gram.mean_X, X.mean(0))
    assert_close(gram.mean_Xq, Xq.mean(0))


def test_without_Xq_it_is_that_of_equal_networks():
    X, _ = integers(1)
    alone, twice = jpfq.Gram.from_data(X), jpfq.Gram.from_data(X, X)
    assert alone.C is None
    assert alone.drift is None
    assert not twice.C.any()
    assert not twice.drift.any()
    for name in ("H", "G", "diagonal", "sum_X", "sum_Xq", "count"):
        np.testing.assert_array_equal(getattr(alone, name), getattr(twice, name))


@pytest.mark.parametrize("sizes", [(12, 12), (5, 7, 12), (1, 23)])
@pytest.mark.parametrize("agree", [True, False])
def test_batches_in_any_split_are_one_batch(sizes, agree):
    X, Xq = integers(2)
    parts = np.split(np.arange(M), np.cumsum(sizes)[:-1])
    batch = lambda rows: (X[rows], None if agree else Xq[rows])
    gram = jpfq.Gram.from_data(*batch(parts[0]))
    for rows in parts[1:]:
        gram = gram.update(*batch(rows))
    assert_grams_equal(gram, jpfq.Gram.from_data(*batch(np.arange(M))))


def test_merge_where_the_networks_agree_on_one_side_only():
    X, Xq = integers(3)
    Xq[12:] = X[12:]
    first, second = jpfq.Gram.from_data(X[:12], Xq[:12]), jpfq.Gram.from_data(X[12:])
    whole = jpfq.Gram.from_data(X, Xq)
    assert_grams_equal(first.merge(second), whole)
    assert_grams_equal(second.merge(first), whole)


def test_rows_may_have_several_axes():
    X, Xq = integers(4)
    cube = lambda x: x.reshape(4, 2, 3, N)
    assert_grams_equal(jpfq.Gram.from_data(cube(X), cube(Xq)), jpfq.Gram.from_data(X, Xq))


def test_weights_repeat_rows_and_leave_them_out():
    X, Xq = integers(5)
    weights = np.arange(M) % 3
    repeated = np.repeat(np.arange(M), weights)
    expected = jpfq.Gram.from_data(X[repeated], Xq[repeated])
    assert_grams_equal(jpfq.Gram.from_data(X, Xq, weights), expected)
    assert_grams_equal(jpfq.Gram.from_data(X, None, weights), jpfq.Gram.from_data(X[repeated]))
    assert float(expected.count) == weights.sum()


def test_weights_of_the_leading_axes_serve_all_rows_below():
    X, Xq = integers(6)
    per_sample = np.array([1, 0, 2, 1])
    cube = lambda x: x.reshape(4, 6, N)
    spread = jpfq.Gram.from_data(X, Xq, np.repeat(per_sample, 6))
    assert_grams_equal(jpfq.Gram.from_data(cube(X), cube(Xq), per_sample), spread)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int8])
def test_low_precision_inputs_are_summed_in_float32(dtype):
    X = jnp.full((300, 2), 1, dtype)  # a sum in bfloat16 would stop at 256, one in int8 at 127
    gram = jpfq.Gram.from_data(X, X)
    assert {leaf.dtype for leaf in jax.tree.leaves(gram)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_array_equal(gram.H, np.full((2, 2), 300))


def test_float64_stays(x64):
    X, Xq, _ = problem(0, m=M, n=N)
    gram = jpfq.Gram.from_data(X, Xq)
    assert {leaf.dtype for leaf in jax.tree.leaves(gram)} == {jnp.dtype(jnp.float64)}
    assert_close(gram.H, Xq.T @ Xq)
    assert_close(gram.C, Xq.T @ (X - Xq))


@pytest.mark.parametrize("agree", [True, False])
@pytest.mark.parametrize("wide", [True, False])
def test_errors_are_those_of_the_data(x64, agree, wide):
    X, Xq, W = problem(1, m=M, n=N, drift=0 if agree else 0.05)
    q = np.round(4 * W) / 4
    gram = jpfq.Gram.from_data(X, None if agree else Xq)
    if not wide:
        X, Xq, W, q = (np.float32(x) for x in (X, Xq, W, q))
        gram = jpfq.Gram.from_data(X, None if agree else Xq)
    direct = lambda *x: np.sum(np.float64(x[0]) ** 2, axis=0)
    exact = lambda x: np.asarray(x, np.float64)
    if not agree:
        assert_close(gram.square_error(W, q), direct(exact(X) @ exact(W) - exact(Xq) @ exact(q)))
        assert_close(gram.square_error(W, np.zeros_like(W)), direct(exact(X) @ exact(W)))
    else:
        assert_close(gram.square_error(W, q), direct(exact(X) @ (exact(W) - exact(q))))
    assert_close(gram.energy(W), direct(exact(X) @ exact(W)))


def test_a_small_error_does_not_drown_in_a_large_energy():
    """||X w||^2 - .. + q^T H q would lose all digits here: the error is 1e-9 of the energy, below float32's epsilon."""
    X, Xq, W = (np.float32(x) for x in problem(2, m=M, n=N, drift=1e-5))
    q = W * np.float32(1 + 2**-15)
    direct = np.sum((np.float64(X) @ np.float64(W) - np.float64(Xq) @ np.float64(q)) ** 2, axis=0)
    gram = jpfq.Gram.from_data(X, Xq)
    assert (direct < 1e-8 * np.asarray(gram.energy(W))).all()
    np.testing.assert_allclose(gram.square_error(W, q), direct, rtol=2e-3)


def test_permute_is_the_gram_of_permuted_inputs():
    X, Xq = integers(7)
    p = np.random.default_rng(0).permutation(N)
    assert_grams_equal(jpfq.Gram.from_data(X, Xq).permute(p), jpfq.Gram.from_data(X[:, p], Xq[:, p]))
    assert_grams_equal(jpfq.Gram.from_data(X).permute(p), jpfq.Gram.from_data(X[:, p]))


def test_rows_are_the_data_behind_a_gram():
    X, Xq = integers(8)
    p = np.random.default_rng(1).permutation(N)
    for rows in (jpfq.Rows(jnp.asarray(X), jnp.asarray(Xq)), jpfq.Rows(jnp.asarray(X))):
        gram = jpfq.Gram.from_data(rows.X, rows.Xq)
        assert_grams_equal(rows.gram(), gram)
        np.testing.assert_array_equal(rows.diagonal, gram.diagonal)
        np.testing.assert_array_equal(rows.quantized, X if rows.Xq is None else Xq)
        assert_grams_equal(rows.permute(p).gram(), gram.permute(p))


@pytest.mark.parametrize("agree", [True, False])
def test_two_devices_make_the_gram_of_one(agree):
    assert jax.device_count() >= 2, "conftest asks XLA for two host devices"
    mesh = Mesh(jax.devices()[:2], ("data",))
    X, Xq = integers(9)
    batch = (X, None if agree else Xq)
    summed = jax.shard_map(
        lambda *batch: jax.lax.psum(jpfq.Gram.from_data(*batch), "data"), mesh=mesh, in_specs=P("data"), out_specs=P()
    )
    expected = jpfq.Gram.from_data(*batch)
    assert_grams_equal(jax.jit(summed)(*batch), expected)
    placed = jax.device_put(batch, NamedSharding(mesh, P("data")))
    assert_grams_equal(jax.jit(jpfq.Gram.from_data)(*placed), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda X: jpfq.Gram.from_data(X, X[:, :3]), r"one shape.*\(24, 6\) and \(24, 3\)"),
        (lambda X: jpfq.Rows(X, X[:3]), r"one shape.*\(24, 6\) and \(3, 6\)"),
        (lambda X: jpfq.Gram.from_data(X[0]), r"at least two axes; got shape \(6,\)"),
        (lambda X: jpfq.Gram.from_data(X, None, np.ones(5)), r"shape \(5,\) do not fit rows of shape \(24,\)"),
        (lambda X: jpfq.Gram.from_data(X * 1j), "real numbers; got complex64"),
    ],
)
def test_bad_data(make, message):
    with pytest.raises(ValueError, match=message):
        make(integers(10)[0])


@pytest.mark.parametrize("n", [8, 9])
def test_half_of_a_symmetric_product_is_copied(x64, monkeypatch, n):
    """The whole product comes out; the part below the diagonal block is the one beside it."""
    monkeypatch.setattr(arrays, "HALVES", 4)
    X, Xq, _ = problem(n=n)
    weights = np.arange(len(X)) % 3 * 1.0
    gram = jpfq.Gram.from_data(jnp.asarray(X), jnp.asarray(Xq), jnp.asarray(weights))
    for found, rows in ((gram.H, Xq), (gram.drift, X - Xq)):
        np.testing.assert_allclose(found, rows.T @ (weights[:, None] * rows), rtol=1e-12, atol=1e-12)
        np.testing.assert_array_equal(found[n // 2 :, : n // 2], found[: n // 2, n // 2 :].T)

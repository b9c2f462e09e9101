"""Binary embeddings: fast maps that are the matrices they claim to be, and distances that survive one bit."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jpfq
from jpfq.embed import FJLT, Memoryless, SigmaDelta, SparseGaussian, hadamard
from jpfq.embed.row_blocks import LEAST, at_once, by_rows
from tests.helpers import assert_close
from tests.reference import noise_shaping as reference


def dense(sparse):
    """The matrix (m, n) of a sparse map."""
    A = np.zeros((sparse.m, sparse.inputs))
    for columns, entries in zip(np.asarray(sparse.columns), np.asarray(sparse.entries)):
        A[np.arange(sparse.m), columns] += entries
    return A


@pytest.mark.parametrize("n", [1, 2, 32])
def test_hadamard_is_the_matrix(x64, n):
    X = np.random.default_rng(n).standard_normal((2, 3, n))
    assert_close(hadamard(jnp.asarray(X)), X @ reference.hadamard(n).T)
    assert_close(hadamard(hadamard(jnp.asarray(X))), X)


def test_a_sparse_map_is_its_matrix_and_costs_its_nonzeros(x64):
    """Entries are nonzero with the probability given, with mean 0 and variance 1: to five deviations."""
    sparse = SparseGaussian.sample(jax.random.key(0), 100, 2000, 0.1)
    A = dense(sparse)
    X = np.random.default_rng(0).standard_normal((3, 100))
    assert_close(sparse(jnp.asarray(X)), X @ A.T)
    size = A.size
    assert abs((A != 0).mean() - 0.1) < 5 * np.sqrt(0.1 * 0.9 / size)
    assert abs(A.mean()) < 5 / np.sqrt(size)
    assert abs((A**2).mean() - 1) < 5 * np.sqrt((3 / 0.1 - 1) / size)
    counts = (A != 0).sum(1)
    assert 0.8 < counts.var() / (100 * 0.1 * 0.9) < 1.2  # binomial in every row
    per_column = (A != 0).sum(0)
    assert 0.4 < per_column.var() / (2000 * 0.1 * 0.9) < 2  # and no column is preferred
    assert sparse.entries.shape[0] == counts.max() < 30  # what is stored and visited, of 100


def test_a_transform_comes_before_the_sparse_map(x64):
    """A H D x, of vectors filled up to a power of two: |H D x| = |x| and no entry stands out."""
    fast = FJLT.sample(jax.random.key(1), 50, 300, 0.2)
    X = np.random.default_rng(1).standard_normal((4, 50))
    full = np.pad(X * np.asarray(fast.signs), ((0, 0), (0, 14)))
    assert_close(fast(jnp.asarray(X)), full @ reference.hadamard(64).T @ dense(fast.sparse).T)
    assert set(np.unique(fast.signs)) == {-1.0, 1.0}
    assert (fast.inputs, fast.m, fast.sparse.inputs) == (50, 300, 64)


@pytest.mark.parametrize(("order", "width", "map", "loss"), [(1, 129, SparseGaussian, 0.2), (2, 65, FJLT, 0.03)])
def test_distances_are_preserved(order, width, map, loss):
    """Unquantized, averages of 100 half-normals, to five deviations; one bit takes little from them, order 2 less."""
    X = np.random.default_rng(2).standard_normal((9, 48))
    drawn = map.sample(jax.random.key(order), 48, 100 * width, 0.5)
    some = jpfq.BinaryEmbedding(drawn, SigmaDelta(order, width), scale=33.0)
    codes, stability = some.transform(jnp.asarray(X, jnp.float32))
    assert stability.stable.all()
    a, f = some.condense(codes), some.features(jnp.asarray(X, jnp.float32))
    found, unquantized = np.asarray(some.distance(a, a)), np.asarray(some.distance(f, f))
    exact = np.linalg.norm(X[:, None] - X[None], axis=-1)
    off = exact > 0
    assert np.abs(unquantized[off] / exact[off] - 1).max() < 5 * np.sqrt((np.pi / 2 - 1) / 100)
    assert np.abs(found[off] / unquantized[off] - 1).max() < loss
    np.testing.assert_array_equal(found[~off], 0)


@pytest.mark.slow
def test_rows_on_two_devices_have_the_same_codes():
    """Through the transform and the sparse map too, in blocks of rows as one by one, and no device needs another's rows."""
    some = jpfq.BinaryEmbedding(FJLT.sample(jax.random.key(4), 24, 2040, 0.3), SigmaDelta(1, 12), scale=20.0)
    X = jnp.asarray(np.random.default_rng(5).standard_normal((130, 24)), jnp.float32)
    assert X.shape[0] * some.m > at_once()
    placed = jax.device_put(X, NamedSharding(Mesh(jax.devices()[:2], ("rows",)), P("rows")))
    codes, (sharded, stability) = some.transform(X)[0], some.transform(placed)
    np.testing.assert_array_equal(sharded, codes)
    assert sharded.sharding.is_equivalent_to(placed.sharding, 2)
    assert stability.peak.sharding.is_equivalent_to(NamedSharding(placed.sharding.mesh, P("rows")), 1)
    np.testing.assert_array_equal(jax.vmap(lambda x: some.transform(x)[0])(X), codes)
    program = str(jax.jit(lambda X: some.transform(X)).lower(placed).compile().as_text())
    assert "while" in program
    assert not {word for word in ("all-gather", "all-to-all", "collective-permute") if word in program}


@pytest.mark.slow
def test_a_mesh_with_explicit_axes_gives_the_same_and_gets_it_back():
    """As `jax.make_mesh` makes one, whether or not it is the mesh in use."""
    mesh = jax.make_mesh((2,), ("rows",), axis_types=(jax.sharding.AxisType.Explicit,))
    some = jpfq.BinaryEmbedding(FJLT.sample(jax.random.key(4), 24, 60, 0.5), SigmaDelta(1, 12), scale=20.0)
    X = jnp.asarray(np.random.default_rng(5).standard_normal((10, 24)), jnp.float32)
    placed = jax.device_put(X, NamedSharding(mesh, P("rows")))
    codes, vectors = some.transform(X)[0], some.condense(some.transform(X)[0])
    for used in (contextlib.nullcontext(), jax.set_mesh(mesh)):
        with used:
            found, stability = some.transform(placed)
            condensed = some.load(some.store(found))
            distances = some.distance(condensed, condensed)
        assert found.sharding.is_equivalent_to(NamedSharding(mesh, P("rows", None)), 2)
        assert found.sharding.mesh == condensed.sharding.mesh == stability.peak.sharding.mesh == mesh
        np.testing.assert_array_equal(found, codes)
        np.testing.assert_allclose(condensed, vectors, rtol=1e-6)
        np.testing.assert_allclose(distances, some.distance(vectors, vectors), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lead", [(150,), (2, 75), (75, 2), (5, 131, 1)])
def test_blocks_of_rows_are_all_rows(lead):
    """Every row once in its place, with what belongs to it, whatever their number, in blocks much smaller than all."""
    X = np.arange(3.0 * np.prod(lead)).reshape(*lead, 3)
    numbers, seen = np.arange(np.prod(lead)).reshape(lead), []

    def f(X, numbers):
        seen.append(numbers.shape)
        return {"sum": X.sum(-1), "both": X * numbers[..., None].astype(X.dtype)}

    found = by_rows(f, 3, jnp.asarray(X, jnp.float32), jnp.asarray(numbers), most=1)
    np.testing.assert_array_equal(found["sum"], X.sum(-1))
    np.testing.assert_array_equal(found["both"], np.float32(X) * np.float32(numbers[..., None]))
    assert max(map(np.prod, seen)) < LEAST + 2 * np.prod(lead) / max(lead)
    assert by_rows(lambda x: x.shape, 3, jnp.asarray(X), most=X.size) == X.shape


def test_vectors_too_large_for_the_alphabet_are_named():
    drawn = SparseGaussian.sample(jax.random.key(1), 64, 128, 0.5)
    some = jpfq.BinaryEmbedding(drawn, SigmaDelta(1, 16))
    X = jnp.ones((2, 64)).at[0].mul(0.02)
    np.testing.assert_array_equal(some.transform(X)[1].stable, [True, False])


def test_plain_signs_measure_angles():
    """Memoryless one bit: distances are those of Hamming, which see directions and no lengths."""
    drawn = SparseGaussian.sample(jax.random.key(3), 64, 2000, 0.5)
    some = jpfq.BinaryEmbedding(drawn, Memoryless())
    x = np.random.default_rng(3).standard_normal(64)
    y = np.random.default_rng(4).standard_normal(64)
    X = jnp.asarray(np.stack([x, 5 * x, y]), jnp.float32)
    codes, _ = some.transform(X)
    a = some.condense(codes)
    distances = np.asarray(some.distance(a, a))
    assert distances[0, 1] == 0
    hamming = (np.asarray(codes[0]) != np.asarray(codes[2])).mean()
    assert distances[0, 2] == pytest.approx(2 * np.sqrt(np.pi / 2) * hamming, rel=1e-5)
    angle = np.arccos(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    assert abs(hamming - angle / np.pi) < 5 * 0.5 / np.sqrt(2000)

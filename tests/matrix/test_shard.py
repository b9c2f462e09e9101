"""Neurons split over devices: the codes of one device, and nothing sent inside the recursion. Eight devices: eight.py."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jpfq
from jpfq.matrix import Devices, Rows, recipe_of, solve_all, solve_sharded
from jpfq.matrix.split import Split, diagonal, infinite, lower, padded, permuted, upper
from tests.helpers import PLAIN, assert_close, problem

ROOT = pathlib.Path(__file__).parents[2]


def on_eight(which):
    """What eight.py prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.matrix.eight", which]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: found for line in done.stdout.splitlines() for name, found in json.loads(line).items()}


@pytest.fixture(scope="module")
def few():
    return on_eight("few")


def assert_same(results):
    """Exactly the codes of one device in float64; in float32 but for a share of 1e-4."""
    cases = {name: found for name, found in results.items() if name != "control"}
    for name, found in cases.items():
        exact = found["float64"]
        assert exact["shape"], name
        assert exact["differ"] == 0, name
        assert exact["steps"] < 1e-12, name
        assert exact["values"] < 1e-12, name
        assert exact["figures"] < 1e-6, name  # some are means in float32
    single = [found["float32"] for found in cases.values() if "float32" in found]
    if single:
        assert sum(x["differ"] for x in single) <= 1e-4 * sum(x["codes"] for x in single)
    return len(cases)


def assert_silent(results):
    """Nothing is sent between the coordinates of a neuron; in other loops rows of a split Gram, or one number."""
    assert results["control"]["recursion"] == ["all-gather f32[4,4]"]
    for name, found in results.items():
        for case in found.values() if name != "control" else ():
            assert case["recursions"] > 0, name
            assert case["recursion"] == [], name
            assert not [x for x in case["loops"] if x.startswith("all-gather")], name
            if name.startswith("shared"):  # in the loop over steps the error of all neurons of each of three matrices
                assert case["loops"] == ["all-reduce f64[3]"], name
            elif not name.startswith("split"):
                assert case["loops"] == [], name


@pytest.mark.slow
def test_eight_devices_give_the_codes_of_one(few):
    assert assert_same(few) == 4


@pytest.mark.slow
def test_nothing_is_sent_inside_the_recursion(few):
    assert_silent(few)


@pytest.mark.slow
def test_a_split_gram_comes_a_block_of_rows_at_a_time(few):
    """Eight rows for the recursion, sixteen for the products."""
    assert few["split"]["float64"]["loops"] == ["all-reduce f64[16,40]", "all-reduce f64[8,40]"]


@pytest.mark.slow
def test_every_method_and_rounding_on_eight_devices():
    results = on_eight("all")
    assert assert_same(results) == 33
    for found in results.values():
        found.pop("float32", None)
    assert_silent(results)


@pytest.fixture
def two():
    return Devices(Mesh(np.array(jax.devices()[:2]), ("x",)), ("x",))


def test_a_split_matrix_is_the_matrix(two):
    rng = np.random.default_rng(0)
    n, more = 10, 6
    M, B, p = rng.standard_normal((n, n)), rng.standard_normal((n, 3)), rng.permutation(n)
    column = rng.standard_normal((n, 1))
    M, B, column, p = *(jnp.asarray(x, jnp.float32) for x in (M, B, column)), jnp.asarray(p)

    def through(M):
        L = column * lower(permuted(permuted(M, p), p), -1)
        U = upper(permuted(M, p), 1)
        times = (lambda A: A.times(B)) if isinstance(M, Split) else (lambda A: A @ B)
        unwound = L.unwound(B) if isinstance(M, Split) else jnp.linalg.solve(L + jnp.eye(n), B)
        rows = lambda M, first: M.rows(first, 4) if isinstance(M, Split) else M[first : first + 4]
        return times(L), times(U), rows(U, 3), rows(padded(L, more), 8), diagonal(permuted(M, p)), unwound, infinite(M)

    split = jax.shard_map(
        lambda mine: through(Split(mine, axis="x")), mesh=two.mesh, in_specs=P("x"), out_specs=P(), check_vma=False
    )
    found, expected = jax.jit(split)(M), through(M)
    assert found[3].shape == (4, n + more)
    for a, b in zip(found[:-1], expected[:-1], strict=True):
        assert_close(a, b)
    assert found[-1] == expected[-1] == 0
    assert jax.jit(split)(M.at[7, 2].set(jnp.nan))[-1] == 1


def test_fewer_neurons_than_devices_are_solved_whole(two):
    X, Xq, W = (jnp.asarray(x, jnp.float32)[None] for x in problem(3, out=1))
    recipe = recipe_of(3, None, **PLAIN | {"form": "data", "method": jpfq.GPFQ()})
    one, many = solve_all(W, Rows(X, Xq), recipe, None), solve_sharded(W, Rows(X, Xq), recipe, None, two)
    np.testing.assert_array_equal(one.codes, many.codes)


@pytest.mark.parametrize(
    ("changes", "by_rows"),
    [
        ({}, True),
        ({"method": jpfq.OPTQ()}, False),
        ({"rotation": jpfq.Hadamard()}, False),
        ({"shrinkage": jpfq.Shrinkage()}, False),
        ({"prepare": (jpfq.prepare.Align(),)}, False),
        ({"order": jpfq.order.MinPivot()}, False),
    ],
)
def test_what_needs_the_gram_whole(changes, by_rows):
    from jpfq.matrix.shard import by_rows as found

    assert found(recipe_of(3, None, **PLAIN | {"method": jpfq.GPFQ()} | changes)) is by_rows

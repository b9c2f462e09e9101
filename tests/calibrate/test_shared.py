"""Kernels that several products share: one set of codes, from the sum of the Grams of all uses.

Two towers of one network over two inputs are that network over both inputs, one after the other: the codes must be those.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jpfq
from jpfq.model.program import trace
from jpfq.model.sites import find_sites, with_shared_together
from tests.network import zoo
from tests.reference import gpfq as reference

PARAMS = {"a": zoo.normal(0, 8, 8) / 3, "bias": zoo.normal(4, 8), "b": zoo.normal(1, 8, 8) / 3}
BATCHES = [(zoo.normal(10 + i, 24, 8), 1 + 0.5 * zoo.normal(20 + i, 24, 8)) for i in range(2)]
STACKED = [jnp.concatenate(batch) for batch in BATCHES]


def tower(params, x):
    return jnp.tanh(jnp.tanh(x @ params["a"] + params["bias"]) @ params["b"])


def towers(params, left, right):
    """The first tower is done before the second begins: their layers must be brought together."""
    return tower(params, left), tower(params, right)


def assert_same(found, expected):
    assert set(found.tensors) == set(expected.tensors)
    for path, tensor in expected.tensors.items():
        np.testing.assert_array_equal(found.tensors[path].codes, tensor.codes, path)
        assert float(found.info[path].relative_error) == pytest.approx(
            float(expected.info[path].relative_error), rel=1e-4
        )


RULES = {
    "gram": zoo.plain(bits=3),
    "data": zoo.plain(bits=3, form="data"),
    "centred": zoo.plain(bits=3, correct_bias=True),
    "rotated": zoo.plain(bits=3, rotation=jpfq.Hadamard(1)),
    "best": jpfq.Rule(".*", bits=3),
}


@pytest.mark.parametrize(
    "name", ["gram", "centred", *(pytest.param(name, marks=pytest.mark.slow) for name in ("data", "rotated", "best"))]
)
def test_two_towers_are_one_network_over_both_inputs(name):
    found = jpfq.quantize(towers, BATCHES, RULES[name], params=PARAMS)
    expected = jpfq.quantize(tower, STACKED, RULES[name], params=PARAMS)
    assert_same(found, expected)
    assert found.biases == expected.biases
    for path, leaf in expected.params.items():
        np.testing.assert_allclose(found.params[path], leaf, rtol=1e-5, atol=1e-6)
    assert found.uses == {"a": 2, "b": 2}
    assert "a (2), b (2)" in found.summary()
    assert not expected.uses


def test_by_hand():
    """GPFQ in float64 on the rows of both towers, each layer after the one before, with the steps that were chosen."""
    found = jpfq.quantize(towers, BATCHES, RULES["gram"], params=PARAMS)
    X = Xq = np.concatenate([np.concatenate(batch) for batch in zip(*BATCHES)]).astype(np.float64)
    for path in ("a", "b"):
        tensor, W = found.tensors[path], np.asarray(PARAMS[path], np.float64)
        steps, zeros = (np.asarray(x, np.float64) for x in (tensor.step, tensor.zero))
        index, q, _ = reference.gpfq_state(W, X, Xq, reference.level_lists(W.shape, steps, range(-4, 4), zeros))
        np.testing.assert_array_equal(index - 4, tensor.codes)
        bias = np.asarray(PARAMS["bias"], np.float64) if path == "a" else 0
        X, Xq = np.tanh(X @ W + bias), np.tanh(Xq @ q + bias)


def test_each_use_rounds_its_own_inputs():
    """Ranges are those of each tower; a run that goes on, fresh batches and an offloaded one give the same."""
    rule = zoo.plain(bits=4, activations=jpfq.Activations(jpfq.Asymmetric(6), jpfq.ranges.Max()))
    found = jpfq.quantize(towers, BATCHES, rule, params=PARAMS)
    for use, inputs in enumerate(zip(*BATCHES)):
        x = np.concatenate(inputs)
        step = (max(x.max(), 0) - min(x.min(), 0)) / 63
        np.testing.assert_allclose(found.inputs["a"][use].levels.step, step, rtol=1e-5)
    square = lambda pairs: sum(float(jnp.sum((a - b) ** 2)) for a, b in pairs)
    for output in (0, 1):
        pairs = [(towers(PARAMS, *batch)[output], found.apply(batch)[output]) for batch in BATCHES]
        error = np.sqrt(square(pairs) / square((a, jnp.zeros_like(a)) for a, _ in pairs))
        assert error <= found.output_error * 1.001
    assert found.output_error < 0.2
    np.testing.assert_allclose(found.apply_integer(BATCHES[0])[1], found.apply(BATCHES[0])[1], atol=1e-4)
    assert len(jpfq.certify(found).sites) == 4


@pytest.mark.slow
def test_every_way_to_run_it(tmp_path):
    rule = zoo.plain(bits=3, activation_bits=6)
    run = lambda batches=BATCHES, **given: jpfq.quantize(towers, batches, rule, params=PARAMS, **given)
    expected = run(checkpoint=tmp_path / "run")
    removed = sorted((tmp_path / "run").glob("site-*"))
    assert len(removed) == 2  # one record for each kernel
    removed[-1].unlink()
    for found in (run(checkpoint=tmp_path / "run"), run(offload=True), run(lambda number: BATCHES)):
        assert_same(found, expected)
        assert found.inputs["b"][1].levels.step == expected.inputs["b"][1].levels.step
    expected.save(tmp_path / "saved")
    assert jpfq.load(tmp_path / "saved").uses == expected.uses
    again = jpfq.load(tmp_path / "saved", towers, params=PARAMS)
    np.testing.assert_array_equal(again.apply(BATCHES[0])[1], expected.apply(BATCHES[0])[1])
    plan = jpfq.plan(towers, BATCHES[0], rule, params=PARAMS, batches=2)
    assert [(line.path, line.rows, line.uses) for line in plan.lines] == [("a", 96, 2), ("b", 96, 2)]
    assert "8 x 8, shared by 2 products" in str(plan)
    assert "with 128 weights" in str(plan)


def mixed(params, left, right):
    """A key for one input only, queries for both; the head reads what both make."""
    one = jnp.tanh(left @ params["q"]) * jnp.tanh(left @ params["k"])
    return jnp.concatenate([one, jnp.tanh(right @ params["q"])], -1) @ params["head"]


@pytest.mark.slow
def test_stops_may_hold_shared_kernels_and_others():
    params = {"q": zoo.normal(0, 8, 8) / 3, "k": zoo.normal(1, 8, 8) / 3, "head": zoo.normal(2, 16, 3) / 4}
    found = jpfq.quantize(mixed, BATCHES, zoo.plain(bits=3), params=params)
    assert found.uses == {"q": 2}
    left = np.concatenate([batch[0] for batch in BATCHES])
    for path, rows in (("k", left), ("q", np.concatenate(STACKED))):
        tensor, _ = jpfq.solve(params[path], jpfq.Gram.from_data(jnp.asarray(rows)), bits=3, **zoo.PLAIN)
        np.testing.assert_array_equal(found.tensors[path].codes, tensor.codes)


def after_head(params, left, right):
    """One of the two inputs has been through a layer of its own by then, so only it differs in the networks."""
    return jnp.tanh(left @ params["shared"]), jnp.tanh(jnp.tanh(right @ params["own"]) @ params["shared"])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["gram", pytest.param("data", marks=pytest.mark.slow)])
def test_uses_that_differ_in_the_networks_and_uses_that_do_not(form):
    params = {"own": PARAMS["a"], "shared": PARAMS["b"]}
    rule = zoo.plain(bits=3, form=form)
    found = jpfq.quantize(after_head, BATCHES, rule, params=params)
    left, right = (np.concatenate(x) for x in zip(*BATCHES))
    X = np.concatenate([left, np.tanh(right @ params["own"])])
    Xq = np.concatenate([left, np.tanh(right @ found.params["own"])])
    tensor, _ = jpfq.solve(params["shared"], jpfq.Gram.from_data(*map(jnp.asarray, (X, Xq))), bits=3, **zoo.PLAIN)
    np.testing.assert_array_equal(found.tensors["shared"].codes, tensor.codes)
    space = jpfq.Space(lambda bits: zoo.plain(bits=bits, form=form), bits=[2, 3])
    sweep = jpfq.sweep(after_head, BATCHES, space, params=params)
    assert_same(sweep[1], found)
    assert sweep[1].uses == found.uses == {"shared": 2}


class Siamese(nn.Module):
    """Convolutions over images of two sizes, with other strides of one kernel than the module would have."""

    @nn.compact
    def __call__(self, left, right):
        conv, norm = nn.Conv(6, (3, 3), name="conv"), nn.BatchNorm(use_running_average=True, name="norm")
        dense, experts = nn.Dense(8, name="dense"), self.param("experts", nn.initializers.normal(0.3), (2, 8, 4))
        made = [dense(nn.relu(norm(conv(x))).mean((1, 2))) for x in (left, right)]
        return [jnp.einsum("bi,eio->beo", x, experts) for x in made]


class Layers(nnx.Module):
    """A stack of layers, run over two inputs by nnx.scan."""

    def __init__(self):
        self.stack = zoo.Stack(nnx.Rngs(0))

    def __call__(self, left, right):
        return self.stack(left), self.stack(right)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_frameworks_that_call_a_module_twice(kind):
    if kind == "linen":
        model, batches = Siamese(), [(zoo.normal(i, 2, 6, 6, 3), zoo.normal(5 + i, 2, 8, 8, 3)) for i in range(2)]
        shapes = jax.eval_shape(model.init, jax.random.key(0), *batches[0])
        rng = np.random.default_rng(0)
        given = {"variables": jax.tree.map(lambda x: jnp.asarray(rng.uniform(0.2, 1, x.shape), x.dtype), shapes)}
        expected = {"conv/kernel": 2, "dense/kernel": 2, "experts": 2}
    else:
        model, batches, given = Layers(), [(zoo.normal(i, 8, 16), zoo.normal(5 + i, 8, 16)) for i in range(2)], {}
        expected = {"stack/layers/kernel": 2}
    rule = zoo.plain(bits=6, correct_bias=kind == "linen", activation_bits=8)
    quantized = jpfq.quantize(model, batches, rule, **given)
    assert quantized.uses == expected
    assert set(quantized.tensors) == set(expected)
    assert quantized.biases == (("conv/bias", "dense/bias") if kind == "linen" else ())
    assert 0 < quantized.output_error < 0.1
    plain = jpfq.quantize(model, batches, zoo.plain(bits=6, method=jpfq.MSQ(), activation_bits=8), **given)
    assert quantized.output_error < plain.output_error


LEFT = {
    "recurrent": (lambda p, x, y: jnp.tanh(x @ p["w"]) @ p["w"], "shared: used by 2 products, of which one depends"),
    "turned": (lambda p, x, y: (x @ p["w"]) + y @ p["w"].T, "shared: used by 2 products, which do not take it"),
    "other axes": (lambda p, x, y: x @ p["w"] + jnp.einsum("bi,oi->bo", y, p["w"]), "which do not take it"),
    "gathered": (lambda p, x, y: p["w"][jnp.argmax(x, -1)] + y @ p["w"], "tied: used by a product and by"),
    "half": (lambda p, x, y: x[:, :4] @ p["w"][:4] + y[:, :4] @ p["w"][:4], "only 32 of its 64 entries"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_stays_left_out_says_why(name):
    fn, reason = LEFT[name]
    model = lambda p, x, y: fn(p, x, y) @ p["head"]
    params = {"w": PARAMS["a"], "head": PARAMS["b"]}
    found = jpfq.plan(model, BATCHES[0], 4, params=params)
    assert found.skipped["w"].startswith(reason) or reason in found.skipped["w"]
    assert [line.path for line in found.lines] == ["head"]


def test_towers_in_opposite_orders_leave_one_kernel_out():
    """Each kernel's second use waits for the other kernel, so that only one can have all its inputs before it."""

    def crossed(p, x, y):
        return jnp.tanh(x @ p["a"]) @ p["b"], jnp.tanh(y @ p["b"]) @ p["a"]

    found = jpfq.plan(crossed, BATCHES[0], 4, params={name: PARAMS[name] for name in "ab"})
    assert [line.path for line in found.lines] == ["a"]
    assert "of which one depends on the output of another" in found.skipped["b"]


def test_the_order_of_equations_is_kept_where_nothing_is_shared():
    """And where something is, each equation still comes after what it reads, and outputs are the same."""
    program = trace(
        lambda p, x: tower({"a": p[0], "bias": p[1], "b": p[2]}, x), "abc", list(PARAMS.values()), STACKED[0]
    )
    assert with_shared_together(program, find_sites(program)[0])[0] is program
    program = trace(
        lambda p, x: towers({"a": p[0], "bias": p[1], "b": p[2]}, *x), "abc", list(PARAMS.values()), BATCHES[0]
    )
    new, sites = with_shared_together(program, find_sites(program)[0])
    assert sorted(map(id, new.equations)) == sorted(map(id, program.equations))
    known = {*new.params, *new.inputs, *new.constants}
    for eqn in new.equations:
        assert all(v in known for v in eqn.invars if not hasattr(v, "val"))
        known.update(eqn.outvars)
    assert [site.path for site in sites] == ["a", "a", "c", "c"]
    assert all(site.shares == (site.first, site.first + 1) for site in sites)


@pytest.mark.slow
def test_more_ways_to_run_it():
    """Coupled neurons, a budget, drawn patches of two sizes of images, blocks, and batches split over two devices."""
    rule = zoo.plain(bits=3, coupling=jpfq.Coupling(samples=512))
    found = jpfq.quantize(towers, BATCHES, rule, params=PARAMS)
    expected = jpfq.quantize(tower, STACKED, rule, params=PARAMS)
    same = [(found.tensors[path].codes == expected.tensors[path].codes).mean() for path in expected.tensors]
    assert min(same) > 0.7  # of draws that are not the same
    assert [r.pattern for r in jpfq.budget(towers, BATCHES, 3, params=PARAMS)] == ["a", "b"]
    single = jpfq.quantize(towers, BATCHES, zoo.plain(bits=3), params=PARAMS)
    blocks = jpfq.quantize(towers, BATCHES, zoo.plain(bits=3), params=PARAMS, reference="block")
    np.testing.assert_array_equal(blocks.tensors["a"].codes, single.tensors["a"].codes)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    place = lambda x: jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
    assert_same(jpfq.quantize(towers, jax.tree.map(place, BATCHES), zoo.plain(bits=3), params=PARAMS), single)
    convolve = lambda p, x, y: (zoo.convolve(x, p["k"], (2, 2)), zoo.convolve(y, p["k"]))
    images = [(zoo.normal(i, 2, 6, 6, 3), zoo.normal(5 + i, 2, 9, 9, 3)) for i in range(2)]
    kernel = {"k": zoo.normal(3, 3, 3, 3, 5)}
    drawn = zoo.plain(bits=3, patches=jpfq.patches.Random(0.5))
    assert jpfq.quantize(convolve, images, drawn, params=kernel, key=jax.random.key(0)).uses == {"k": 2}

"""Products of data with data, such as attention's: operands found by structure, rounded in the quantized network alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from jpfq.model.adapters import adapt
from jpfq.model.operands import find_operands
from jpfq.model.program import trace
from jpfq.model.sites import find_sites
from tests.network import zoo
from tests.reference import inputs as reference

KV4 = jpfq.Activations(jpfq.Asymmetric(4), per="row")
INT8 = jpfq.Activations(jpfq.Integer(8), per="row")
N, HEADS, SIZE = 16, 2, 8


def attention(params, x, mask=None):
    """One layer of causal attention, and a product after it."""
    heads = lambda name: (x @ params[f"attention/{name}"]).reshape(*x.shape[:2], HEADS, SIZE)
    scores = jnp.einsum("bqhd,bkhd->bhqk", heads("q"), heads("k")) / np.float32(SIZE**0.5)
    seen = jnp.tril(jnp.ones(2 * x.shape[1:2], bool))[None, None]
    seen = seen if mask is None else seen & mask[:, None, None, :]
    mixed = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(jnp.where(seen, scores, -1e9)), heads("v"))
    return jnp.tanh(mixed.reshape(*x.shape[:2], HEADS * SIZE)) @ params["out"]


def drawn(seed=0):
    shapes = {f"attention/{name}": (N, HEADS * SIZE) for name in "qkv"} | {"out": (HEADS * SIZE, 6)}
    return {name: zoo.normal(seed + i, *shape) / 4 for i, (name, shape) in enumerate(shapes.items())}


PARAMS, BATCHES = drawn(), zoo.batches(3, 7, N, count=2)


def quantized(rule, params=PARAMS, batches=BATCHES, **settings):
    return jpfq.quantize(attention, batches, rule, params=params, **settings)


def int8(x):
    """Rows of signed integers, by the reference."""
    return reference.in_blocks(x, x.shape[-1], lambda largest: largest / 127, np.arange(-128.0, 128))


def same(x):
    return np.asarray(x, np.float64)


def by_hand(params, x, *, query=same, key=same, probabilities=same, value=same):
    """The network in float64, each operand rounded by a function of rows."""
    x = np.asarray(x, np.float64)
    heads = lambda name: (x @ np.asarray(params[f"attention/{name}"], np.float64)).reshape(*x.shape[:2], HEADS, SIZE)
    q, k, v = query(heads("q")), key(heads("k")), value(heads("v"))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) / SIZE**0.5
    scores = np.where(np.tril(np.ones(2 * x.shape[1:2], bool)), scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p = probabilities(p / p.sum(-1, keepdims=True))
    mixed = np.einsum("bhqk,bkhd->bqhd", p, v)
    return np.tanh(mixed.reshape(*x.shape[:2], -1)) @ np.asarray(params["out"], np.float64)


def close(found, exact):
    """Equal but for a rounding at a tie, which few rows have."""
    off = np.abs(np.asarray(found) - exact).max(-1)
    return np.median(off) < 1e-5 * np.abs(exact).max() and off.max() < 0.05 * np.abs(exact).max()


@pytest.mark.slow
def test_apply_is_the_reference_with_every_operand_rounded():
    along_positions = lambda v: np.moveaxis(int8(np.moveaxis(v, 1, -1)), -1, 1)
    four = lambda x: reference.asymmetric(x, 4)
    both = quantized(zoo.plain(bits=8, products=INT8))
    exact = by_hand(both.params, BATCHES[0], query=int8, key=int8, probabilities=int8, value=along_positions)
    assert close(both.apply(BATCHES[0]), exact)
    cached = quantized(zoo.plain(bits=8, cache=KV4))
    exact = by_hand(cached.params, BATCHES[0], key=four, value=four)
    assert close(cached.apply(BATCHES[0]), exact)
    mixed = quantized(zoo.plain(bits=8, products=INT8, cache=KV4))
    exact = by_hand(mixed.params, BATCHES[0], query=int8, probabilities=int8, key=four, value=four)
    assert close(mixed.apply(BATCHES[0]), exact)
    for result in (
        both,
        cached,
        mixed,
    ):  # the quantized stream is the network that apply runs, the other one is in float
        floats = np.concatenate([by_hand(PARAMS, b) for b in BATCHES])
        found = np.concatenate([result.apply(b) for b in BATCHES])
        assert result.output_error == pytest.approx(np.linalg.norm(found - floats) / np.linalg.norm(floats), rel=1e-3)
    longer = zoo.normal(9, 2, 11, N)
    exact = by_hand(cached.params, longer, key=four, value=four)
    assert close(jax.jit(lambda x: cached.apply(x))(longer), exact)
    assert close(cached.serve()(longer), exact)


def names(fn, shape, params=None, variables=None):
    functional = adapt(fn, variables, params, None)
    program = trace(functional.fn, functional.paths, functional.leaves, shape)
    return [operand.path for operand in find_operands(program, find_sites(program)[0])]


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("grouped", [False, True])
def test_operands_are_known_by_the_softmax_between_them(swapped, grouped):
    """Whatever the order of operands, through transposes, masks, repeated heads and reshapes."""

    def model(p, x):
        split = lambda name: (x @ p[name]).reshape(*x.shape[:2], -1, 4)
        q, k, v = split("b/q"), split("b/k"), split("b/v")
        if grouped:
            q = q.reshape(*q.shape[:2], k.shape[2], -1, 4)
            scores = jnp.einsum(
                "btkd,bskgd->bkgst" if swapped else "bskgd,btkd->bkgst", *((k, q) if swapped else (q, k))
            )
            p = jax.nn.softmax(scores.reshape(x.shape[0], -1, *scores.shape[-2:])).reshape(scores.shape)
            return jnp.einsum("btkd,bkgst->bskgd" if swapped else "bkgst,btkd->bskgd", *((v, p) if swapped else (p, v)))
        q, k, v = (jnp.swapaxes(y, 1, 2) for y in (q, k, v))
        scores = k @ jnp.swapaxes(q, 2, 3) if swapped else jnp.swapaxes(q @ jnp.swapaxes(k, 2, 3), 2, 3)
        return jnp.swapaxes(jax.nn.softmax(scores, -2), 2, 3) @ v

    widths = {"b/q": 8, "b/k": 4 if grouped else 8, "b/v": 4 if grouped else 8}
    found = names(model, zoo.normal(0, 2, 5, 8), {name: zoo.normal(1, 8, width) for name, width in widths.items()})
    assert sorted(found) == ["b/key", "b/probabilities", "b/query", "b/value"]
    assert found.index("b/key") + found.index("b/query") == 1  # of the first product
    keys = [found[0] == "b/key", found[1] == "b/key"]
    functional = adapt(model, None, {name: zoo.normal(1, 8, width) for name, width in widths.items()}, None)
    program = trace(functional.fn, functional.paths, functional.leaves, zoo.normal(0, 2, 5, 8))
    (key,) = [o for o in find_operands(program, find_sites(program)[0]) if o.role == "key"]
    assert keys[key.side]
    distinct = {id(v): path for v, path in zip(program.params, program.paths)}
    assert _source_of(program, key.data, distinct) == "b/k"


def _source_of(program, v, kernels):
    """The kernel of the product that a value is computed from."""
    producers = {out: eqn for eqn in program.equations for out in eqn.outvars}
    while True:
        eqn = producers[v]
        found = [kernels[id(u)] for u in eqn.invars if id(u) in kernels]
        if found:
            return found[0]
        (v,) = [u for u in eqn.invars if u in producers]


def test_other_products_have_sides_and_names_are_unique():
    linear = lambda p, x: jax.nn.relu(x @ p["f/q"]) @ (jax.nn.relu(x @ p["f/k"]).mT @ (x @ p["f/v"]))
    params = {name: zoo.normal(1, 4, 4) for name in ("f/q", "f/k", "f/v")}
    assert names(linear, zoo.normal(0, 2, 5, 4), params) == ["f/left", "f/right", "f/left#2", "f/right#2"]
    bare = lambda p, x: jax.nn.softmax((x @ p["query"]) @ (x @ p["key"]).mT) @ (x @ p["value"])
    params = {name: zoo.normal(1, 4, 4) for name in ("query", "key", "value")}
    assert names(bare, zoo.normal(0, 2, 5, 4), params) == ["query#2", "key#2", "probabilities", "value#2"]
    square = lambda p, x: (y := x @ p["w"]) @ y.mT
    rule = zoo.plain(bits=8, products=jpfq.Activations(jpfq.Integer(3), per="row"))
    result = jpfq.quantize(square, [zoo.normal(0, 2, 5, 4)], rule, params={"w": params["key"]})
    y = np.asarray(zoo.normal(0, 2, 5, 4)) @ np.asarray(result.params["w"])
    y = reference.in_blocks(y, 4, lambda largest: largest / 3, np.arange(-4.0, 4))
    assert close(result.apply(zoo.normal(0, 2, 5, 4)), y @ np.swapaxes(y, 1, 2))


def test_one_step_for_a_cache_is_fixed_by_calibration():
    """FP8 with one step for all keys, and one for all values, as servers keep them."""
    cache = jpfq.Activations(jpfq.E4M3(), jpfq.ranges.Max())
    result = quantized(zoo.plain(bits=8, cache=cache))
    for name, path in (("key", "attention/k"), ("value", "attention/v")):
        largest = max(np.abs(np.asarray(b) @ np.asarray(result.params[path])).max() for b in BATCHES)
        np.testing.assert_allclose(result.inputs[f"attention/{name}"][0].levels.step, largest / 448, rtol=1e-5)
    steps = {name: float(result.inputs[f"attention/{name}"][0].levels.step[0]) for name in ("key", "value")}
    fp8 = lambda name: lambda x: steps[name] * reference.nearest(x / steps[name], reference.values("E4M3"))
    exact = by_hand(result.params, BATCHES[0], key=fp8("key"), value=fp8("value"))
    assert close(result.apply(BATCHES[0]), exact)


def test_kernels_may_stay_in_float(tmp_path):
    result = quantized(jpfq.Rule(".*", cache=KV4))
    assert not result.tensors
    assert list(result.inputs) == ["attention/key", "attention/value"]
    four = lambda x: reference.asymmetric(x, 4)
    assert close(result.apply(BATCHES[0]), by_hand(PARAMS, BATCHES[0], key=four, value=four))
    result.save(tmp_path / "saved")
    again = jpfq.load(tmp_path / "saved", attention)
    np.testing.assert_array_equal(again.apply(BATCHES[0]), result.apply(BATCHES[0]))
    assert "Asymmetric(4) per row" in again.summary()
    plan = jpfq.plan(attention, BATCHES[0], jpfq.Rule(".*", cache=KV4), params=PARAMS)
    assert str(plan).count("no rule matches it") == len(plan.skipped) == 4


def test_a_plan_lists_names_and_rules_match_them():
    plan = lambda rules: jpfq.plan(attention, BATCHES[0], rules, params=PARAMS).operands
    roles = ("query", "key", "value", "probabilities")
    kept = {f"attention/{role}": "float" for role in roles}
    assert plan(4) == kept
    assert plan(zoo.plain(bits=4, cache=KV4)) == kept | {
        f"attention/{role}": "Asymmetric(4) per row" for role in ("key", "value")
    }
    some = [jpfq.Rule(".*/(query|key)", products=INT8), zoo.plain(bits=4)]
    assert plan(some) == kept | {f"attention/{role}": "Integer(8) per row" for role in ("query", "key")}
    first = [jpfq.Rule("attention/k.*", skip=True), zoo.plain(bits=4, cache=KV4)]  # the first rule that matches applies
    assert plan(first) == kept | {"attention/value": "Asymmetric(4) per row"}
    assert "attention/value" in str(jpfq.plan(attention, BATCHES[0], 4, params=PARAMS))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (lambda: [zoo.plain(bits=4), jpfq.Rule(".*", cache=KV4)], r"Rule 1 .*cache applies to no keys .*attention/key"),
        (lambda: jpfq.Rule(".*/query", bits=4, products=KV4), "matches no parameter"),
        (lambda: [jpfq.Rule(".*/heads", products=KV4), zoo.plain(bits=4)], "products applies to no operands"),
        (lambda: jpfq.Rule(".*", cache=KV4, order=jpfq.order.Natural()), "Give bits=... or grid=..."),
        (lambda: jpfq.Rule(".*", bits=4, cache=8), r"cache takes a setting such as jpfq.Activations\(\)"),
        (lambda: jpfq.Rule(".*", skip=True, products=INT8), r"\['products'\] mean nothing"),
        (lambda: zoo.plain(bits=4, cache=jpfq.Activations(per="channel")), "sums over all channels"),
    ],
)
def test_rules_without_effect_are_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        jpfq.plan(attention, BATCHES[0], rules(), params=PARAMS)


def test_a_model_without_attention_has_no_cache():
    with pytest.raises(ValueError, match=r"cache applies to no keys or values .* there are none"):
        jpfq.plan(lambda p, x: x @ p["w"], BATCHES[0], zoo.plain(bits=4, cache=KV4), params={"w": zoo.normal(0, N, 4)})


def test_padding_does_not_count():
    """Rows of weight 0, masked in the model, change neither codes nor steps."""
    mask = jnp.arange(7)[None] < jnp.array([7, 4, 6])[:, None]
    spoiled = [jnp.where(mask[..., None], b, 50.0) for b in BATCHES]
    cache = jpfq.Activations(jpfq.E4M3(), jpfq.ranges.Max())
    run = lambda data: jpfq.quantize(
        attention,
        [jpfq.Weighted((x, mask), mask) for x in data],
        zoo.plain(bits=6, cache=cache, products=INT8),
        params=PARAMS,
    )
    one, other = run(spoiled), run([jnp.where(mask[..., None], b, -3.0) for b in BATCHES])
    for name in ("key", "value"):
        steps = [float(result.inputs[f"attention/{name}"][0].levels.step[0]) for result in (one, other)]
        assert steps[0] == pytest.approx(steps[1], rel=1e-5)
    assert all((one.tensors[path].codes == other.tensors[path].codes).mean() > 0.99 for path in one.tensors)


@pytest.mark.slow
def test_kernels_of_several_products_come_together_around_operands():
    """Shared kernels move the equations; operands keep their places, in batches of two lengths."""

    def model(p, x):
        once = lambda y: jax.nn.softmax((y @ p["q"]) @ (y @ p["k"]).mT) @ y
        y = once(x)
        return jnp.concatenate([y @ p["w"], jnp.tanh(x) @ p["w"]], -1)

    params = {name: zoo.normal(i, N, N) / 4 for i, name in enumerate("qkw")}
    batches = [zoo.normal(0, 2, 6, N), zoo.normal(1, 2, 9, N)]
    rule = zoo.plain(bits=8, products=INT8, cache=KV4)
    result = jpfq.quantize(model, batches, rule, params=params)
    assert list(result.uses) == ["w"]
    kernels = {name: np.asarray(x, np.float64) for name, x in result.params.items()}
    for x in batches:
        x = np.asarray(x, np.float64)
        scores = int8(x @ kernels["q"]) @ np.swapaxes(reference.asymmetric(x @ kernels["k"], 4), 1, 2)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        y = int8(p / p.sum(-1, keepdims=True)) @ reference.asymmetric(x, 4)
        exact = np.concatenate([y @ kernels["w"], np.tanh(x) @ kernels["w"]], -1)
        assert close(result.apply(jnp.asarray(x, jnp.float32)), exact)


@pytest.mark.slow
def test_later_layers_make_good_what_a_cache_loses():
    """Against weights solved as if keys and values stayed exact, in the same network."""
    mix = zoo.normal(7, 4, N)
    batches = [b[..., :4] @ mix + 0.1 * b for b in zoo.batches(24, 16, N, count=2)]
    cache = jpfq.Activations(jpfq.Integer(2), per="row")
    rule = lambda **more: zoo.plain(bits=6, method=jpfq.Qronos(), **more)
    aware, unaware = (quantized(rule(**more), batches=batches) for more in ({"cache": cache}, {}))
    exact = [attention(PARAMS, b) for b in batches]
    error = lambda leaves: np.sqrt(
        sum(float(jnp.sum((aware._run(leaves, aware.inputs, b) - y) ** 2)) for b, y in zip(batches, exact))
    )
    assert error(aware._functional.leaves) < 0.97 * error(unaware._functional.leaves)


@pytest.mark.slow
@pytest.mark.slow
def test_held_out_batches_round_operands_too():
    held = [zoo.normal(9, 2, 5, N), BATCHES[1]]
    rule = zoo.plain(bits=4, products=INT8, cache=KV4, activations=jpfq.Activations(jpfq.E2M1(), group=8))
    result = quantized(rule, batches=BATCHES[:1], held_out=held)
    floats, found = (
        np.concatenate([np.ravel(run(x)) for x in held]) for run in (lambda x: attention(PARAMS, x), result.apply)
    )
    error = np.linalg.norm(found - floats) / np.linalg.norm(floats)
    assert result.held_out_error == pytest.approx(error, rel=1e-3)


@pytest.mark.slow
def test_integers_run_with_rounded_operands():
    rule = zoo.plain(bits=4, activation_bits=8, cache=KV4, products=INT8)
    result = quantized(rule)
    assert jpfq.certify(result, bits=20).holds
    found, exact = result.apply_integer(BATCHES[0]), result.apply(BATCHES[0])
    assert np.median(np.abs(found - exact)) < 1e-4 * np.abs(exact).max()
    assert np.isclose(found, exact, atol=1e-4).mean() > 0.8
    alone = dataclasses.replace(result, inputs={k: v for k, v in result.inputs.items() if k in result.tensors})
    assert not np.allclose(alone.apply_integer(BATCHES[0]), found, atol=1e-4)
    with pytest.raises(ValueError, match="No inputs are quantized"):
        quantized(zoo.plain(bits=4, cache=KV4)).apply_integer(BATCHES[0])


@pytest.mark.slow
@pytest.mark.parametrize("fresh", [False, True])
def test_a_run_resumes_with_operands(tmp_path, fresh):
    cache = jpfq.Activations(jpfq.E4M3())
    data = (lambda stop: [b + 0.01 * stop for b in BATCHES]) if fresh else BATCHES
    run = lambda: quantized(zoo.plain(bits=4, cache=cache, products=INT8), batches=data, checkpoint=tmp_path / "run")
    first = run()
    (last,) = (tmp_path / "run").glob("site-0005-*")  # behind the stops of four operands
    last.unlink()
    again = run()
    assert len(list((tmp_path / "run").glob("site-0005-*"))) == 1
    np.testing.assert_array_equal(first.apply(BATCHES[0]), again.apply(BATCHES[0]))


@pytest.mark.slow
def test_a_sweep_over_caches_is_the_single_runs():
    rules = lambda bits: zoo.plain(bits=6, cache=jpfq.Activations(jpfq.Asymmetric(bits), per="row"))
    sweep = jpfq.sweep(attention, BATCHES, jpfq.Space(rules, bits=[3, 4]), params=PARAMS)
    for index, bits in enumerate((3, 4)):
        np.testing.assert_array_equal(sweep[index].apply(BATCHES[0]), quantized(rules(bits)).apply(BATCHES[0]))


@pytest.mark.slow
def test_a_budget_leaves_operands_to_a_rule_of_their_own():
    rules = jpfq.budget(attention, BATCHES, 4, rule=jpfq.Rule(".*", bits=4, cache=KV4), params=PARAMS)
    result = quantized(rules)
    assert "attention/key" in result.inputs
    assert set(result.tensors) == set(PARAMS)


@pytest.mark.slow
def test_blocks_of_a_deep_model_restart_with_operands():
    case = zoo.lm()
    rule = zoo.plain(bits=6, cache=KV4)
    result = jpfq.quantize(case.model, case.batches, rule, reference="block", **case.given)
    assert sum(path not in result.tensors for path in result.inputs) == 4
    assert result.output_error < 0.2

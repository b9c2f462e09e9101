"""Learning: the held-out loss falls and never rises; codes stay on their grids, in reach, and within accumulators."""

import dataclasses
import functools
import importlib
import os
import pathlib

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import strategies as st

import jpfq
from jpfq.matrix.layout import DotLayout
from jpfq.model.program import trace
from jpfq.model.sites import Chain
from jpfq.network.distance import distance_of
from jpfq.network.moves import UNIT, Bound, Moves, bounds_of
from jpfq.scalar import SumSpec
from jpfq.storage.save import _learned
from tests.helpers import assert_close
from tests.network import zoo

PARAMS = {
    "a": zoo.normal(1, 16, 24) / 4,
    "b": zoo.normal(2, 24, 24) / 5,
    "c": zoo.normal(3, 24, 8) / 5,
    "bias": 0.1 * zoo.normal(4, 8),
}
BATCHES = zoo.batches(32, 16, count=24)
FRESH = zoo.normal(99, 512, 16)
MSQ = {"method": jpfq.MSQ(), "scale": jpfq.scale.MinMSE()}


def fn(params, x):
    x = jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]) @ params["c"]
    return x + jnp.broadcast_to(params["bias"], x.shape)


@functools.cache
def ternary():
    return jpfq.quantize(fn, BATCHES[:4], zoo.plain(grid=jpfq.Ternary(), **MSQ), params=PARAMS)


def learn(start, batches=BATCHES, params=PARAMS, model=fn, **settings):
    return jpfq.learn(start, model, batches, jpfq.Learning(**settings), params=params, progress=False)


def error(params):
    return float(jnp.mean((fn(params, FRESH) - fn(PARAMS, FRESH)) ** 2))


def assert_same(one, two):
    jax.tree.map(np.testing.assert_array_equal, one, two)


def assert_deployed(result, start, reach):
    """Parameters are what codes and steps say; codes lie on their grids and within reach of their start."""
    for path, tensor in result.tensors.items():
        lo, hi, *_ = tensor.grid.alphabet()
        codes = np.asarray(tensor.codes, int)
        assert lo <= codes.min() <= codes.max() <= hi
        assert np.abs(codes - np.asarray(start.tensors[path].codes, int)).max() <= reach
        assert_same(result.params[path], tensor.dequantize())
        assert tensor.codes.dtype == start.tensors[path].codes.dtype


def test_without_steps_nothing_changes():
    start = ternary()
    result = learn(start, steps=0)
    for path, tensor in start.tensors.items():
        assert_same(dataclasses.astuple(result.tensors[path])[:3], dataclasses.astuple(tensor)[:3])
        assert_same(dataclasses.asdict(result.info[path]), dataclasses.asdict(start.info[path]))
    assert_same(result.params, start.params)
    assert result.learned.before == result.learned.after
    assert result.learned[3:] == (0, 0, 0.0)


@pytest.mark.slow
def test_the_loss_falls_on_inputs_never_seen(tmp_path):
    """Of a ternary network whose codes were rounded one by one: to a third."""
    start = ternary()
    before = jax.tree.map(np.array, start.params)
    result = learn(start, steps=200, rate=3e-3, seed=1)
    assert result.learned.after < 0.4 * result.learned.before
    assert error(result.params) < 0.4 * error(start.params)
    assert_deployed(result, start, reach=2)
    assert (
        0
        < result.learned.moved
        == np.mean(np.concatenate([(result.tensors[p].codes != t.codes).ravel() for p, t in start.tensors.items()]))
    )
    assert not np.array_equal(result.params["bias"], start.params["bias"])
    assert_same(start.params, before)
    assert_close(result.apply(FRESH), fn(result.params, FRESH))
    found = np.concatenate([fn(result.params, x) - fn(PARAMS, x) for x in BATCHES])
    energy = np.concatenate([fn(PARAMS, x) for x in BATCHES])
    assert_close(jnp.asarray(result.output_error), np.linalg.norm(found) / np.linalg.norm(energy))
    assert np.isnan(float(result.info["a"].relative_error))
    assert_close(result.info["a"].sparsity, np.mean(result.params["a"] == 0))
    assert "Learned in 200 steps" in result.summary()
    result.save(tmp_path / "learned")
    again = jpfq.load(tmp_path / "learned", fn)
    assert again.learned == result.learned
    assert_same(again.params, result.params)
    assert result.tuned(result.params).learned is None


@pytest.mark.parametrize("seed", range(2))
def test_it_is_never_worse_than_its_start(seed):
    """With a rate at which everything is lost, the start comes back, to the bit."""
    start = ternary()
    result = learn(start, steps=8, optimizer=optax.sgd(1e6), checks=4, seed=seed)
    assert result.learned.after <= result.learned.before
    assert result.learned.kept == 0
    assert_same(result.params, start.params)
    assert_same(dataclasses.asdict(result.info["a"]), dataclasses.asdict(start.info["a"]))


MANY = {
    "table": zoo.normal(1, 16, 16) / 4,
    "nf4": zoo.normal(2, 16, 16) / 4,
    "grouped": zoo.normal(3, 16, 16) / 4,
    "turned": zoo.normal(4, 16, 16) / 4,
    "power": (zoo.normal(5, 16, 16) / 4).astype(jnp.bfloat16),
    "stacked": zoo.normal(6, 2, 16, 8) / 4,
}


def many(params, x):
    for name in ("table", "nf4", "grouped", "turned"):
        x = jnp.tanh(x @ params[name])
    x = (x.astype(jnp.bfloat16) @ params["power"]).astype(jnp.float32)
    return jnp.einsum("bi,eio->beo", x, params["stacked"])


@functools.cache
def of_many_kinds():
    """Tables, fitted zero points in groups, a rotation, a stack with rounded inputs, and types of steps."""
    settings = {
        "table": {"grid": jpfq.E2M1()},
        "nf4": {"grid": jpfq.NF4(), "step_dtype": jnp.bfloat16},
        "grouped": {"grid": jpfq.Asymmetric(2), "scale": jpfq.scale.AbsMax(per=jpfq.scale.PerGroup(4))},
        "turned": {"bits": 3, "rotation": jpfq.Hadamard(1)},
        "power": {"bits": 3, "step_dtype": jnp.float8_e8m0fnu},
        "stacked": {"grid": jpfq.Ternary(), "activation_bits": 8},
    }
    rules = [zoo.plain(name, method=jpfq.MSQ(), **given) for name, given in settings.items()]
    return jpfq.quantize(many, BATCHES[:2], rules, params=MANY)


def changed(start, tensors, name):
    return {p for p, t in start.tensors.items() if not np.array_equal(getattr(t, name), getattr(tensors[p], name))}


@pytest.mark.slow
def test_kernels_of_every_kind_stay_what_they_are():
    start = of_many_kinds()
    result = learn(start, model=many, params=MANY, steps=200, rate=2e-3, reach=1, seed=2)
    assert result.learned.after < result.learned.before
    assert_deployed(result, start, reach=1)
    assert changed(start, result.tensors, "codes") == set(MANY)
    assert changed(start, result.tensors, "step") == set(MANY) - {"power"}
    assert changed(start, result.tensors, "zero") == set()
    step = result.tensors["nf4"].step
    assert_same(step, step.astype(jnp.bfloat16).astype(step.dtype))
    assert_same(result.inputs["stacked"], start.inputs["stacked"])


@pytest.mark.slow
def test_numbers_of_every_kind_of_kernel():
    """At the start they give the start. Moved anywhere, codes stay in reach, steps storable and zero points codes."""
    start = of_many_kinds()
    moves = Moves(("codes", "steps", "zeros"), 1, False, {})
    numbers = jax.jit(moves.start)(start.tensors, MANY)
    made = jax.jit(moves.deployed)(numbers, start.tensors)
    for path, tensor in start.tensors.items():
        for name in ("codes", "step", "zero"):
            assert_same(getattr(made[path], name), getattr(tensor, name))
    noisy = jax.tree.map(lambda x: x + 0.1 * zoo.normal(x.size, *x.shape), numbers)
    hard = jax.jit(moves.deployed)(jax.jit(moves.within)(noisy, start.tensors), start.tensors)
    soft = jax.jit(moves)(jax.jit(moves.within)(noisy, start.tensors), start.tensors, jnp.float32(1e4))
    assert changed(start, hard, "codes") == set(MANY)
    assert changed(start, hard, "step") == set(MANY) - {"power"}
    assert changed(start, hard, "zero") == {"grouped"}
    for path, tensor in hard.items():
        assert np.abs(np.asarray(tensor.codes, int) - np.asarray(start.tensors[path].codes, int)).max() == 1
        near = np.abs(np.asarray(soft[path], float) - np.asarray(tensor.dequantize(), float)) < 1e-2
        assert near.mean() > 0.98  # the others lie next to a midpoint
    step, zero = hard["nf4"].step, np.asarray(hard["grouped"].zero)
    assert_same(step, step.astype(jnp.bfloat16).astype(step.dtype))
    assert_same(zero, np.clip(np.round(zero), 0, 3))


@pytest.mark.slow
def test_zeros_stay_where_they_are_to_stay():
    start = ternary()
    result = learn(start, steps=100, rate=3e-3, keep_zeros=True)
    assert result.learned.moved > 0
    for path, tensor in start.tensors.items():
        zeros = np.asarray(tensor.codes) == 0
        assert zeros.any()
        assert (np.asarray(result.tensors[path].codes)[zeros] == 0).all()


@pytest.mark.slow
def test_sums_still_fit_their_accumulators():
    """Of two tiles for each neuron, nearly full; certified from the codes alone, and as the result says itself."""
    rule = zoo.plain(bits=4, activation_bits=4, accumulator=jpfq.Accumulator(8, tile=8))
    start = jpfq.quantize(fn, BATCHES[:4], rule, params=PARAMS)
    program = trace(fn_of_leaves, tuple(sorted(PARAMS)), [PARAMS[k] for k in sorted(PARAMS)], BATCHES[0])
    for path, bounds in bounds_of(program, start.info).items():
        (bound,) = bounds
        assert_same(bound.reach(start.tensors[path]), start.info[path].reach.ends)
    result = learn(start, steps=60, rate=2e-3, seed=3)
    assert result.learned.after < result.learned.before
    assert result.learned.moved > 0.01
    certificate = jpfq.certify(result, bits=8, tile=8)
    assert certificate.holds
    for site in certificate.sites:
        ends = np.stack([site.most, -site.least], -1)
        assert_same(np.asarray(result.info[site.path].reach.ends), ends)


def fn_of_leaves(leaves, x):
    return fn(dict(zip(sorted(PARAMS), leaves, strict=True)), x)


@hypothesis.given(st.integers(0, 2**32 - 1), st.integers(6, 9), st.booleans())
@hypothesis.settings(max_examples=15, deadline=None)
def test_changes_are_made_in_order_until_a_tile_is_full(seed, bits, signed):
    """Against a loop over changes in NumPy."""
    rng = np.random.default_rng(seed)
    lo, hi = (-8, 7) if signed else (0, 15)
    n, out, tile, capacity = 10, 3, 4, 2 ** (bits - 1) - 1
    start, moved = rng.integers(-1, 2, (n, out)), rng.permutation(n * out).reshape(n, out) / n
    new = start + rng.integers(-2, 3, (n, out))
    bound = Bound(Chain(), DotLayout((n, out), (0,), (), (1,), (), True), SumSpec(bits, lo, hi, tile))
    ok = np.asarray(
        bound.allowed(*(jnp.asarray(x, t) for x, t in ((start, jnp.int32), (new, jnp.int32), (moved, float))))
    )
    spent = lambda k: np.stack(
        [hi * np.maximum(k, 0) - lo * np.maximum(-k, 0), hi * np.maximum(-k, 0) - lo * np.maximum(k, 0)]
    )
    more = np.maximum(spent(new) - spent(start), 0)
    expected = (more == 0).all(0)
    for first in range(0, n, tile):
        rows = slice(first, first + tile)
        for o in range(out):
            free = expected[rows, o]
            used = np.where(free, spent(new)[:, rows, o], spent(start)[:, rows, o]).sum(1)
            fits = True
            for i in first + np.argsort(-moved[rows, o]):
                used = used + more[:, i, o]
                fits = fits and (used <= capacity).all()
                expected[i, o] |= fits
    np.testing.assert_array_equal(ok, expected)
    sums = lambda k: np.stack([spent(k)[:, i : i + tile].sum(1) for i in range(0, n, tile)])
    if (sums(start) <= capacity).all():
        assert (sums(np.where(ok, new, start)) <= capacity).all()


def test_soft_levels_and_their_derivatives(x64):
    """Of one kernel in float64, against the formula."""
    start = ternary().tensors["a"]
    tensor = dataclasses.replace(
        start, step=start.step.astype(float), zero=start.zero.astype(float), dtype=np.dtype(float)
    )
    moves, T = Moves(("codes", "steps"), 2, False, {}), jnp.asarray(7.0)
    numbers = jax.jit(moves.start)({"a": tensor}, {"a": PARAMS["a"]})
    position = np.asarray(tensor.codes) + UNIT * np.asarray(numbers["a"].move)
    away = np.asarray(PARAMS["a"], float) / np.asarray(tensor.step) - np.asarray(tensor.codes)
    room = lambda side: 0.45 * (np.abs(np.asarray(tensor.codes) + side) < 2)  # none beyond the grid
    assert_close(jnp.asarray(position - np.asarray(tensor.codes)), np.clip(away, -room(-1), room(1)))
    below = np.floor(position)
    s, end = 1 / (1 + np.exp(-7 * (position - below - 0.5))), 1 / (1 + np.exp(3.5))
    expected = np.asarray(tensor.step) * (below + (s - end) / (1 - 2 * end))
    assert_close(jax.jit(moves)(numbers, {"a": tensor}, T)["a"], expected)
    slope = jax.jit(jax.grad(lambda numbers: moves(numbers, {"a": tensor}, T)["a"].sum()))(numbers)["a"]
    inside = np.abs(position) < 1
    assert_close(
        jnp.where(inside, slope.move, 0),
        np.where(inside, UNIT * np.asarray(tensor.step) * 7 * s * (1 - s) / (1 - 2 * end), 0),
    )
    assert_close(slope.step, expected.sum(0, keepdims=True))


def test_losses_are_their_formulas():
    """In float64: the divergence and the relative square error of rows that count. Equal infinities agree."""
    a, b = (np.array(zoo.normal(i, 6, 5), np.float64) for i in (1, 2))
    a[0, 2] = b[0, 2] = -np.inf
    counts = np.array([1, 1, 1, 0, 1, 0.5])
    softmax = lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    p, q = softmax(a), softmax(b)
    rows = np.where(p > 0, p * np.log(np.where(p > 0, p / np.where(q > 0, q, 1), 1)), 0).sum(-1)
    pair, weights = (jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32)), [jnp.asarray(counts)[:, None]]
    of = lambda loss, weights: jax.jit(distance_of(loss, pair[0]))(*pair, weights)
    assert_close(of("logits", None), rows.mean())
    assert_close(of("logits", weights), (rows * counts).sum() / counts.sum())
    slope = jax.jit(jax.grad(lambda b: distance_of("logits", b)(pair[0], b, None)))(pair[1])
    assert_close(slope, (q - p) / 6)
    known = np.isfinite(a)
    a, b = np.where(known, a, 0), np.where(known, b, 0)
    assert_close(of("outputs", None), ((a - b) ** 2).sum() / (a**2).sum())
    total = lambda x: (x * counts[:, None]).sum()
    assert_close(of("outputs", weights), total((a - b) ** 2) / total(a**2))


@pytest.mark.slow
def test_figures_of_the_start_are_forgotten_and_kernels_keep_their_order():
    params = {"z": PARAMS["a"], "y": PARAMS["c"]}
    model = lambda p, x: jnp.tanh(x @ p["z"]) @ p["y"]
    start = jpfq.quantize(
        model, BATCHES[:2], zoo.plain(grid=jpfq.Ternary(), **MSQ), params=params, held_out=BATCHES[2:4]
    )
    same, other = (learn(start, params=params, model=model, steps=steps) for steps in (0, 50))
    assert same.held_out_error == start.held_out_error is not None
    assert other.learned.kept
    assert other.held_out_error is None
    assert list(other.tensors) == list(other.info) == list(start.tensors) == ["z", "y"]


@pytest.mark.slow
def test_padding_does_not_count():
    """Rows of weight 0 may hold anything."""
    start = ternary()
    settings = {"steps": 20, "rate": 1e-2, "held_out": BATCHES[-2:], "checks": 1, "parts": ("steps",)}
    mask = jnp.ones(32).at[20:].set(0)
    one, two = (
        learn(start, [jpfq.Weighted(x.at[20:].set(fill), mask) for x in BATCHES[:4]], **settings) for fill in (3, -5)
    )
    assert_same(one.params, two.params)
    assert one.learned.kept == 20


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": -1}, "steps is an integer of at least 0; got -1"),
        ({"reach": 0}, "reach is an integer of at least 1"),
        ({"rate": -1.0}, "rate is a positive number"),
        ({"loss": "kl"}, "loss is 'outputs' or 'logits' or 'a function'; got 'kl'"),
        ({"optimizer": "adam"}, r"such as optax.sgd\(1e-2\); got 'adam'"),
        ({"parts": "codes"}, "parts are some of codes, steps, zeros, vectors, others, in a tuple; got 'codes'"),
        ({"parts": ("weights",)}, r"got \('weights',\)"),
        ({"keep_zeros": True, "parts": ("codes", "zeros")}, "leave 'zeros' out of parts"),
        ({"held_out": 1.5}, "share between 0 and 1, such as 0.125, or a list of batches; got 1.5"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    with pytest.raises(ValueError, match=message):
        jpfq.Learning(**settings)


mean = lambda a, b: jnp.mean((a - b) ** 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": BATCHES[:1]}, "held_out=0.125 of 1 batches leaves none to train on.*smaller batches"),
        ({"batches": BATCHES[:3], "held_out": 0.9}, "held_out=0.9 of 3 batches"),
        ({"batches": [x.at[0].set(jnp.nan) for x in BATCHES]}, "loss is nan .*: the output of a is .*float"),
        ({"params": {**PARAMS, "b": jnp.inf * PARAMS["b"]}}, "the output of b is infinite or NaN in the float network"),
        ({"model": lambda p, x: fn(p, x).argmax(-1)}, r"compares floating outputs.*it returns int32\[32\]"),
        ({"model": lambda p, x: ()}, "it returns nothing"),
        ({"model": lambda p, x: fn(p, x).sum(-1, keepdims=True), "loss": "logits"}, r"two at least; got float32\[32, 1\]"),
        ({"loss": lambda a, b: (a - b) ** 2}, r"loss returns .*\(32, 8\).*one floating number"),
        ({"params": {**PARAMS, "more": jnp.ones(3)}}, "not the one that was quantized: they differ in more"),
        ({"params": {**PARAMS, "a": jnp.ones((16, 25))}}, "they differ in a"),
        ({"start": jpfq.Rule(".*", bits=4)}, "starts from the result of jpfq.quantize; got Rule"),
        ({"batches": [jpfq.Weighted(x, jnp.ones(32).at[0].set(0)) for x in BATCHES], "loss": mean}, "does not see"),
    ],
)  # fmt: skip
def test_what_cannot_be_learned_from(change, message):
    with pytest.raises(ValueError, match=message):
        learn(**{"start": ternary(), "steps": 1} | change)


def test_codes_beyond_their_grid_are_refused():
    start = ternary()
    tensor = start.tensors["b"]
    wrong = dataclasses.replace(
        start, tensors={**start.tensors, "b": dataclasses.replace(tensor, codes=2 * tensor.codes)}
    )
    with pytest.raises(ValueError, match=r"codes of b run from -2 to 2, beyond those of Ternary\(\), -1 to 1"):
        learn(wrong)
    with pytest.raises(ValueError, match=r"such as jpfq.Learning\(steps=400\); got 400"):
        jpfq.learn(start, fn, BATCHES, 400, params=PARAMS)


@pytest.mark.slow
def test_the_program_is_compiled_once(compilations):
    """More steps compile nothing more."""
    start, counts = ternary(), []
    for steps in (2, 2, 12):
        compilations.clear()
        learn(start, steps=steps, checks=2)
        counts.append(len(compilations))
    assert counts[2] <= counts[1] <= counts[0] < 60


@pytest.mark.slow
def test_two_bits_of_a_language_model(monkeypatch):
    """stories260K with kernels of two bits by GPFQ: learning takes a third of the loss on texts never seen."""
    root = pathlib.Path(__file__).parents[2]
    data = pathlib.Path(os.environ.get("JPFQ_DATA") or root.parent / "shared/data")
    if not all((data / name).is_file() for name in ("lm_stories260k.npz", "tinystories_tok512.npz")):
        pytest.skip("the weights of stories260K and its texts are not in the data folder: set JPFQ_DATA")
    monkeypatch.syspath_prepend(root / "bench")
    networks = importlib.import_module("networks")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        model = networks.llama(data)
        tokens = np.load(data / "tinystories_tok512.npz")["tokens"].astype(np.int32)
        windows = lambda start, count: [
            jnp.asarray(x) for x in tokens[start : start + 512 * count].reshape(count, 4, 128)
        ]
        batches, fresh = windows(0, 24), windows(600_000, 4)
        start = jpfq.quantize(model, batches[:8], zoo.plain(bits=2, scale=jpfq.scale.MinMSE()))
        settings = jpfq.Learning(steps=90, rate=2e-3, loss="logits", checks=3)
        result = jpfq.learn(start, model, batches, settings, progress=False)
        run = nnx.jit(lambda model, x: model(x))
        loss = jax.jit(distance_of("logits", run(model, fresh[0])))
        lost = lambda other: np.mean([loss(run(model, x), run(other, x), None) for x in fresh])
        before, after = lost(start.model), lost(result.model)
    assert result.learned.after < 0.67 * result.learned.before
    assert after < 0.67 * before


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["Auto", "Explicit"])
def test_batches_split_over_devices(axes):
    """As on one device; arrays come back as they lay."""
    mesh = jax.make_mesh((2,), ("data",), axis_types=(getattr(jax.sharding.AxisType, axes),))
    spread = lambda x, *names: jax.device_put(x, jax.NamedSharding(mesh, jax.P(*names)))
    params, batches = jax.tree.map(spread, PARAMS), [spread(x, "data") for x in BATCHES]
    start = jpfq.quantize(fn, batches[:4], zoo.plain(grid=jpfq.Ternary(), **MSQ), params=params)
    settings = {"steps": 40, "rate": 3e-3, "parts": ("steps", "vectors"), "checks": 2}
    found, one = learn(start, batches, params, **settings), learn(ternary(), **settings)
    assert one.learned.kept == 40
    np.testing.assert_allclose(found.learned[1:3], one.learned[1:3], rtol=1e-3)
    for tree in (found.params, {path: tensor.codes for path, tensor in found.tensors.items()}):
        for path, x in tree.items():
            assert x.sharding.is_equivalent_to(params[path].sharding, x.ndim)
            assert x.sharding.mesh == mesh


@pytest.mark.parametrize("record", [[], "outputs", ["outputs", 1, 2], ["outputs", 0.1, 0.1, 3.0, 3, 0.5]])
def test_a_record_that_no_result_has_written_is_refused(record):
    with pytest.raises(ValueError, match="Expected"):
        _learned(record)

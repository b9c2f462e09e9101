"""Sweeps: every row is the single run, in lanes and on tracks; what they share, what they report, what they refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpfq
from jpfq.matrix import lanes as each
from jpfq.model import segments
from jpfq.study import sweep as sweep_module
from tests.network import zoo


def network(params, x):
    """A convolution, a product and a bias, without a framework."""
    x = jax.nn.relu(zoo.convolve(x, params["first"], (2, 2), groups=2) + params["bias"])
    return jnp.tanh(x.reshape(x.shape[0], -1) @ params["deep"]) @ params["third"]


def parameters():
    shapes = {"first": (3, 3, 2, 8), "bias": (8,), "deep": (72, 8), "third": (8, 4)}
    return {name: 0.3 * zoo.normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}


def data():
    return [zoo.normal(20 + i, 12, 6, 6, 4) for i in range(2)]


def settings(kind, number, seed):
    """Rules of several kinds, each with a number that lanes share a program over."""
    plain = functools.partial(zoo.plain, activation_bits=7, correct_bias=True, bits=3, scale=jpfq.scale.AbsMax(number))
    drawn = {"rounding": jpfq.rounding.Stochastic(), "patches": jpfq.patches.Random(0.5)}
    head = jpfq.Rule("third", skip=True)
    return {
        "all at once": lambda: [head, plain(**drawn)],
        "nearest": lambda: [head, zoo.plain(method=jpfq.MSQ(), grid=jpfq.Ternary(), scale=jpfq.scale.Fixed(number))],
        "plain": lambda: plain(),
        "optq": lambda: plain(method=jpfq.OPTQ(jpfq.damping.MeanDiagonal(number))),
        "drawn": lambda: zoo.plain(bits=4, **drawn),
        "skips": lambda: [head, jpfq.Rule(".*", bits=2 + int(4 * number))],
        "rows": lambda: zoo.plain(bits=3, scale=jpfq.scale.AbsMax(number), form="data"),
    }[kind]()


ALL, ONE = (("all at once", 0.5, 0), ("all at once", 0.9, 1)), ("nearest", 0.3, 0)
POINTS = [
    {"kind": kind, "number": number, "seed": seed}
    for kind in ("plain", "optq", "drawn", "skips", "rows")
    for number, seed in ((0.5, 0), (0.9, 1))
]


def assert_same(swept, single):
    """One quantized network is the other, to the bit."""
    assert list(swept.tensors) == list(single.tensors) == list(swept.info)  # in the order of the network
    assert swept.skipped == single.skipped
    for path, tensor in single.tensors.items():
        own = swept.tensors[path]
        np.testing.assert_array_equal(own.codes, tensor.codes, err_msg=path)
        assert (own.codes.dtype, str(own.grid), own.nbytes) == (tensor.codes.dtype, str(tensor.grid), tensor.nbytes)
        np.testing.assert_allclose(own.step, tensor.step, rtol=1e-12)
        np.testing.assert_allclose(swept.info[path].relative_error, single.info[path].relative_error, rtol=1e-9)
    assert swept.biases == single.biases
    for new, old in zip(jax.tree.leaves(swept.params), jax.tree.leaves(single.params), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-11, atol=1e-13)
        assert new.dtype == old.dtype
    assert swept.output_error == pytest.approx(single.output_error, rel=1e-9)


@pytest.fixture
def as_a_batch(monkeypatch):
    """Lanes as an accelerator runs them; what is compiled by then is forgotten before and after."""

    def forget():
        jax.clear_caches()
        segments._compiled.clear()

    forget()
    monkeypatch.setattr(each, "batches_lanes", lambda: True)
    yield
    forget()


def check_rows(points):
    """A sweep, and every row of it by itself."""
    params, batches = parameters(), data()
    run = jpfq.sweep(
        network, batches, jpfq.Space.listed(points, lambda **point: settings(seed=0, **point)), params=params
    )
    for i, point in enumerate(points):
        single = jpfq.quantize(network, batches, settings(**point), params=params, key=jax.random.key(point["seed"]))
        assert_same(run[i], single)
        expected = {"bits_per_weight": single.bits_per_weight, "nbytes": single.nbytes}
        assert {name: run.records[i][name] for name in expected} == expected
        x = batches[0]
        np.testing.assert_allclose(run[i].apply(x), single.apply(x), rtol=1e-9, atol=1e-12)
    return run


@pytest.mark.slow
def test_each_row_is_the_single_run(x64, compilations):
    """Scales, activations, corrected biases, draws and patches in lanes; another method on a track of its own."""
    run = check_rows([{"kind": kind, "number": number, "seed": seed} for kind, number, seed in (*ALL, ONE)])
    assert [chunk.indices for chunk in run._chunks] == [[0, 1], [2]]
    members, x = (run[0], run[1]), data()[0]
    members[0].apply_integer(x)
    compilations.clear()
    found = members[1].apply_integer(x)
    assert not compilations  # members share a program
    np.testing.assert_allclose(found, members[1].apply(x), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [False, True])
def test_each_row_is_the_single_run_for_every_kind(x64, batch, request):
    """Damping, kernels that are skipped, rows and what is recommended too; and lanes as an accelerator runs them."""
    if batch:
        request.getfixturevalue("as_a_batch")
    run = check_rows(POINTS)
    assert len(run._chunks) == 5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stack", pytest.param("experts", marks=pytest.mark.slow)])
def test_stacked_kernels_and_experts(x64, name):
    case = zoo.CASES[name]()
    space = jpfq.Space(lambda c: zoo.plain(bits=3, scale=jpfq.scale.AbsMax(c)), c=[0.6, 0.9])
    run = jpfq.sweep(case.model, case.batches, space, **case.given)
    for i, point in enumerate(space.points):
        single = jpfq.quantize(case.model, case.batches, space.rules_of(point), **case.given)
        assert_same(run[i], single)
        if case.variables is None:
            assert isinstance(run[i].model, nnx.Module)


def simple(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


SIMPLE = {"a": zoo.normal(0, 16, 8), "b": zoo.normal(1, 8, 4)}
X = [zoo.normal(2, 32, 16)]
SPACE = jpfq.Space(lambda bits, c: zoo.plain(bits=bits, scale=jpfq.scale.AbsMax(c)), bits=[2, 3, 4], c=[0.6, 1.0])


def loss(quantized):
    return jnp.mean((simple(quantized.params, X[0]) - simple(SIMPLE, X[0])) ** 2)


@functools.cache
def swept():
    return jpfq.sweep(simple, X, SPACE, params=SIMPLE, evaluate=loss)


@pytest.mark.slow
def test_what_a_sweep_reports(tmp_path):
    run = swept()
    assert [(r["bits"], r["c"]) for r in run.records] == [(b, c) for b in (2, 3, 4) for c in (0.6, 1.0)]
    for i, record in enumerate(run.records):
        assert record["loss"] == pytest.approx(float(loss(run[i])), rel=1e-4)
        assert record["output_error"] == pytest.approx(run[i].output_error)
    beaten = [
        any(o["bits_per_weight"] <= r["bits_per_weight"] and o["loss"] <= r["loss"] and o is not r for o in run.records)
        for r in run.records
    ]
    assert sorted(run.front) == [i for i, lost in enumerate(beaten) if not lost]
    least = min(range(len(run)), key=lambda i: run.records[i]["loss"])
    np.testing.assert_array_equal(run.best().tensors["a"].codes, run[least].tensors["a"].codes)
    width = run.records[2]["bits_per_weight"]
    assert run.best(width).bits_per_weight <= width
    with pytest.raises(ValueError, match=r"No setting of finite loss takes 1 bits per weight or fewer; the least is"):
        run.best(1)
    assert str(run).count("*") == len(run.front)
    run.picture(tmp_path / "front.png")
    assert (tmp_path / "front.png").stat().st_size > 5000
    text = run.best().report(tmp_path / "report.html", sweep=run).read_text(encoding="utf-8")
    assert all(f">{record['loss']:.5g}</td>" in text for record in run.records)
    frame = pytest.importorskip("pandas", reason="pandas is not installed") and run.frame()
    assert list(frame.columns) == ["bits", "c", *sweep_module.FIGURES]


@pytest.mark.slow
def test_fewer_lanes_at_a_time_change_nothing():
    few = jpfq.sweep(simple, X, SPACE, params=SIMPLE, lanes=4, evaluate=loss)
    assert [chunk.indices for chunk in few._chunks] == [[0, 1, 2, 3], [4, 5, 5, 5]]
    for i, record in enumerate(swept().records):
        np.testing.assert_array_equal(few[i].tensors["b"].codes, swept()[i].tensors["b"].codes)
        assert few.records[i] == pytest.approx(record, rel=1e-4)


@pytest.mark.slow
def test_the_float_network_runs_once(monkeypatch):
    """As often as in a single run, however many settings there are; and other numbers compile nothing."""
    calls, run = [], segments.Segment.__call__

    def counting(self, read, laned=lambda v: False):
        calls.append(any(map(laned, self.inputs)))
        return run(self, read, laned)

    monkeypatch.setattr(segments.Segment, "__call__", counting)
    swept()
    calls.clear()
    jpfq.sweep(simple, X, SPACE, params=SIMPLE)
    assert calls.count(True) == 2  # from the first kernel to the second, and to the outputs
    in_float = calls.count(False)
    calls.clear()
    jpfq.quantize(simple, X, zoo.plain(bits=3), params=SIMPLE)
    assert len(calls) == in_float + 2


@pytest.mark.slow
def test_other_numbers_compile_nothing(compilations):
    run = lambda *bits: jpfq.sweep(simple, X, jpfq.Space(SPACE.rules, bits=bits, c=[0.7, 0.8]), params=SIMPLE)
    run(2, 3, 4)
    compilations.clear()
    run(5, 6, 7)
    assert compilations == []


def test_fields_of_a_rule_need_no_function():
    space = jpfq.Space(bits=np.array([3, 4]), method=[jpfq.GPFQ(), jpfq.MSQ()])
    assert len(space) == 4
    assert space.rules_of(space.points[1]) == (jpfq.Rule(".*", bits=3, method=jpfq.MSQ()),)


def bad(space=SPACE, **given):
    return jpfq.sweep(simple, X, space, **{"params": SIMPLE} | given)


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: bad([jpfq.Rule(".*", bits=3)]), r"space is a jpfq.Space, such as jpfq.Space\(bits=\[2, 3, 4\]\); got"),
        (lambda: jpfq.Space(), "The space is empty"),
        (lambda: jpfq.Space(bits=3), "Space takes a list of values for each name; got bits=3"),
        (lambda: jpfq.Space(loss=[3]), r"\['loss'\] are names of results"),
        (lambda: jpfq.Space.listed([{"bits": 3}, {"c": 3}]), "all settings need the same names"),
        (lambda: bad(jpfq.Space(widths=[3])), r"setting \(widths=3\) does not give rules: .*unexpected keyword argument"),
        (lambda: bad(jpfq.Space(bits=[3, 99])), r"The setting \(bits=99\) does not give rules: .*from 1 to 16"),
        (lambda: bad(sharding="sweep"), r"sharding has one axis, such as NamedSharding\(.*got 'sweep'"),
        (lambda: bad(lanes=0), "lanes is a positive number of settings, or None; got 0"),
        (
            lambda: bad(jpfq.Space(bits=[3], rounding=[jpfq.rounding.Stochastic()])),
            r"The setting \(bits=3, rounding=Stochastic\(\)\): Stochastic\(\) of a draws random numbers: pass key",
        ),
        (lambda: jpfq.sweep(simple, lambda n: X, SPACE, params=SIMPLE), "does not support fresh batches"),
        (lambda: bad(memory=45_000), r"6 settings at once take about .* GiB: pass lanes=\d"),
        (lambda: bad(memory=1000), "pass offload=True, which moves waiting batches to host memory"),
        (lambda: bad(evaluate=lambda q: float(loss(q))), r"evaluate is compiled, but .* with float\(\) or np.asarray"),
        (lambda: bad(evaluate=lambda q: q.params["a"]), r"must return one number for a network; got shape \(16, 8\)"),
        (
            lambda: bad(jpfq.Space(lambda c: zoo.plain(bits=3, scale=jpfq.scale.Fixed(c)), c=[0.1, 1e-60])),
            r"gives a step of zero under weights of a \(c=1e-60\) that are not all zero",
        ),
        (
            lambda: jax.vmap(lambda size: jpfq.scale.AbsMax(per=jpfq.scale.PerGroup(size)))(jnp.array([2, 4])),
            "PerGroup: size changes the program or a shape, so vmap cannot sweep over it. Loop over it in Python",
        ),
        (
            lambda: jax.vmap(lambda passes: jpfq.finish.Descend(passes))(jnp.array([2, 4])),
            "Descend: passes changes the program or a shape.*jpfq.Space",
        ),
    ],
)  # fmt: skip
def test_bad_input(attempt, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        attempt()

"""Weights that live while a network is quantized: the caller's own, those at work, and at the end the result's."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jpfq
from jpfq.calibrate.liveness import needs
from jpfq.calibrate.stream import Stream
from jpfq.model.program import trace
from jpfq.network.plan_memory import Memory
from tests.network import zoo

quantize_module = importlib.import_module("jpfq.network.quantize")

WIDTH, DEPTH, AT_WORK = 24, 16, 3  # a kernel, its float and its quantized operand


def deep(params, x):
    """A stack of equal layers."""
    for i in range(DEPTH):
        x = jnp.tanh(x @ params[f"layer_{i}"])
    return x


def in_float(params, x):
    """The same, which takes all its parameters to another type before anything else."""
    return deep(jax.tree.map(lambda p: p.astype(jnp.float32), params), x)


def doubled(params, x):
    """Every layer serves two products."""
    left, right = x, x + 1
    for i in range(DEPTH):
        left, right = jnp.tanh(left @ params[f"layer_{i}"]), jnp.tanh(right @ params[f"layer_{i}"])
    return left + right


class Deep(nn.Module):
    @nn.compact
    def __call__(self, x):
        for _ in range(DEPTH):
            x = jnp.tanh(nn.Dense(WIDTH)(x))
        return x


class DeepNNX(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(DEPTH)])

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x


def weights(dtype=jnp.float32):
    return {f"layer_{i}": (zoo.normal(i, WIDTH, WIDTH) / WIDTH**0.5).astype(dtype) for i in range(DEPTH)}


def linen():
    return {"model": Deep(), "variables": zoo.initial(Deep(), jnp.zeros((1, WIDTH)))}


BATCHES = [np.asarray(zoo.normal(100 + i, 40, WIDTH)) for i in range(2)]
RULE = zoo.plain(bits=4, form="data")  # no Gram, which is of a kernel's shape

MODELS = {
    "function": lambda: {"model": deep, "params": weights()},
    "Linen": linen,
    "NNX": lambda: {"model": DeepNNX(nnx.Rngs(0))},
    "cast": lambda: {"model": in_float, "params": weights(jnp.bfloat16)},
    "shared": lambda: {"model": doubled, "params": weights()},
}
WAYS = {  # of the function
    "biases": lambda tmp: {"rules": zoo.plain(bits=4, form="data", correct_bias=True)},
    "blocks": lambda tmp: {"reference": "block"},
    "fresh": lambda tmp: {"batches": lambda number: BATCHES},
    "kept": lambda tmp: {"checkpoint": tmp / "run"},
    "two shapes": lambda tmp: {"batches": [*BATCHES, BATCHES[0][:24]]},
}


def place(x: jax.Array) -> int:
    """Where an array lies; reading one as NumPy may leave another that lies in the same place (JAX 0.10, bfloat16)."""
    return x.unsafe_buffer_pointer() if x.size and not jnp.issubdtype(x.dtype, jax.dtypes.extended) else id(x)


class Kernels:
    """Counts live arrays of floating numbers in the shape of the kernels, beside those there were before."""

    def __init__(self, monkeypatch):
        self.before = {place(x): x for x in jax.live_arrays()}
        self.in_walk, self.at_end, self.assembling = [], [], []
        advance, assemble, dequantize = Stream.advance, quantize_module.assemble, jpfq.QTensor.dequantize

        def advanced(stream, number):
            advance(stream, number)
            self.in_walk.append(self.count())

        def assembled(*args):
            self.at_end.append(self.count())
            return assemble(*args)

        def dequantized(tensor):
            found = dequantize(tensor)
            self.assembling.append(self.count())
            return found

        monkeypatch.setattr(Stream, "advance", advanced)
        monkeypatch.setattr(quantize_module, "assemble", assembled)
        monkeypatch.setattr(jpfq.QTensor, "dequantize", dequantized)

    def count(self) -> int:
        """How many kernels there are, of all lanes."""
        of_kernel = lambda x: x.shape[-2:] == (WIDTH, WIDTH) and jnp.issubdtype(x.dtype, jnp.floating)
        kernels = {place(x): x.size // WIDTH**2 for x in jax.live_arrays() if of_kernel(x)}
        return sum(size for where, size in kernels.items() if where not in self.before)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "shared" else name for name in MODELS]
)
def test_a_replaced_weight_is_let_go_after_its_last_use(name, monkeypatch):
    given = MODELS[name]()
    kernels = Kernels(monkeypatch)
    quantized = jpfq.quantize(given.pop("model"), BATCHES, RULE, **given)
    assert len(quantized.tensors) == DEPTH <= len(kernels.in_walk)
    assert max(kernels.in_walk) <= AT_WORK
    assert kernels.at_end == [0]
    assert kernels.assembling == list(range(1, DEPTH + 1))  # one by one, each of which is the result's
    assert kernels.count() == DEPTH


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name == "two shapes" else name for name in WAYS]
)
def test_no_way_of_quantizing_keeps_replaced_weights(name, monkeypatch, tmp_path):
    given = {"batches": BATCHES, "rules": RULE, "params": weights()} | WAYS[name](tmp_path)
    for _ in range(2 if name == "kept" else 1):  # a second time from the folder
        kernels = Kernels(monkeypatch)
        quantized = jpfq.quantize(deep, **given)
        assert name == "fresh" or max(kernels.in_walk) <= AT_WORK
        assert kernels.at_end == [0]
        assert max(kernels.assembling) == kernels.count() == DEPTH
        del quantized
        monkeypatch.undo()


@pytest.mark.slow
def test_fresh_batches_leave_nothing_of_those_before(monkeypatch):
    """They hold one copy of the weights that each of them runs through, and no activations of earlier ones."""
    params, activations = weights(), []
    kernels = Kernels(monkeypatch)
    live = lambda: sum(x.shape == (40, WIDTH) and place(x) not in kernels.before for x in jax.live_arrays())

    def fresh(number):
        activations.append(live())
        return [np.asarray(zoo.normal(number, 40, WIDTH))]

    quantized = jpfq.quantize(deep, fresh, RULE, params=params)
    assert len(quantized.tensors) == len(activations) == DEPTH
    assert max(kernels.in_walk) <= DEPTH + AT_WORK
    assert max(activations) <= 2  # of the stop before: in the float and in the quantized network
    assert live() == 0


@pytest.mark.parametrize("name", ["function", "cast", "shared"])
def test_the_plan_counts_the_weights_that_live(name):
    """Of calibration, those at work; of the end, the caller's, the codes and the result's."""
    given = MODELS[name]()
    many = jax.ShapeDtypeStruct((4000, WIDTH), jnp.float32)  # so that most is needed between two solves
    plan = jpfq.plan(given["model"], many, zoo.plain(bits=4, form="gram"), params=given["params"])
    of_kernels = lambda itemsize: DEPTH * WIDTH**2 * itemsize
    itemsize = 2 if name == "cast" else 4
    assert plan.stages["result"] == Memory(of_kernels(itemsize), codes=of_kernels(1), result=of_kernels(itemsize))
    calibration = plan.stages["calibration"]
    assert calibration.parameters == of_kernels(itemsize)
    assert 0 < calibration.kernels <= AT_WORK * WIDTH**2 * 4
    assert plan.memory == max(calibration.total, plan.stages["result"].total)


def test_the_plan_says_what_memory_is_for():
    shape = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16)
    fn = lambda params, x: jax.nn.relu(x @ params["a"]) @ params["b"]
    x = jax.ShapeDtypeStruct((1, 512), jnp.bfloat16)
    rule = zoo.plain(bits=9, form="data")
    plan = jpfq.plan(fn, x, [jpfq.Rule("b", skip=True), rule], params={"a": shape, "b": shape})
    assert plan.stages["result"] == Memory(2 * 2 * 512**2, codes=2 * 512**2, result=2 * 512**2)
    assert "Peak memory about" in str(plan)
    assert "calibration: parameters 1.0 MiB, activations" in str(plan)


@pytest.mark.slow
def test_a_sweep_lets_replaced_weights_go_in_all_lanes(monkeypatch):
    params = weights()
    kernels = Kernels(monkeypatch)
    space = jpfq.Space(lambda bits: zoo.plain(bits=bits, form="data"), bits=[3, 4])
    sweep = jpfq.sweep(deep, BATCHES, space, params=params)
    assert max(kernels.in_walk) <= 2 * AT_WORK
    assert kernels.count() == 0
    assert len(sweep[1].tensors) == kernels.count() == DEPTH


def test_a_stack_that_is_cast_as_a_whole_is_there_until_its_last_layer():
    """Each layer is a slice of it, which is made when its turn comes."""
    stack = {"kernel": jnp.stack(list(weights(jnp.bfloat16).values())[:3])}
    layers = lambda kernels, x: jax.lax.scan(lambda x, k: (jnp.tanh(x @ k.astype(jnp.float32)), None), x, kernels)[0]
    at_once = lambda params, x: layers(params["kernel"].astype(jnp.float32), x)
    one_by_one = lambda params, x: layers(params["kernel"], x)
    found, expected = (jpfq.quantize(fn, BATCHES, RULE, params=stack) for fn in (at_once, one_by_one))
    np.testing.assert_array_equal(found.tensors["kernel"].codes, expected.tensors["kernel"].codes)
    np.testing.assert_array_equal(found.params["kernel"], expected.params["kernel"])


def test_fixed_values_are_needed_from_the_first_to_the_last_use_on_data():
    def fn(params, x):
        doubled, shifted, unused = 2 * params[0], params[0] + 1, params[1] * 3
        del unused
        return (x @ doubled) @ shifted + (x @ doubled), shifted

    program = trace(fn, "ab", [jnp.zeros((3, 3))] * 2, jnp.zeros((2, 3)))
    first, last = needs(program)
    on_data = [i for i, eqn in enumerate(program.equations) if not program.is_fixed(eqn)]
    assert all(i < on_data[0] for i in first)  # both are computed before anything else
    made = {v: i for i in first for v in program.equations[i].outvars}
    reads = lambda v: [i for i in on_data if v in program.equations[i].invars]
    for v, i in made.items():
        assert first[i] == reads(v)[0]
    (doubled,), (shifted,) = (
        [v for v in made if program.equations[made[v]].primitive.name == name] for name in ("mul", "add")
    )
    assert last[doubled] == max(reads(doubled))
    assert last[shifted] == len(program.equations) - 1  # it is an output
    assert last[program.params[0]] == last[shifted]

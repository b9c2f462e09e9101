"""`plan`: what quantize will do, from shapes alone."""

import importlib
import itertools
import math
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from jpfq.calibrate import batch_gram, gather
from jpfq.matrix.layout import ConvLayout, DotLayout
from jpfq.model.compat import inner_jaxprs, opened
from tests.network import zoo

plan_work = importlib.import_module("jpfq.network.plan_work")


@pytest.mark.parametrize("name", ["mlp", pytest.param("scanned", marks=pytest.mark.slow)])
def test_a_plan_says_what_quantize_does(name):
    case = zoo.CASES[name]()
    rule = zoo.plain(bits=4)
    plan = jpfq.plan(case.model, case.batches[0], rule, batches=3, **case.given)
    quantized = jpfq.quantize(case.model, case.batches, rule, **case.given)
    assert {line.path for line in plan.lines} == set(quantized.tensors)
    assert plan.skipped == quantized.skipped
    for path in [*quantized.tensors, *quantized.skipped]:
        assert (path in str(plan)) == (not path.endswith("/bias")), path  # biases are counted


def test_a_plan_says_which_sums_are_bounded():
    params = {"a": jax.ShapeDtypeStruct((32, 8), jnp.float32), "b": jax.ShapeDtypeStruct((8, 4), jnp.float32)}
    x, tiled = jax.ShapeDtypeStruct((16, 32), jnp.float32), jpfq.Accumulator(16, tile=8)
    rules = [jpfq.Rule("a", bits=4, activation_bits=8, accumulator=tiled), jpfq.Rule("b", bits=4)]
    planned = lambda rules: str(jpfq.plan(lambda params, x: x @ params["a"] @ params["b"], x, rules, params=params))
    first, second = [line for line in planned(rules).splitlines() if line.split()[:1] in (["a"], ["b"])]
    assert first.endswith("16 bits, tiles of 8")
    assert second.endswith("of any size")
    whole = jpfq.Rule(".*", bits=4, activation_bits=8, accumulator=jpfq.Accumulator(20))
    assert planned(whole).count("20 bits, all inputs") == 2
    assert "sums" not in planned(jpfq.Rule(".*", bits=4))


def multiplied(jaxpr):
    """Products of two numbers in the matrix products of a jaxpr, loops included."""
    total = 0
    for eqn in opened(jaxpr)[0].eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            total += eqn.outvars[0].aval.size * math.prod(eqn.invars[0].aval.shape[i] for i in contract)
        total += eqn.params.get("length", 1) * sum(map(multiplied, inner_jaxprs(eqn)))
    return total


def conv(window, channels, out, stride=1, groups=1):
    shape = (*window, channels // groups, out)
    return ConvLayout(
        shape, (stride,) * 2, ((1, 1),) * 2, (1, 1), (1, 1), (0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2), groups
    )


GRAMS = {  # how the product becomes matrices, the shape of its data, how many rows are drawn
    "dense": (DotLayout((24, 8), (0,), (), (1,), (), False), (300, 24), None),
    "wide": (DotLayout((300, 8), (0,), (), (1,), (), False), (200, 300), None),
    "experts": (DotLayout((3, 24, 8), (1,), (0,), (2,), (0,), False), (3, 100, 24), None),
    "correlations": (conv((3, 3), 16, 8), (40, 16, 16, 16), None),
    "in parts": (conv((3, 3), 16, 8), (300, 16, 16, 16), None),
    "depthwise": (conv((3, 3), 8, 8, groups=8), (40, 16, 16, 8), None),
    "strides": (conv((3, 3), 16, 8, stride=2), (40, 16, 16, 16), None),
    "drawn": (conv((3, 3), 16, 8), (40, 16, 16, 16), 500),
}


@pytest.mark.parametrize("networks", [1, 2])
def test_a_plan_counts_the_products_of_a_gram_as_they_are_made(networks):
    for name, (layout, shape, drawn) in GRAMS.items():
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        picked = None if drawn is None else jax.ShapeDtypeStruct((drawn,), jnp.int32)
        made = lambda x, xq, picked, layout=layout: batch_gram.batch_gram(
            x, xq, None, picked, batch_gram.GramOptions(layout, True, batch_gram.at_once())
        )
        done = multiplied(jax.make_jaxpr(made)(x, x if networks == 2 else None, picked))
        rows = drawn or math.prod(gather.rows_shape(layout, shape))
        foretold, _ = plan_work._gram(layout, shape, rows, drawn is None, networks)
        assert 0.95 < layout.dims[0] * foretold / done < 1.05, name


def test_a_plan_counts_the_windows_that_are_calibrated_on():
    params = {"w": jax.ShapeDtypeStruct((3, 3, 2, 4), jnp.float32)}
    specs = ("NHWC", "HWIO", "NHWC")
    fn = lambda params, x: jax.lax.conv_general_dilated(x, params["w"], (1, 1), "VALID", dimension_numbers=specs)
    aside = jpfq.patches.NonOverlapping()
    lines = []
    for patches in (None, aside, jpfq.patches.Random(0.5), jpfq.patches.Random(0.25, aside)):
        rule = zoo.plain(bits=4, patches=patches) if patches else zoo.plain(bits=4)
        plan = jpfq.plan(fn, jax.ShapeDtypeStruct((10, 9, 9, 2), jnp.float32), rule, params=params, batches=3)
        lines.append(plan.lines[0])
        assert plan.flops - plan.lines[0].flops == 4 * 3 * 10 * 49 * (9 * 2 * 4)  # the layer runs on all of them
    assert [line.rows for line in lines] == [3 * 10 * 49, 3 * 10 * 9, 3 * 245, 3 * 22]
    flops = [line.flops for line in lines]
    assert flops[1] > flops[3]
    assert flops[2] > flops[3]


def test_a_plan_refuses_what_quantize_refuses():
    case = zoo.cnn()
    with pytest.raises(ValueError, match="Did you mean 'Dense_0/kernel'"):
        jpfq.plan(case.model, case.batches[0], jpfq.Rule("Dens_0/kernel", bits=4), **case.given)


def decoder(depth, width, heads, kv_heads, hidden, vocabulary, dtype):
    """A decoder in the shapes of the Llama family, as a function and abstract parameters."""
    shape, head = (lambda *s: jax.ShapeDtypeStruct(s, dtype)), width // heads
    names = {
        "q": (width, heads, head),
        "k": (width, kv_heads, head),
        "v": (width, kv_heads, head),
        "o": (heads, head, width),
    }
    names |= {
        "gate": (width, hidden),
        "up": (width, hidden),
        "down": (hidden, width),
        "norm1": (width,),
        "norm2": (width,),
    }
    params = {f"layer_{i}": {name: shape(*s) for name, s in names.items()} for i in range(depth)}
    params |= {"embed": shape(vocabulary, width), "head": shape(width, vocabulary)}
    norm = lambda x, scale: scale * x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-5)

    @jax.checkpoint
    def block(p, x):
        h = norm(x, p["norm1"])
        q, k, v = (jnp.einsum("bsd,dhk->bshk", h, p[name]) for name in "qkv")
        k, v = (jnp.repeat(t, heads // kv_heads, axis=2) for t in (k, v))
        causal = jnp.tri(x.shape[1], dtype=bool)
        scores = jax.nn.softmax(jnp.where(causal, jnp.einsum("bshk,bthk->bhst", q, k), -1e9))
        x = x + jnp.einsum("bshk,hkd->bsd", jnp.einsum("bhst,bthk->bshk", scores, v), p["o"])
        h = norm(x, p["norm2"])
        return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]

    def fn(params, tokens):
        x = params["embed"][tokens]
        for i in range(depth):
            x = block(params[f"layer_{i}"], x)
        return x @ params["head"]

    return fn, params


def test_a_decoder_of_eight_billion_parameters_is_planned_without_allocating():
    fn, params = decoder(32, 4096, 32, 8, 14336, 128256, jnp.bfloat16)
    before = {id(x) for x in jax.live_arrays()}
    rules = [jpfq.Rule("head", skip=True), jpfq.Rule(".*", bits=4)]
    plan = jpfq.plan(fn, jax.ShapeDtypeStruct((4, 2048), jnp.int32), rules, params=params, batches=32)
    assert len(plan.lines) == 32 * 7
    assert sum(np.prod(line.dims) for line in plan.lines) == 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert set(plan.skipped) == {"head", "embed"}
    assert sum(x.nbytes for x in jax.live_arrays() if id(x) not in before) < 2**20
    assert plan.lines[0].rows == 32 * 4 * 2048
    # the float and the quantized activations that wait before `down`, and nothing near as large as the logits
    assert 2 * 32 * 4 * 2048 * 14336 * 2 < plan.memory < 2 * 32 * 4 * 2048 * 128256 * 2


class PeakOfArrays:
    """The most bytes of live arrays that a thread sees while the body runs."""

    def __enter__(self):
        self.peak, self.running = 0, True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while self.running:
            self.peak = max(self.peak, sum(x.nbytes for x in jax.live_arrays()))
            time.sleep(0.002)

    def __exit__(self, *_):
        self.running = False
        self.thread.join()


@pytest.mark.slow
def test_activations_and_parameters_in_the_estimate_are_those_that_live():
    """On a model whose memory is activations and parameters, not the workspace of compiled functions, which hides."""
    widths = (256, 512, 384, 16)
    params = {f"layer_{i}": zoo.normal(i, a, b) / np.sqrt(a) for i, (a, b) in enumerate(itertools.pairwise(widths))}

    def fn(params, x):
        for i in range(3):
            x = jnp.tanh(x @ params[f"layer_{i}"])
        return x

    data = [np.asarray(zoo.normal(i, 1000, 256)) for i in range(10)]
    base = sum(x.nbytes for x in jax.live_arrays()) - sum(p.nbytes for p in params.values())
    with PeakOfArrays() as seen:
        quantized = jpfq.quantize(fn, data, 4, params=params)
    plan = jpfq.plan(fn, data[0], 4, params=params, batches=10)
    held = plan.memory - max(line.workspace for line in plan.lines)
    assert 0.8 < held / (seen.peak - base) < 1.2
    assert quantized.peak_bytes < plan.memory

"""Gathered data: Grams of convolutions in parts equal those of all patches; choices of patches; waiting on the host."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from jpfq.calibrate import batch_gram, gather
from jpfq.model.program import trace
from jpfq.model.sites import find_sites
from tests.network import zoo


def convolution(groups):
    """The layout of a convolution, and its inputs in both networks."""
    kernel = jax.ShapeDtypeStruct((3, 3, 8 // groups, 8), jnp.float32)
    x = zoo.normal(0, 7, 10, 9, 8)
    fn = lambda leaves, x: zoo.convolve(x, *leaves, (2, 1), groups)
    (site,), _ = find_sites(trace(fn, ["kernel"], [kernel], x))
    return site.layout, x, x + 0.1 * zoo.normal(1, *x.shape)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_in_parts_as_in_whole(groups, drawn, weighted):
    layout, x, xq = convolution(groups)
    rows = gather.rows_shape(layout, x.shape)
    weights = jnp.broadcast_to((jnp.arange(7) % 3 * 1.0)[:, None, None], rows)[None] if weighted else None
    picked = jpfq.patches.Random(0.4).pick(layout, rows, jax.random.key(0)) if drawn else None
    whole, parts = (
        batch_gram.batch_gram(x, xq, weights, picked, batch_gram.GramOptions(layout, True, size))
        for size in (2**30, 2000)
    )
    take = lambda x: layout.rows(x) if picked is None else layout.picked(x, picked)
    X, Xq = (np.asarray(take(x), np.float64).reshape(groups, -1, 72 // groups) for x in (x, xq))
    weight = np.ones(X.shape[1]) if weights is None else np.asarray(weights).ravel()
    weight = weight if picked is None or weights is None else weight[np.asarray(picked)]
    H, drift = (np.einsum("r,bri,brj->bij", weight, A, A) for A in (Xq, X - Xq))
    for gram in (whole, parts):
        np.testing.assert_allclose(gram.H, H, atol=1e-4 * H.max())
        np.testing.assert_allclose(gram.drift, drift, atol=1e-4 * drift.max())
        np.testing.assert_allclose(gram.C, np.einsum("r,bri,brj->bij", weight, Xq, X - Xq), atol=1e-4 * H.max())
        np.testing.assert_allclose(gram.count, weight.sum())


def test_few_patches_exist_at_a_time():
    """XLA's own account of temporary memory, of one large convolution."""
    x = jax.ShapeDtypeStruct((256, 64, 64, 16), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 16, 16), jnp.float32)
    program = trace(lambda leaves, x: zoo.convolve(x, *leaves), ["kernel"], [kernel], x)
    (site,), _ = find_sites(program)
    compiled = batch_gram.batch_gram.lower(x, x, None, None, batch_gram.GramOptions(site.layout, True, 2**21)).compile()
    patches = 256 * 64 * 64 * 9 * 16 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < 0.2 * patches  # whole, for both networks: more than 2


def two_convolutions(params, x):
    """A small network without a framework, and with kernels of one shape, so that little is compiled."""
    return zoo.convolve(jax.nn.relu(zoo.convolve(x, params["first"]) + params["bias"]), params["second"])


PARAMS = {"first": zoo.normal(0, 3, 3, 4, 4), "bias": zoo.normal(1, 4), "second": zoo.normal(2, 3, 3, 4, 4)}


@pytest.mark.slow
def test_choices_of_patches_in_a_network():
    batches = zoo.batches(4, 12, 12, 4)
    rule = lambda **settings: zoo.plain(bits=4, **settings)
    quantize = lambda **settings: jpfq.quantize(
        two_convolutions, batches, rule(**settings), params=PARAMS, key=jax.random.key(0)
    )
    everything = quantize()
    for choice in (jpfq.patches.NonOverlapping(), jpfq.patches.Random(0.5)):
        some, again = quantize(patches=choice), quantize(patches=choice)
        same = [(some.tensors[k].codes == tensor.codes).mean() for k, tensor in everything.tensors.items()]
        assert min(same) < 1
        assert some.output_error < 2 * everything.output_error
        assert all((again.tensors[k].codes == some.tensors[k].codes).all() for k in some.tensors)
    with pytest.raises(ValueError, match=r"Random\(.*\) of first draws random numbers: pass key"):
        jpfq.quantize(two_convolutions, batches, rule(patches=jpfq.patches.Random(0.5)), params=PARAMS)


@pytest.mark.slow
def test_batches_that_wait_on_the_host_change_nothing():
    batches = zoo.batches(4, 12, 12, 4, count=6)
    rule = zoo.plain(bits=4, activation_bits=8, correct_bias=True)
    held = jpfq.quantize(two_convolutions, batches, rule, params=PARAMS)
    offloaded = jpfq.quantize(two_convolutions, map(np.asarray, batches), rule, params=PARAMS, offload=True)
    for path, tensor in held.tensors.items():
        np.testing.assert_array_equal(tensor.codes, offloaded.tensors[path].codes)
    assert offloaded.output_error == held.output_error
    assert offloaded.peak_bytes < 0.4 * held.peak_bytes


@pytest.mark.slow
def test_more_batches_on_the_host_take_no_more_of_the_device(monkeypatch):
    """What is live while a model is calibrated, by JAX's own list: four times the batches, at most a tenth more."""
    on_device = lambda: sum(x.nbytes for x in jax.live_arrays())
    peaks, claimed, made = [], [], gather.Gather._batches
    for count in (4, 16):
        batches = [np.asarray(b) for b in zoo.batches(32, 12, 12, 4, count=count)]
        gc.collect()
        before, seen = on_device(), []

        def watching(self, seen=seen, before=before):
            for batch in made(self):
                seen.append(on_device() - before)
                yield batch

        monkeypatch.setattr(gather.Gather, "_batches", watching)
        rule = zoo.plain(bits=4, form="gram")
        quantized = jpfq.quantize(two_convolutions, batches, rule, params=PARAMS, offload=True)
        peaks.append(max(seen))
        claimed.append(quantized.peak_bytes)
        del quantized
    assert peaks[1] < 1.1 * peaks[0]
    assert claimed[1] < 1.1 * claimed[0]


@pytest.mark.slow
def test_fresh_batches_for_every_layer():
    """Each stop sees its own batches, brought through what is quantized by then; the same ones give the same codes."""
    batches, rule = zoo.batches(4, 12, 12, 4), zoo.plain(bits=4, activation_bits=6, correct_bias=True)
    asked = []
    again = lambda number: asked.append(number) or batches
    same = jpfq.quantize(two_convolutions, again, rule, params=PARAMS)
    once = jpfq.quantize(two_convolutions, batches, rule, params=PARAMS)
    assert asked == [0, 1]
    for path, tensor in once.tensors.items():
        np.testing.assert_array_equal(tensor.codes, same.tensors[path].codes)
    assert same.output_error == pytest.approx(once.output_error, rel=1e-5)
    fresh = jpfq.quantize(two_convolutions, lambda n: [zoo.normal(50 + n, 4, 12, 12, 4)], rule, params=PARAMS)
    assert any((fresh.tensors[path].codes != once.tensors[path].codes).any() for path in once.tensors)


@pytest.mark.slow
def test_blocks_start_anew_from_the_quantized_network():
    """With every layer its own block, each is solved as if its float inputs were the quantized network's."""
    model, batches = zoo.Unrolled(), zoo.batches(40, 16)
    variables = zoo.initial(model, batches[0])
    quantize = lambda **settings: jpfq.quantize(model, batches, zoo.plain(bits=3), variables=variables, **settings)
    blockwise, exact = quantize(reference="block"), quantize()
    for path in ("layer_0/Dense_0/kernel", "layer_0/Dense_1/kernel"):  # one block: the float network's until here
        np.testing.assert_array_equal(blockwise.tensors[path].codes, exact.tensors[path].codes)
    made = {**blockwise.variables["params"]}
    x = [batches[i] for i in range(3)]
    for i in range(2):
        x = [zoo.Layer().apply({"params": made[f"layer_{i}"]}, a)[0] for a in x]
    given = {"params": variables["params"]["layer_2"]}
    layer = jpfq.quantize(
        lambda p, x: zoo.Layer().apply({"params": p}, x)[0], x, zoo.plain(bits=3), params=given["params"]
    )
    for name in ("Dense_0", "Dense_1"):
        codes = blockwise.tensors[f"layer_2/{name}/kernel"].codes
        assert (layer.tensors[f"{name}/kernel"].codes == codes).mean() > 0.99
    outputs = [[model.apply(v, b) for b in batches] for v in (variables, blockwise.variables)]
    square = lambda xs: sum(float(jnp.sum(x**2)) for x in xs)
    error = np.sqrt(square([a - b for a, b in zip(*outputs)]) / square(outputs[0]))
    assert blockwise.output_error == pytest.approx(error, rel=1e-3)  # against the float network, all the same
    with pytest.raises(ValueError, match="reference is 'float' or 'block'; got 'quantized'"):
        quantize(reference="quantized")

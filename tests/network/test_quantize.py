"""`quantize` on whole models: drop-in results, the codes of a layer-by-layer loop in NumPy, no recompilation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jpfq
from jpfq.calibrate import assemble
from jpfq.calibrate.stream import Stream
from tests.network import zoo
from tests.reference import gpfq as reference

SYMMETRIC = zoo.plain(grid=jpfq.Symmetric(4), scale=jpfq.scale.AbsMax(0.8))


def codes_of(W, X, Xq, step):
    """Codes -4 .. 4 by the reference loop, with one step per neuron."""
    levels = reference.level_lists(W.shape, step[None], range(-4, 5), np.zeros((1, 1)))
    return reference.gpfq_state(W, X, Xq, levels).index - 4


def parameters(case, quantized):
    """Paths and leaves of the parameters that came back."""
    return jax.tree_util.tree_leaves_with_path(quantized.params), jax.tree_util.tree_leaves_with_path(
        case.variables["params"] if case.variables is not None else nnx.state(case.model, nnx.Param)
    )


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in ("experts", "computed"))) for n in zoo.CASES]
)
def test_every_model_comes_back_whole(name, monkeypatch):
    case = zoo.CASES[name]()
    streamed = []
    finish = Stream.finish

    def recording(self):
        for found in finish(self):
            streamed.append(found)
            yield found

    monkeypatch.setattr(Stream, "finish", recording)
    rules = 8 if name == "stack" else zoo.plain(bits=8)
    quantized = jpfq.quantize(case.model, case.batches, rules, **case.given)

    assert set(quantized.tensors) == set(quantized.info) == case.kernels
    assert set(quantized.skipped) == case.left
    after, before = parameters(case, quantized)
    assert [path for path, _ in after] == [path for path, _ in before]
    for (path, new), (_, old) in zip(after, before):
        assert (new.shape, new.dtype) == (old.shape, old.dtype), path

    dropped_in = quantized.variables if case.variables is not None else quantized.model
    given = case.variables if case.variables is not None else case.model
    for batch, (exact, (quant,), _) in zip(case.batches, streamed, strict=True):
        scale = float(jnp.abs(exact[0]).max())
        np.testing.assert_allclose(case(given, batch), exact[0], atol=2e-5 * scale)
        np.testing.assert_allclose(case(dropped_in, batch), quant[0], atol=2e-5 * scale)
    assert 0 < quantized.output_error < 0.02


def test_codes_equal_a_layer_by_layer_reference(x64):
    """Exactly, in float64: the reference runs both networks forward for every layer and follows the path on rows."""
    generator = np.random.default_rng(0)
    weights = [generator.normal(size=s) for s in ((12, 20), (20, 16), (16, 5))]
    data = [generator.normal(size=(40, 12)) for _ in range(3)]
    fn = lambda params, x: jnp.maximum(jnp.maximum(x @ params["a"], 0) @ params["b"], 0) @ params["c"]
    quantized = jpfq.quantize(fn, data, SYMMETRIC, params=dict(zip("abc", map(jnp.asarray, weights))))

    X = Xq = np.concatenate(data)
    for name, W in zip("abc", weights):
        step = 0.8 * np.abs(W).max(0) / 4
        codes = codes_of(W, X, Xq, step)
        np.testing.assert_array_equal(quantized.tensors[name].codes, codes)
        q = codes * step
        np.testing.assert_array_equal(quantized.params[name], quantized.tensors[name].dequantize())
        np.testing.assert_allclose(quantized.params[name], q, rtol=1e-14)
        expected = np.linalg.norm(X @ W - Xq @ q) / np.linalg.norm(X @ W)
        np.testing.assert_allclose(quantized.info[name].relative_error, expected, rtol=1e-9)
        X, Xq = np.maximum(X @ W, 0), np.maximum(Xq @ q, 0)
    last = np.concatenate([fn(dict(zip("abc", weights)), x) for x in data])
    lossy = np.concatenate([fn(quantized.params, x) for x in data])
    np.testing.assert_allclose(quantized.output_error, np.linalg.norm(last - lossy) / np.linalg.norm(last), rtol=1e-9)


def test_convolutions_follow_their_true_patches(x64):
    """Stride, padding, dilation and feature groups: codes equal the reference on im2col rows."""
    generator = np.random.default_rng(1)
    W, x = generator.normal(size=(3, 2, 4, 6)), generator.normal(size=(5, 9, 8, 8))
    fn = lambda params, x: zoo.convolve(x, params["w"], (2, 1), 2, ((1, 2), (0, 1)), (2, 1))
    quantized = jpfq.quantize(fn, [x], SYMMETRIC, params={"w": jnp.asarray(W)})
    patches = reference.im2col(x, (3, 2), (2, 1), ((1, 2), (0, 1)), (2, 1), (1, 1), 2)
    for group, X in enumerate(patches.reshape(2, -1, patches.shape[-1])):
        part = W[..., group * 3 : group * 3 + 3].reshape(-1, 3)
        codes = codes_of(part, X, X, 0.8 * np.abs(part).max(0) / 4)
        got = np.asarray(quantized.tensors["w"].codes)[..., group * 3 : group * 3 + 3].reshape(-1, 3)
        np.testing.assert_array_equal(got, codes)


@pytest.mark.slow
def test_a_smaller_last_batch_counts_like_the_others(x64):
    fn = lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"]
    params = {"a": zoo.normal(0, 8, 8), "b": zoo.normal(1, 8, 8)}
    x = zoo.normal(2, 50, 8)
    whole = jpfq.quantize(fn, [x], SYMMETRIC, params=params)
    split = jpfq.quantize(fn, iter([x[:20], x[20:40], x[40:]]), SYMMETRIC, params=params)
    for name in "ab":
        np.testing.assert_array_equal(whole.tensors[name].codes, split.tensors[name].codes)
    assert whole.output_error == pytest.approx(split.output_error, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4,), (4, 6)])
@pytest.mark.parametrize("form", ["gram", "data"])
def test_rows_of_weight_zero_are_left_out(x64, shape, form):
    """Padding in sequences, merged axes and pooled samples alike."""

    def fn(params, x):
        x = jnp.tanh(x @ params["a"])
        x = (x.reshape(-1, 8) @ params["b"]).reshape(x.shape)
        return x[:, 0] @ params["c"]

    params = {name: zoo.normal(i, 8, 8) for i, name in enumerate("abc")}
    x = zoo.normal(9, 4, 6, 8)
    weights = np.ones(shape)
    weights[2:] = 0  # the last two samples are padding
    rule = zoo.plain(grid=jpfq.Symmetric(4), scale=jpfq.scale.AbsMax(0.8), form=form)
    masked = jpfq.quantize(fn, [jpfq.Weighted(x, weights)], rule, params=params)
    kept = jpfq.quantize(fn, [x[:2]], rule, params=params)
    for name in "abc":
        np.testing.assert_array_equal(masked.tensors[name].codes, kept.tensors[name].codes)


@pytest.mark.slow
def test_data_and_gram_form_agree(x64):
    params = {"w": zoo.normal(0, 300, 8)}
    x = zoo.normal(1, 20, 300)
    fn = lambda params, x: x @ params["w"]
    forms = {
        form: jpfq.quantize(fn, [x, x[:5]], zoo.plain(bits=3, form=form), params=params) for form in ("gram", "data")
    }
    np.testing.assert_array_equal(forms["gram"].tensors["w"].codes, forms["data"].tensors["w"].codes)
    for rules, form in ((zoo.plain(bits=3), "data"), (3, "gram")):  # the recommended parts work on the Gram
        assert jpfq.plan(fn, x, rules, params=params, batches=2).lines[0].form == form


def test_batches_may_be_arrays_tuples_or_dicts():
    fn = lambda params, x, scale=1.0: scale * (x @ params)
    x, params = zoo.normal(0, 10, 4), zoo.normal(1, 4, 3)
    rule = zoo.plain(bits=4)
    plain = jpfq.quantize(fn, [x], rule, params=params)
    for batch in ((x,), [x], {"x": x}, (np.asarray(x), np.float32(2.0)), {"x": x, "scale": np.ones(())}):
        again = jpfq.quantize(fn, [batch], rule, params=params)
        np.testing.assert_array_equal(plain.tensors[""].codes, again.tensors[""].codes)
    assert jpfq.quantize(fn, [x], rule, params=params, kwargs={"scale": 3.0}).tensors[""].shape == (4, 3)


def test_the_given_model_is_not_touched():
    case = zoo.mlp()
    before = jax.tree.map(np.asarray, nnx.state(case.model, nnx.Param))
    quantized = jpfq.quantize(case.model, case.batches, zoo.plain(bits=3))
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(case.model, nnx.Param))
    assert quantized.model is not case.model
    with pytest.raises(AttributeError, match=r"quantized\.params"):
        quantized.variables  # noqa: B018


@pytest.mark.slow
def test_parameters_keep_type_and_placement():
    mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "model"))
    params = {"w": jax.device_put(zoo.normal(0, 8, 6).astype(jnp.bfloat16), placed), "b": jnp.zeros(6, jnp.bfloat16)}
    fn = lambda params, x: x.astype(jnp.bfloat16) @ params["w"] + params["b"]
    quantized = jpfq.quantize(fn, [zoo.normal(1, 10, 8)], zoo.plain(bits=4), params=params)
    assert quantized.params["w"].sharding == placed
    assert quantized.params["w"].dtype == jnp.bfloat16
    assert quantized.params["b"] is params["b"]


def test_a_second_run_compiles_nothing(compilations):
    for case in (zoo.lm(), zoo.scanned()):
        jpfq.quantize(case.model, case.batches, zoo.plain(bits=4), **case.given)
        compilations.clear()
        jpfq.quantize(case.model, case.batches, zoo.plain(bits=3), **case.given)  # another width is the same program
        assert compilations == []


def test_the_summary_lists_every_kernel_and_what_was_left():
    case = zoo.lm()
    text = jpfq.quantize(case.model, case.batches, zoo.plain(bits=4), **case.given).summary()
    biases = {path for path in case.left if path.endswith("/bias")}
    for path in case.kernels | case.left:
        assert (path in text) == (path not in biases), path  # biases are counted
    every = [path for path, *_ in jax.tree_util.tree_leaves_with_path(case.variables["params"])]
    norms = sum(path[-1].key == "scale" for path in every)
    assert f"Also left: {sum(path[-1].key == 'bias' for path in every)} biases and {norms} norm scales." in text
    assert "tied: an embedding that a product uses too; add Rule('Embed_0/embedding', bits=8)" in text


def test_per_group_scales_land_on_the_kernel():
    """Groups of input coordinates in a kernel of rank 3 whose contracted axes are merged."""
    W, x = zoo.normal(0, 4, 8, 6), zoo.normal(1, 20, 4, 8)
    fn = lambda params, x: jnp.einsum("bhd,hdo->bo", x, params["w"])
    rule = zoo.plain(bits=4, scale=jpfq.scale.AbsMax(per=jpfq.scale.PerGroup(4)))
    quantized = jpfq.quantize(fn, [x], rule, params={"w": W})
    tensor = quantized.tensors["w"]
    assert tensor.step.shape == (4, 2, 6)
    np.testing.assert_allclose(tensor.step, np.abs(np.asarray(W).reshape(4, 2, 4, 6)).max(2) / 7, rtol=1e-6)
    np.testing.assert_array_equal(quantized.params["w"], tensor.dequantize())


@pytest.mark.slow
def test_a_per_tensor_scale_is_one_number_for_all_groups():
    W, x = zoo.normal(0, 3, 3, 1, 6), zoo.normal(1, 4, 8, 8, 6)
    fn = lambda params, x: zoo.convolve(x, params, groups=6)
    tensor = jpfq.quantize(fn, [x], zoo.plain(bits=4, scale=jpfq.scale.Median(3.0)), params=W).tensors[""]
    assert tensor.step.shape == (1, 1, 1, 1)
    np.testing.assert_allclose(tensor.step.item(), 3 * np.median(np.abs(W)) / 7, rtol=1e-6)


@pytest.mark.slow
def test_boxed_parameters_and_transposed_convolutions():
    """Parameters in a box with axis names keep it, and their paths do not show it."""

    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x):
            names = nn.with_partitioning(nn.initializers.lecun_normal(), (None, "model"))
            return nn.ConvTranspose(4, (3, 3), strides=(2, 2))(nn.relu(nn.Dense(16, kernel_init=names)(x)))

    model, x = Boxed(), zoo.normal(0, 8, 5, 5, 6)
    variables = zoo.initial(model, x)
    quantized = jpfq.quantize(model, [x], zoo.plain(bits=8), variables=variables)
    assert set(quantized.tensors) == {"Dense_0/kernel", "ConvTranspose_0/kernel"}
    assert isinstance(quantized.variables["params"]["Dense_0"]["kernel"], nn.Partitioned)
    error = model.apply(quantized.variables, x) - model.apply(variables, x)
    assert quantized.output_error == pytest.approx(
        float(jnp.linalg.norm(error) / jnp.linalg.norm(model.apply(variables, x))), rel=1e-3
    )


def test_a_stream_of_random_numbers_that_is_only_read_is_no_matter():
    """The counter of an NNX model moves, and what it counts is not used."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.rngs, self.head = rngs, nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            self.rngs.params()
            return self.head(x)

    assert 0 < jpfq.quantize(Model(nnx.Rngs(0)), zoo.batches(9, 4), zoo.plain(bits=8)).output_error < 0.02


def test_a_key_that_is_only_carried_along_is_no_random_number():
    key = jax.random.key(3)
    fn = lambda params, x: x @ params + jax.random.key_data(key)[0].astype(jnp.float32)
    assert jpfq.quantize(fn, [zoo.normal(0, 9, 3)], zoo.plain(bits=8), params=zoo.normal(1, 3, 2)).output_error < 0.02


@pytest.mark.parametrize(
    "scaled", [lambda w: w * 4.0, lambda w: 4.0 * w, lambda w: w / 0.25, lambda w: (w * 8).T.T / 2]
)
def test_a_constant_factor_on_a_kernel_goes_into_the_steps(scaled, x64):
    """The parameter comes back in its own units, with the codes of the kernel that the product sees."""
    batches, w = zoo.batches(9, 6), zoo.normal(7, 6, 3)
    one = jpfq.quantize(lambda params, x: x @ scaled(params), batches, SYMMETRIC, params=w)
    two = jpfq.quantize(lambda params, x: x @ params, batches, SYMMETRIC, params=4 * w)
    (a,), (b,) = one.tensors.values(), two.tensors.values()
    np.testing.assert_array_equal(a.codes, b.codes)
    np.testing.assert_array_equal(4 * a.step, b.step)
    np.testing.assert_array_equal(4 * one.params, two.params)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["gram", "data"])
def test_one_input_per_batch_entry_is_one_row(form, x64):
    """A product that has batch axes alone, and no axis of rows besides."""
    batches, w = zoo.batches(5, 6), zoo.normal(7, 5, 6, 3)
    rule = dataclasses.replace(SYMMETRIC, form=form)
    one = jpfq.quantize(lambda w, x: jnp.einsum("bi,bio->bo", x, w), batches, rule, params=w)
    two = [jpfq.quantize(lambda w, x: x[:, i] @ w, [x[None] for x in batches], rule, params=w[i]) for i in range(5)]
    np.testing.assert_array_equal(one.params, jnp.stack([q.params for q in two]))


@pytest.mark.slow
def test_what_a_model_maps_over_devices_by_hand_is_part_of_it():
    mesh, spec = jax.sharding.Mesh(jax.devices()[:1], ("data",)), jax.sharding.PartitionSpec("data")
    doubled = jax.shard_map(lambda x: 2 * x, mesh=mesh, in_specs=spec, out_specs=spec)
    batches, w = zoo.batches(9, 6), zoo.normal(7, 6, 3)
    one = jpfq.quantize(lambda w, x: doubled(x) @ w, batches, zoo.plain(bits=4), params=w)
    two = jpfq.quantize(lambda w, x: (2 * x) @ w, batches, zoo.plain(bits=4), params=w)
    np.testing.assert_array_equal(one.params, two.params)


@pytest.mark.slow
def test_compilations_do_not_grow_with_depth(compilations):
    """Equal blocks are compiled once. The last test here, since it empties the caches."""

    class Deep(nn.Module):
        depth: int

        @nn.compact
        def __call__(self, x):
            for i in range(self.depth):
                x, _ = zoo.Layer(name=f"layer_{i}")(nn.LayerNorm()(x))
            return nn.Dense(7)(x)

    counts, batches = [], zoo.batches(32, 16)
    for depth in (3, 6):
        model = Deep(depth)
        variables = zoo.initial(model, batches[0])
        jax.clear_caches()
        assemble._runs.cache_clear()
        compilations.clear()
        jpfq.quantize(model, batches, zoo.plain(bits=4), variables=variables)
        counts.append(len(compilations))
    assert counts[0] == counts[1] > 0

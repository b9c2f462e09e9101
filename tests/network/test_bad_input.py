"""Input that cannot be used: an error that says what was given, what was expected and what to do, before any work."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jpfq
from tests.network import zoo

X = np.random.default_rng(0).normal(size=(10, 4)).astype(np.float32)
PARAMS = {"layer_1": {"kernel": np.ones((4, 3), np.float32)}, "layer_2": {"kernel": np.ones((3, 2), np.float32)}}

PLAIN = zoo.plain(bits=4)


def two_layers(params, x):
    return jnp.tanh(x @ params["layer_1"]["kernel"]) @ params["layer_2"]["kernel"]


def quantize(batches=(X,), rules=PLAIN, params=PARAMS, fn=two_layers, **kwargs):
    return jpfq.quantize(fn, list(batches), rules, params=params, **kwargs)


def test_the_baseline_of_these_tests_works():
    assert set(quantize().tensors) == {"layer_1/kernel", "layer_2/kernel"}


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "batches is empty"),
        ([X, X * np.nan], "Batch 1 holds NaN or infinity"),
        ([X, X, np.full_like(X, np.inf)], "Batch 2 holds NaN or infinity"),
        ([X, (X, X)], "Batch 1 has the structure"),
        ([X, X[:, :3]], r"runs on the first batch, of shapes \(10, 4\), but fails on one of shapes \(10, 3\)"),
        ([X, X[:, 0]], r"Batch 1 has an input of shape \(10,\).*first has \(10, 4\)"),
        ([X, X.astype(np.int32)], "int32"),
        ([(X, "eval")], "'eval', which is not an array.*kwargs"),
        ([{"x": X, "train": False}], "False, which is not an array.*kwargs"),
        ([jpfq.Weighted(X, np.ones(7))], r"row weights of shape \(7,\).*\(10, 4\)"),
        ([jpfq.Weighted(X, -np.ones(10))], "negative or not finite"),
    ],
)
def test_batches(batches, message):
    with pytest.raises(ValueError, match=message):
        quantize(batches)


def test_an_array_is_not_a_list_of_batches():
    with pytest.raises(ValueError, match=r"did you mean \[x\]"):
        jpfq.quantize(two_layers, X, 4, params=PARAMS)


def test_a_batch_that_the_model_does_not_take():
    takes_a_dict = lambda params, seen: two_layers(params, seen["view/0"])
    with pytest.raises(ValueError, match=r"keywords view/0: .*give the tuple \(batch,\).*unexpected keyword argument"):
        quantize([{"view/0": X}], fn=takes_a_dict)
    assert quantize([({"view/0": X},)], fn=takes_a_dict).tensors
    with pytest.raises(ValueError, match=r"2 positional: leave out .* labels.*takes 2 positional arguments but 3"):
        quantize([(X, np.arange(10))])
    with pytest.raises(ValueError, match=r"constants go into kwargs.*missing 1 required"):
        quantize(fn=lambda params, x, *, train: two_layers(params, x))
    with pytest.raises(TypeError, match="contracting dimensions"):  # a mistake of another kind
        quantize([{"x": X}], fn=lambda params, x: two_layers(params, x[:, :3]))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(bad):
    params = {**PARAMS, "layer_2": {"kernel": np.full((3, 2), bad, np.float32)}}
    with pytest.raises(ValueError, match=r"layer_2/kernel holds NaN or infinity"):
        quantize(params=params)


def test_data_that_overflow_on_the_way_name_the_site():
    fn = lambda params, x: jnp.exp(1e3 * (x @ params["layer_1"]["kernel"])) @ params["layer_2"]["kernel"]
    with pytest.raises(ValueError, match=r"inputs of layer_2/kernel are infinite or NaN in the float network"):
        quantize(fn=fn)


@pytest.mark.parametrize("dtype", [np.int8, np.complex64])
def test_integer_and_complex_weights_are_refused(dtype):
    params = {**PARAMS, "layer_2": {"kernel": np.ones((3, 2), dtype)}}
    fn = lambda params, x: jnp.real(two_layers(params, x))
    with pytest.raises(ValueError, match=rf"layer_2/kernel: holds {np.dtype(dtype)}"):
        quantize(params=params, fn=fn, rules=[jpfq.Rule("layer_1/.*", skip=True), zoo.plain("layer_2/.*", bits=4)])
    assert "holds" in quantize(params=params, fn=fn).skipped["layer_2/kernel"]


def test_products_with_complex_numbers_are_listed():
    fn = lambda params, x: jnp.real(jnp.exp(1j * (x @ params["first"])) @ params["second"])
    params = {"first": zoo.normal(0, 4, 3), "second": zoo.normal(1, 3, 2)}
    assert quantize(fn=fn, params=params).skipped == {"second": "it multiplies complex64 numbers"}


@pytest.mark.parametrize("bits", [0, 17, -1, 2.5, "4", None, True, [], [4]])
def test_bits_out_of_range(bits):
    with pytest.raises(ValueError, match=r"bits|rules"):
        quantize(rules=bits)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([("layer_3/.*", {"bits": 4})], r"matches no parameter. Did you mean 'layer_[12]/kernel'"),
        ([("kernel", {"bits": 4})], "must match the whole path"),
        ([(".*", {"bits": 4}), ("layer_1/.*", {"bits": 8})], "Rule 1 .* has no effect: rule 0"),
        ([(".*", {"skip": True})], "There is nothing to quantize in this model"),
        ([("(", {"bits": 4})], "regular expression"),
        ([(".*", {})], "bits=... or grid="),
        ([(".*", {"bits": 4, "grid": jpfq.Ternary()})], "one of them"),
        ([(".*", {"bits": 4, "method": jpfq.GPFQ})], r"did you mean jpfq.GPFQ\(\)"),
        ([(".*", {"bits": 4, "scale": "absmax"})], r"scale takes a Scale, such as jpfq.scale.AbsMax\(\)"),
        ([(".*", {"skip": True, "bits": 4})], r"skips its kernels, so \['bits'\] mean nothing"),
        ([(".*", {"bits": 4, "form": "rows"})], "form is"),
        ([(".*", {"bits": 4, "unsupported": "ignore"})], "unsupported is"),
        ([(".*", {"bits": 4, "method": jpfq.OPTQ(), "form": "data"})], r"Rule\('\.\*'\): OPTQ.* has no data form"),
        ([(".*", {"bits": 4, "finish": jpfq.finish.Refit(), "form": "data"})], r"Refit\(\) has no data form"),
        ([("a", {"bits": 1, "rounding": jpfq.rounding.Prune(0.1)})], r"Rule\('a'\): Prune.* no level of Binary"),
        (
            [(".*", {"bits": 4, "rounding": jpfq.rounding.HardThreshold(0.1), "finish": jpfq.finish.CosineDescend()})],
            r"CosineDescend.* would bring back weights .* take finish=Refit\(\) or None",
        ),
        (
            [(".*", {"bits": 4, "scale": jpfq.scale.Fixed(0.1), "finish": jpfq.finish.Refit()})],
            r"Rule.* changes the step that Fixed",
        ),
        (
            [
                (
                    ".*",
                    {
                        "bits": 4,
                        "scale": jpfq.scale.MinError(jpfq.scale.AbsMax(per=jpfq.scale.PerGroup(2, refit=True))),
                    },
                )
            ],
            r"searches for steps beforehand",
        ),
        (
            [
                (
                    ".*",
                    {
                        "bits": 4,
                        "order": jpfq.order.Descending(),
                        "scale": jpfq.scale.AbsMax(per=jpfq.scale.PerGroup(2, refit=True)),
                    },
                )
            ],
            r"needs order=Natural",
        ),
        (
            [(".*", {"bits": 4, "prepare": jpfq.prepare.MalySaab(), "rotation": jpfq.Hadamard()})],
            r"works on the calibration rows: alone",
        ),
        (
            [(".*", {"bits": 4, "finish": jpfq.finish.CosineDescend})],
            r"finish takes a Finish.*did you mean jpfq.finish.CosineDescend\(\)",
        ),
        ([(".*", {"bits": 4, "order": "descending"})], r"order takes an Order, such as jpfq.order.Natural\(\)"),
        ([(".*", {"skip": True, "finish": None})], r"skips its kernels, so \['finish'\] mean nothing"),
    ],
)
def test_rules(rules, message):
    with pytest.raises(ValueError, match=message):
        quantize(rules=[jpfq.Rule(pattern, **settings) for pattern, settings in rules])


def test_a_rule_that_names_what_cannot_be_quantized():
    case = zoo.computed()
    run = lambda *rules: jpfq.quantize(case.model, case.batches, list(rules), **case.given)
    rest = zoo.plain(bits=8)
    with pytest.raises(
        ValueError, match=r"(?s)matches kernels that cannot be quantized.*shared: shared: used by 2 products"
    ):
        run(jpfq.Rule("shared", bits=8), rest)
    with pytest.raises(ValueError, match=r"cannot be quantized"):
        run(jpfq.Rule(".*", bits=8, unsupported="error"))
    assert "shared" in run(jpfq.Rule("shared", bits=8, unsupported="skip"), rest).skipped
    assert "skips it" in run(jpfq.Rule("shared", skip=True), rest).skipped["shared"]


def test_a_model_with_nothing_to_quantize():
    with pytest.raises(ValueError, match=r"(?s)cannot be quantized.*table: an embedding; add Rule"):
        quantize([np.zeros(3, np.int32)], params={"table": np.ones((5, 2), np.float32)}, fn=lambda p, i: p["table"][i])
    with pytest.raises(ValueError, match=r"no matrix products|matches no"):
        quantize(params={"scale": np.ones(4, np.float32)}, fn=lambda p, x: p["scale"] * x)


def test_a_step_of_zero_under_weights_names_the_kernel_and_an_all_zero_neuron_does_not():
    W = np.zeros((4, 3), np.float32)
    W[0, 1] = 1.0
    with pytest.raises(ValueError, match=r"Median.* gives a step of zero under weights of layer_1/kernel"):
        quantize(rules=zoo.plain(bits=4, scale=jpfq.scale.Median(3.0)), params={**PARAMS, "layer_1": {"kernel": W}})
    quantized = quantize(params={**PARAMS, "layer_1": {"kernel": W}})
    np.testing.assert_array_equal(quantized.params["layer_1"]["kernel"][:, [0, 2]], 0)
    assert np.isfinite(quantized.output_error)


def test_models_and_their_parameters():
    module = nn.Dense(3)
    variables = module.init(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"needs its variables"):
        jpfq.quantize(module, [X], 4)
    with pytest.raises(ValueError, match=r"collection 'params'.*\['bias', 'kernel'\]"):
        jpfq.quantize(module, [X], 4, variables=variables["params"])
    with pytest.raises(ValueError, match=r"takes variables; got params"):
        jpfq.quantize(module, [X], 4, params=variables)
    with pytest.raises(ValueError, match=r"needs its parameters"):
        jpfq.quantize(two_layers, [X], 4)
    with pytest.raises(ValueError, match=r"neither variables nor params"):
        jpfq.quantize(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), [X], 4, params={})
    with pytest.raises(ValueError, match=r"model is a Linen module"):
        jpfq.quantize("resnet", [X], 4, params={})


class Training(nn.Module):
    """A Linen model that is still in training: of dropout or of BatchNorm."""

    dropout: bool

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(4)(x)
        return nn.Dropout(0.5, deterministic=False)(x) if self.dropout else nn.BatchNorm(use_running_average=False)(x)


@pytest.mark.parametrize(("dropout", "message"), [(True, "Dropout.*deterministic"), (False, "BatchNorm.*train")])
def test_linen_models_in_training_are_refused(dropout, message):
    model = Training(dropout)
    variables = model.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, X)
    with pytest.raises(ValueError, match=message):
        jpfq.quantize(model, [X], 4, variables=variables)


@pytest.mark.parametrize("part", ["drop", "norm"])
def test_nnx_models_in_training_are_refused(part):
    case = zoo.mlp()
    getattr(case.model, part).train()
    with pytest.raises(ValueError, match=rf"'{part}/.*model\.eval\(\)"):
        jpfq.quantize(case.model, case.batches, 4)


def test_a_model_that_changes_from_trace_to_trace_is_refused():
    noise = np.random.default_rng(0)
    fn = lambda params, x: (x + noise.standard_normal(8).astype(np.float32)) @ params["kernel"]
    with pytest.raises(ValueError, match="gives two different programs"):
        jpfq.quantize(fn, [zoo.normal(0, 5, 8)], 4, params={"kernel": zoo.normal(1, 8, 3)})


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_an_overflow_in_a_short_type_names_the_site(dtype):
    def fn(params, x):
        x = (x.astype(dtype) @ params["first"].astype(dtype)) * jnp.asarray(1e4, dtype)
        return jnp.square(x * x * x * x * x) @ params["second"].astype(dtype)

    params = {"first": zoo.normal(1, 8, 8), "second": zoo.normal(2, 8, 3)}
    with pytest.raises(ValueError, match="The inputs of second are infinite or NaN in the float network"):
        jpfq.quantize(fn, [zoo.normal(0, 5, 8)], 4, params=params)


def test_strict_refuses_what_cannot_be_quantized():
    case = zoo.computed()
    with pytest.raises(ValueError, match=r"strict=True(.|\n)*branch: .*cond(.|\n)*shared: used by 2 products"):
        jpfq.quantize(case.model, case.batches, zoo.plain(bits=4), strict=True, **case.given)
    rules = [jpfq.Rule("standardised|branch|shared|picked", skip=True), zoo.plain(bits=4)]
    assert set(jpfq.quantize(case.model, case.batches, rules, strict=True, **case.given).tensors) == case.kernels


def test_fresh_batches_are_of_one_size():
    params = {"kernel": zoo.normal(1, 8, 8), "last": zoo.normal(2, 8, 3)}
    fn = lambda p, x: jnp.tanh(x @ p["kernel"]) @ p["last"]
    sizes = iter((5, 6))
    with pytest.raises(
        ValueError, match=r"batches for stop 1 do not all have the shapes of the first ones, \[\(5, 8\)\]"
    ):
        jpfq.quantize(fn, lambda number: [zoo.normal(number, next(sizes), 8)], zoo.plain(bits=4), params=params)
    with pytest.raises(ValueError, match="must have one size, and need reference='float'"):
        jpfq.quantize(fn, lambda number: [zoo.normal(0, 5, 8)], 4, params=params, reference="block")


def attends(params, inputs):
    """Attention whose scores take a bias from the batch, and labels that reach no product."""
    x, bias, labels = inputs["x"], inputs["bias"], inputs["labels"]
    q, k, v = jnp.split(x @ params["qkv"], 3, -1)
    return jax.nn.softmax(q @ k.mT + bias) @ v @ params["out"], labels


@pytest.mark.slow
def test_a_bias_of_minus_infinity_is_the_models_own_affair():
    """Scores of -inf are those of -1e30, to the last code; labels of NaN meet no layer."""
    params = {"qkv": zoo.normal(40, 8, 24), "out": zoo.normal(41, 8, 6)}
    causal, labels = jnp.tril(jnp.ones((5, 5), bool)), jnp.full(4, jnp.nan)
    batch = lambda lowest: {"x": zoo.normal(42, 4, 5, 8), "bias": jnp.where(causal, 0.0, lowest), "labels": labels}
    made = [quantize([(batch(lowest),)], fn=attends, params=params) for lowest in (-jnp.inf, -1e30)]
    for path in params:
        np.testing.assert_array_equal(made[0].tensors[path].codes, made[1].tensors[path].codes)
        assert np.isfinite(made[0].info[path].square_error)
    jpfq.plan(attends, (batch(-jnp.inf),), 4, params=params)
    everything = jnp.full((5, 5), -jnp.inf)  # and a softmax over nothing is NaN
    with pytest.raises(
        ValueError, match=r"Batch 1 holds NaN or infinity: the inputs of out are .* in the float network"
    ):
        quantize([(batch(-jnp.inf),), ({**batch(0.0), "bias": everything},)], fn=attends, params=params)
    with pytest.raises(ValueError, match=r"Batch 0 holds NaN or infinity: the inputs of qkv are .*Replace these"):
        jpfq.budget(attends, [({**batch(0.0), "x": jnp.full((4, 5, 8), jnp.inf)},)], 4, params=params)


def test_fresh_batches_and_sweeps_name_a_batch_that_is_not_finite():
    bad = lambda number: [X, X * (np.nan if number else 1)]
    with pytest.raises(ValueError, match=r"Batch 1 holds NaN or infinity: the inputs of layer_2/kernel"):
        jpfq.quantize(two_layers, bad, PLAIN, params=PARAMS)
    with pytest.raises(ValueError, match=r"Batch 1 holds NaN or infinity: the inputs of layer_1/kernel"):
        jpfq.sweep(two_layers, bad(1), jpfq.Space(lambda bits: zoo.plain(bits=bits), bits=[3, 4]), params=PARAMS)


class Decodes(nn.Module):
    """Attention that goes one position at a time, by a cache."""

    @nn.compact
    def __call__(self, x):
        return nn.MultiHeadDotProductAttention(num_heads=2, decode=True)(x)


@pytest.mark.parametrize("kind", ["linen", "linen without a cache", "nnx"])
def test_a_cache_of_decoding_is_called_by_its_name(kind):
    x, given = zoo.normal(0, 2, 6, 8), {}
    if kind == "nnx":
        model = nnx.MultiHeadAttention(2, 8, decode=True, rngs=nnx.Rngs(0))
        model.init_cache(x.shape)
    else:
        model = Decodes()
        variables = zoo.initial(model, x)
        given["variables"] = variables if kind == "linen" else {"params": variables["params"]}
    with pytest.raises(ValueError, match=r"fills a cache.*decode=False") as caught:
        jpfq.quantize(model, [x[:, :1]], 4, **given)
    assert "eval()" not in str(caught.value)
    assert "BatchNorm" not in str(caught.value)


CALLS = itertools.count()


def called_back(factor):
    """Two layers with a function of NumPy between them, made anew each time; the factor may be one of each call."""

    def fn(params, x):
        scale = np.float32(factor if factor else next(CALLS))
        out = jax.ShapeDtypeStruct((x.shape[0], 3), jnp.float32)
        hidden = jax.pure_callback(lambda x: np.tanh(scale * x), out, x @ params["layer_1"]["kernel"])
        return hidden @ params["layer_2"]["kernel"]

    return fn


def test_a_pure_callback_of_a_local_function_is_no_state():
    found = quantize(fn=called_back(1.0))
    expected = quantize()
    assert found.output_error == pytest.approx(expected.output_error, rel=1e-4)
    for path, tensor in expected.tensors.items():
        np.testing.assert_array_equal(found.tensors[path].codes, tensor.codes)
    with pytest.raises(ValueError, match="gives two different programs"):  # it captures another number each time
        quantize(fn=called_back(None))

    def told(params, x):
        out = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return two_layers(params, jax.experimental.io_callback(lambda x: x, out, x))

    with pytest.raises(ValueError, match="gives two different programs"):
        quantize(fn=told)

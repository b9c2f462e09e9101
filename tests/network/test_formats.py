"""Formats as rules: bits per weight are those of the standard, and the recommended recipe beats the format's rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpfq

N, OUT = 128, 8
BITS = {
    "int4": 4 + 16 / N,
    "int8": 8 + 16 / N,
    "mxfp4": 4.25,
    "mxfp6": 6.25,
    "mxfp8": 8.25,
    "mxint8": 8.25,
    "nvfp4": 4.5 + 32 / (N * OUT),
    "fp8": 8 + 32 / N,
    "nf4": 4.5,
    "q4_0": 4.5,
    "q8_0": 8.5,
    "q4_1": 5.0,
}
K_QUANTS = {"q4_k": 4.5, "q6_k": 6.5625}


@pytest.fixture(scope="module")
def layer():
    """Weights with some outliers, and correlated inputs."""
    rng = np.random.default_rng(0)
    W = rng.standard_normal((N, OUT)) * rng.lognormal(0, 0.5, (N, 1))
    X = rng.standard_normal((400, N)) @ (np.eye(N) + 0.5 * rng.standard_normal((N, N)) / np.sqrt(N))
    return {"kernel": jnp.asarray(W, jnp.float32)}, [jnp.asarray(X, jnp.float32)]


def quantized(layer, rules):
    params, batches = layer
    return jpfq.quantize(lambda params, x: x @ params["kernel"], batches, rules, params=params)


@pytest.mark.slow
@pytest.mark.parametrize("name", BITS)
def test_bits_per_weight_are_those_of_the_format(layer, name):
    rules = getattr(jpfq.formats, name)(plain=True, method=jpfq.MSQ())
    found = quantized(layer, rules)
    tensor = found.tensors["kernel"]
    assert tensor.bits_per_weight == BITS[name]
    error = float(found.info["kernel"].relative_error)
    assert error < (0.25 if BITS[name] <= 5 else 0.07)
    assert found.info["kernel"].saturated_steps == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
def test_recommended_beats_the_rounding_of_the_format(layer, name):
    make = getattr(jpfq.formats, name)
    plain, best = (
        float(quantized(layer, rules).info["kernel"].relative_error)
        for rules in (make(plain=True, method=jpfq.MSQ()), make())
    )
    assert best < 0.9 * plain


@pytest.mark.parametrize("name", ["q4_k", pytest.param("q6_k", marks=pytest.mark.slow)])
def test_k_quants(name, tmp_path):
    """Bits of the format, which the plan says too; better than its rounding, and than Q4_0 at the same bits; saved."""
    rng = np.random.default_rng(0)
    W = rng.standard_normal((256, OUT)) * rng.lognormal(0, 0.5, (256, 1))
    X = rng.standard_normal((400, 256)) @ (np.eye(256) + 0.7 * rng.standard_normal((256, 256)) / 16)
    X = jnp.asarray(X, jnp.float32)
    params = {"kernel": jnp.asarray(W, jnp.float32), "odd": jnp.ones((40, OUT))}
    model = lambda params, x: x @ params["kernel"] + x[:, :40] @ params["odd"]
    call = lambda rules: jpfq.quantize(model, [X], rules, params=params)
    make = getattr(jpfq.formats, name)
    best, rounded = call(make()), call(make(plain=True, method=jpfq.MSQ()))
    error = lambda found: float(found.info["kernel"].relative_error)
    assert error(best) < 0.9 * error(rounded)
    assert error(best) < error(call(jpfq.formats.q4_0(pattern="kernel")))
    tensor = best.tensors["kernel"]
    assert tensor.bits_per_weight == K_QUANTS[name]
    plan = jpfq.plan(model, X, make(), params=params)
    assert plan.packed == {"kernel": tensor.nbytes}
    kind = "uint6_float16" if name == "q4_k" else "int8_float16"
    reason = f"{kind} has a float16 for every 256 inputs, which do not divide its 40: take another format for it"
    assert plan.skipped == best.skipped == {"odd": reason}
    best.save(tmp_path / "saved")
    again = jpfq.load(tmp_path / "saved").tensors["kernel"]
    np.testing.assert_array_equal(again.dequantize(), tensor.dequantize())
    np.testing.assert_array_equal(again.dequantize(), best.params["kernel"])
    assert again.nbytes == tensor.nbytes
    served = best.serve()
    np.testing.assert_array_equal(jpfq.dequantize(served.params)["kernel"], tensor.dequantize())
    if name == "q4_k":
        for export in ("awq", "compressed-tensors"):
            with pytest.raises(ValueError, match=r"kernel: the levels of Offset\(4\) are a step times integers, minus"):
                best.export(export, tmp_path / export)


def test_a_format_takes_what_a_rule_takes():
    (rule,) = jpfq.formats.int4(group=64, pattern="head/.*", activation_bits=8, finish=None)
    assert (rule.pattern, rule.activation_bits, rule.finish) == ("head/.*", 8, None)
    assert rule.scale.per == jpfq.scale.PerGroup(64)
    (rule,) = jpfq.formats.mxfp6(jpfq.E3M2())
    assert rule.grid == jpfq.E3M2()
    with pytest.raises(ValueError, match=r"This format has the grids E2M3.* and E3M2"):
        jpfq.formats.mxfp6(jpfq.E4M3())


def test_a_group_that_does_not_divide_is_refused():
    params = {"kernel": jnp.ones((40, 4))}
    layer = params, [jax.random.normal(jax.random.key(0), (64, 40))]
    with pytest.raises(ValueError, match=r"kernel: PerGroup\(32\) does not divide its 40 inputs"):
        quantized(layer, jpfq.formats.mxfp4())


def test_kernels_that_groups_do_not_divide_are_listed():
    """Beside kernels that they do divide; with strict they are refused, and the plan says the same."""
    key = jax.random.key(0)
    params = {"first": jax.random.normal(key, (40, 32)), "second": jax.random.normal(key, (32, 4))}
    X = jax.random.normal(key, (64, 40))
    model = lambda params, x: jax.nn.relu(x @ params["first"]) @ params["second"]
    call = lambda **options: jpfq.quantize(model, [X], jpfq.formats.mxfp4(), params=params, **options)
    found = call()
    assert list(found.tensors) == ["second"]
    assert list(found.skipped) == ["first"]
    assert found.skipped["first"].startswith("PerGroup(32) does not divide its 40 inputs")
    assert jpfq.plan(model, X, jpfq.formats.mxfp4(), params=params).skipped == found.skipped
    with pytest.raises(ValueError, match=r"strict=True.*\n *first: PerGroup\(32\) does not divide"):
        call(strict=True)
    (rule,) = jpfq.formats.mxfp4(unsupported="error")
    with pytest.raises(ValueError, match=r"Rule 0 .*\n *first: PerGroup\(32\) does not divide"):
        jpfq.quantize(model, [X], rule, params=params)


@pytest.mark.slow
def test_tables_of_integers_run_in_integers(layer):
    """E2M1 in halves: the network of integer products is the quantized one, and no sum is wider than certified."""
    (batch,) = layer[1]
    settings = {"plain": True, "activation_bits": 8, "scale": jpfq.scale.AbsMax()}
    found = quantized(layer, jpfq.Rule(".*", grid=jpfq.E2M1(), **settings))
    np.testing.assert_allclose(found.apply_integer(batch), found.apply(batch), rtol=1e-4, atol=1e-3)
    needed = jpfq.certify(found).needed
    integers = np.abs(2 * np.array(found.tensors["kernel"].grid.values))[np.asarray(found.tensors["kernel"].codes)]
    assert needed <= int(255 * integers.sum(0).max()).bit_length() + 1
    wide = found.apply_integer(batch, accumulator=jpfq.Accumulator(needed))
    np.testing.assert_array_equal(wide, found.apply_integer(batch))
    without = quantized(layer, jpfq.Rule(".*", grid=jpfq.NF4(), **settings))
    for run in (lambda: without.apply_integer(batch), lambda: jpfq.certify(without)):
        with pytest.raises(ValueError, match=r"kernel: The levels of NF4\(\) are no whole multiples of one number"):
            run()
    inputs = jpfq.Activations(jpfq.E4M3(), per="row")
    floats = quantized(layer, jpfq.Rule(".*", bits=4, plain=True, activations=inputs))
    assert 0 < floats.output_error < 0.5
    with pytest.raises(ValueError, match="inputs that are summed are runs of integers"):
        floats.apply_integer(batch)


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(jpfq.MSQ(), marks=pytest.mark.slow),
        jpfq.GPFQ(),
        pytest.param(jpfq.Qronos(), marks=pytest.mark.slow),
    ],
)
def test_steps_of_blocks_are_one_number(layer, method):
    """Codes are those of the same steps, given one for each group and neuron."""
    params, (X,) = layer
    W, gram = params["kernel"], jpfq.Gram.from_data(X)
    settings = {"plain": True, "method": method}
    blocks = jpfq.scale.AbsMax(per=jpfq.scale.PerBlock(32, 4))
    tensor, _ = jpfq.solve(W, gram, grid=jpfq.E4M3(), scale=blocks, **settings)
    assert tensor.step.shape == (4, 2)
    given = jpfq.scale.Fixed(np.repeat(np.asarray(tensor.step), 4, axis=1))
    each, _ = jpfq.solve(W, gram, grid=jpfq.E4M3(), scale=given, **settings)
    np.testing.assert_array_equal(tensor.codes, each.codes)
    np.testing.assert_array_equal(tensor.dequantize(), each.dequantize())


@pytest.mark.slow
def test_blocks_of_steps_in_a_network(layer, tmp_path):
    rules = jpfq.formats.fp8(block=(32, 4))
    found = quantized(layer, rules)
    tensor = found.tensors["kernel"]
    assert tensor.bits_per_weight == 8 + 32 / (32 * 4)
    assert float(found.info["kernel"].relative_error) < 0.03
    found.save(tmp_path / "saved")
    loaded = jpfq.load(tmp_path / "saved")
    np.testing.assert_array_equal(loaded.tensors["kernel"].dequantize(), tensor.dequantize())
    assert loaded.tensors["kernel"].step.shape == (4, 2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jpfq.formats.fp8(block=128), r"the inputs and the neurons that share a step, such as .*; got 128"),
        (lambda: jpfq.formats.fp8(32, block=(32, 4)), r"group=.. or block=.., not both; got 32 and \(32, 4\)"),
        (
            lambda: jpfq.formats.fp8(block=(32, 4), finish=jpfq.finish.CosineDescend()),
            r"PerBlock.* for a block of them",
        ),
        (
            lambda: jpfq.Rule(
                ".*", bits=4, scale=jpfq.scale.MinError(jpfq.scale.AbsMax(per=jpfq.scale.PerBlock(4, 4)))
            ),
            r"MinError.* moves the step of each neuron.*take scale=jpfq.scale.AbsMax",
        ),
    ],
)
def test_blocks_are_refused_where_steps_move(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.slow
def test_blocks_of_steps_follow_the_axes_of_a_kernel():
    """A kernel of heads (in, heads, dim): blocks of 8 neurons are pairs of heads of 4."""
    key = jax.random.key(0)
    params = {"kernel": jax.random.normal(key, (16, 6, 4))}
    X = jax.random.normal(key, (64, 16))
    rule = jpfq.Rule(".*", grid=jpfq.E4M3(), scale=jpfq.scale.AbsMax(per=jpfq.scale.PerBlock(8, 8)))
    found = jpfq.quantize(lambda params, x: jnp.einsum("bi,ihd->bhd", x, params["kernel"]), [X], rule, params=params)
    tensor = found.tensors["kernel"]
    assert tensor.step.shape == (2, 3, 1)
    largest = jnp.abs(params["kernel"]).reshape(2, 8, 3, 8).max((1, 3))
    np.testing.assert_allclose(tensor.step[..., 0], largest / 448, rtol=1e-6)


@pytest.mark.parametrize("group", [None, pytest.param(32, marks=pytest.mark.slow)])
def test_codebooks_are_fitted_to_each_kernel(layer, group):
    """They err less than as many uniform levels, and each kernel has its own."""
    params, (X,) = layer
    heavy = {"first": params["kernel"] ** 3 / 4, "second": jax.random.normal(jax.random.key(0), (OUT, 5))}
    model = lambda params, x: jnp.tanh(x @ params["first"]) @ params["second"]
    rules = jpfq.formats.codebook(8, model, X, params=heavy, group=group)
    assert [rule.pattern for rule in rules] == ["first", "second"]
    found = jpfq.quantize(model, [X], rules, params=heavy)
    uniform = jpfq.quantize(
        model, [X], jpfq.formats.int4(group, grid=jpfq.Integer(3), unsupported="skip"), params=heavy
    )
    assert found.tensors["first"].grid.levels == 8
    assert float(found.info["first"].relative_error) < 0.9 * float(uniform.info["first"].relative_error)
    if group is None:
        assert found.tensors["second"].grid != found.tensors["first"].grid
    else:
        assert "does not divide its 8 inputs" in found.skipped["second"]
    with pytest.raises(ValueError, match="'third' matches none of the kernels"):
        jpfq.formats.codebook(8, model, X, params=heavy, pattern="third")
    blank = heavy | {"second": jnp.zeros((OUT, 5))}  # as last layers are before training
    with pytest.raises(ValueError, match=r"second: Levels.fit .* there are 1 different numbers.*pattern="):
        jpfq.formats.codebook(8, model, X, params=blank, group=group)


def test_two_ranges_are_chosen_for_each_kernel(layer):
    """A kernel with a few large weights gets a coarse range, and errs less than with one range; another does not."""
    params, (X,) = layer
    first = params["kernel"].at[::16].mul(8.0)
    own = {"first": first, "second": jnp.linspace(-1, 1, OUT * 5).reshape(OUT, 5)}
    model = lambda params, x: jnp.tanh(x @ params["first"]) @ params["second"]
    plain = {"plain": True, "method": jpfq.MSQ(), "scale": jpfq.scale.MinMSE()}
    rules = jpfq.formats.two_ranges(4, model, X, params=own, **plain)
    assert [rule.pattern for rule in rules] == ["first", "second"]
    two = jpfq.quantize(model, [X], rules, params=own)
    one = jpfq.quantize(model, [X], jpfq.Rule(".*", bits=4, **plain), params=own)
    assert two.tensors["first"].grid.fine < 7
    assert two.tensors["second"].grid.values == tuple(range(-8, 8))
    assert two.tensors["first"].bits_per_weight == one.tensors["first"].bits_per_weight
    assert float(two.info["first"].relative_error) < 0.9 * float(one.info["first"].relative_error)
    with pytest.raises(ValueError, match="'third' matches none of the kernels"):
        jpfq.formats.two_ranges(4, model, X, params=own, pattern="third")

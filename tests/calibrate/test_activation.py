"""Quantized activations: the network that runs is the one calibrated, and weights correct for the rounding of inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jpfq
from jpfq import ranges
from tests.network import zoo

CASES = {name: zoo.CASES[name] for name in ("lm", "experts")}


def relative(exact, quantized):
    square = lambda pairs: sum(float(jnp.sum(x.astype(jnp.float32) ** 2)) for x in pairs)
    return np.sqrt(square([a - b for a, b in zip(exact, quantized)]) / square(exact))


def outputs(case, quantized):
    given = case.model if case.variables is None else case.variables
    return [case(given, b) for b in case.batches], [quantized.apply(b) for b in case.batches]


@pytest.mark.parametrize("name", [pytest.param("lm", marks=pytest.mark.slow), "experts"])
def test_apply_runs_what_was_calibrated(name):
    case = CASES[name]()
    quantized = jpfq.quantize(case.model, case.batches, zoo.plain(bits=6, activation_bits=6), **case.given)
    assert set(quantized.inputs) == set(quantized.tensors)
    error = relative(*outputs(case, quantized))
    assert quantized.output_error == pytest.approx(error, rel=2e-2)  # one rounded input at a tie is 1 % of it
    assert 0 < error < 0.5


@pytest.mark.slow
def test_without_activations_apply_is_the_model():
    case = zoo.lm()
    quantized = jpfq.quantize(case.model, case.batches, zoo.plain(bits=4), **case.given)
    assert not quantized.inputs
    longer = jnp.zeros((5, 7), int)  # another shape than that calibrated on
    np.testing.assert_allclose(
        quantized.apply(longer), case.model.apply(quantized.variables, longer), rtol=1e-5, atol=1e-6
    )
    inside = jax.jit(lambda tokens: quantized.apply(tokens))
    np.testing.assert_allclose(inside(longer), quantized.apply(longer), rtol=1e-5, atol=1e-6)


class Two(nn.Module):
    """Two layers, so that everything can be said by hand."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16, use_bias=False)(x))
        return nn.Dense(6, use_bias=False)(x)


def two(rows=64):
    model, batches = Two(), zoo.batches(rows, 12)
    return model, batches, zoo.initial(model, batches[0])


def rounded(x, step, zero, lo, hi):
    return step * (np.clip(np.floor(x / step + zero + 0.5), lo, hi) - zero)


@pytest.mark.slow
def test_a_static_step_by_hand():
    model, batches, variables = two()
    rule = zoo.plain(bits=8, activations=jpfq.Activations(jpfq.Asymmetric(5), ranges.Max()))
    quantized = jpfq.quantize(model, batches, rule, variables=variables)
    kernels = [np.asarray(quantized.params[f"Dense_{i}"]["kernel"]) for i in (0, 1)]
    x = [np.asarray(b) for b in batches]

    def at_levels(x):
        low, high = min(a.min() for a in x), max(a.max() for a in x)
        step = (high - low) / 31
        return [rounded(a, step, np.floor(-low / step + 0.5), 0, 31) for a in x], step

    first, step = at_levels(x)
    hidden = [np.maximum(a @ kernels[0], 0) for a in first]
    second, hidden_step = at_levels(hidden)
    steps = [float(quantized.inputs[f"Dense_{i}/kernel"][0].levels.step[0]) for i in (0, 1)]
    np.testing.assert_allclose(steps, [step, hidden_step], rtol=1e-5)
    assert float(quantized.inputs["Dense_1/kernel"][0].levels.zero[0]) == 0  # unsigned behind ReLU
    for batch, a in zip(batches, second):
        error = np.abs(quantized.apply(batch) - a @ kernels[1])
        assert np.median(error) < 1e-5
        assert error.max() <= hidden_step * np.abs(kernels[1]).max() + 1e-5  # a tie moves one input by one level


@pytest.mark.slow
def test_a_step_per_row_follows_each_row():
    model, batches, variables = two()
    rule = zoo.plain(bits=8, activations=jpfq.Activations(jpfq.Integer(4), per="row"))
    quantized = jpfq.quantize(model, batches, rule, variables=variables)
    kernels = [np.asarray(quantized.params[f"Dense_{i}"]["kernel"]) for i in (0, 1)]
    by_row = lambda x: rounded(x, np.abs(x).max(1, keepdims=True) / 7, 0, -8, 7)
    x = np.asarray(batches[0]) * 10.0 ** np.arange(64)[:, None].clip(0, 9)  # rows of very different size
    expected = by_row(np.maximum(by_row(x) @ kernels[0], 0)) @ kernels[1]
    error = np.abs(quantized.apply(jnp.asarray(x)) - expected).max(1) / np.abs(expected).max(1)
    assert np.median(error) < 1e-5
    assert error.max() < 0.2  # a tie moves one entry by one level


@pytest.mark.slow
@pytest.mark.parametrize("method", [jpfq.GPFQ(), jpfq.Qronos()], ids=str)
def test_weights_correct_for_rounded_inputs(method):
    """Against weights that were solved as if inputs stayed exact, in the same network with rounded inputs."""
    model, batches, variables = two(256)
    mix = zoo.normal(9, 3, 12)  # few directions carry the inputs, so that one makes good what another lost
    batches = [b[:, :3] @ mix + 0.1 * b for b in batches]
    rule = lambda **settings: zoo.plain(grid=jpfq.Integer(6), method=method, **settings)
    activations = jpfq.Activations(jpfq.Integer(3))
    aware = jpfq.quantize(model, batches, rule(activations=activations), variables=variables)
    unaware = jpfq.quantize(model, batches, rule(), variables=variables)
    exact = [model.apply(variables, b) for b in batches]
    run = lambda leaves: [aware._run(leaves, aware.inputs, b) for b in batches]
    assert relative(exact, run(aware._functional.leaves)) < 0.97 * relative(exact, run(unaware._functional.leaves))


@pytest.mark.slow
def test_steps_per_channel_fold_into_a_depthwise_convolution_only():
    class Depthwise(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Conv(4, (3,), feature_group_count=4, use_bias=False)(x)

    batch = zoo.normal(0, 8, 10, 4) * jnp.array([1.0, 10.0, 100.0, 1e3])
    model = Depthwise()
    variables = zoo.initial(model, batch)
    settle = lambda per: zoo.plain(bits=8, activations=jpfq.Activations(jpfq.Integer(8), ranges.Max(), per=per))
    quantized = jpfq.quantize(model, [batch], settle("channel"), variables=variables)
    steps = quantized.inputs["Conv_0/kernel"][0].levels.step
    np.testing.assert_allclose(steps, jnp.abs(batch).max((0, 1)) / 127, rtol=1e-6)
    levels = batch / steps
    np.testing.assert_allclose(
        model.apply(quantized.variables, jnp.round(levels) * steps), quantized.apply(batch), rtol=1e-4, atol=1e-3
    )
    by_channel = lambda q: jnp.abs(q.apply(batch) - model.apply(variables, batch)).max((0, 1))
    together = jpfq.quantize(model, [batch], settle("tensor"), variables=variables)
    assert by_channel(quantized)[0] < 0.1 * by_channel(together)[0]
    dense, batches, given = two()
    with pytest.raises(ValueError, match="Dense_0/kernel sums over all channels of its input"):
        jpfq.quantize(dense, batches, settle("channel"), variables=given)


@pytest.mark.slow
def test_padding_does_not_widen_the_range():
    model, batches, variables = two()
    mask = jnp.arange(64) < 50
    spoiled = [jnp.where(mask[:, None], b, 1e4) for b in batches]
    rule = zoo.plain(bits=8, activation_bits=8)
    masked = jpfq.quantize(model, [jpfq.Weighted(b, mask) for b in spoiled], rule, variables=variables)
    alone = jpfq.quantize(model, [b[:50] for b in batches], rule, variables=variables)
    for path, (rounding,) in alone.inputs.items():
        np.testing.assert_allclose(masked.inputs[path][0].levels.step, rounding.levels.step, rtol=1e-5)
        assert (masked.tensors[path].codes == alone.tensors[path].codes).mean() > 0.99


@pytest.mark.slow
def test_rules_choose_activations_layer_by_layer():
    case = zoo.lm()
    rules = [
        zoo.plain(".*query/kernel", bits=8, activation_bits=4),
        zoo.plain(".*(key|value)/kernel", bits=8, activation_bits=8),
        zoo.plain(bits=8),
    ]
    quantized = jpfq.quantize(case.model, case.batches, rules, **case.given)
    attention = "block_0/MultiHeadDotProductAttention_0"
    query, key, value = (quantized.inputs[f"{attention}/{name}/kernel"][0] for name in ("query", "key", "value"))
    assert (query.levels.hi, key.levels.hi) == (15, 255)  # they read the same input
    assert key is value
    assert f"{attention}/out/kernel" not in quantized.inputs
    assert quantized.output_error == pytest.approx(relative(*outputs(case, quantized)), rel=2e-2)
    assert "Inputs of 6 kernels are quantized" in quantized.summary()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jpfq.Rule(".*", bits=4, activation_bits=8, activations=jpfq.Activations()), "not both"),
        (lambda: jpfq.Rule(".*", bits=4, activation_bits=0), "from 1 to 16"),
        (lambda: jpfq.Rule(".*", skip=True, activation_bits=8), r"\['activation_bits'\] mean nothing"),
        (lambda: jpfq.Rule(".*", bits=4, activations=8), r"activations takes a setting such as jpfq.Activations\(\)"),
        (lambda: jpfq.Activations(per="column"), "'tensor', 'channel', 'row' or 'group'"),
        (lambda: jpfq.Activations(range=ranges.KL(), per="row"), r"its own Max\(\); got KL"),
        (lambda: jpfq.Activations(8), "takes a Grid"),
    ],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def perceptron(kind):
    """The same two layers as a function, of Linen or of NNX: model, what goes with it, and the paths of its kernels."""
    params = {"a": zoo.normal(20, 12, 16) / 3, "b": zoo.normal(21, 16, 6) / 4}
    if kind == "function":
        return lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], {"params": params}, ("a", "b")
    if kind == "linen":
        layers = (nn.Dense(16, use_bias=False), jnp.tanh, nn.Dense(6, use_bias=False))
        kernels = {"layers_0": {"kernel": params["a"]}, "layers_2": {"kernel": params["b"]}}
        return nn.Sequential(layers), {"variables": {"params": kernels}}, ("layers_0/kernel", "layers_2/kernel")
    linear = lambda *dims: nnx.Linear(*dims, use_bias=False, rngs=nnx.Rngs(0))
    model = nnx.Sequential(linear(12, 16), jnp.tanh, linear(16, 6))
    for layer, kernel in ((model.layers[0], params["a"]), (model.layers[2], params["b"])):
        layer.kernel = nnx.Param(kernel)
    return model, {}, ("layers/0/kernel", "layers/2/kernel")


def straight_through(x, kernels, grids):
    """Outputs and their Jacobian (sample, out, in) in float64: roundings pass derivatives on, but beyond their grid."""
    x, passed = np.asarray(x, np.float64), []
    for number, (kernel, grid) in enumerate(zip(kernels, grids)):
        x = np.tanh(x) if number else x
        slope = 1 - x**2 if number else np.ones_like(x)
        step, zero = grid(x)
        position = x / step + zero
        passed.append(slope * ((position >= -0.5) & (position <= 15.5)))
        x = step * (np.clip(np.floor(position + 0.5), 0, 15) - zero) @ np.asarray(kernel, np.float64)
    a, b = (np.asarray(kernel, np.float64) for kernel in kernels)
    return x, np.einsum("si,ij,sj,jo->soi", passed[0], a, passed[1], b), passed


def by_row(x):
    """The step and zero point of each row, as wide as it is."""
    low, high = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
    step = (high - low) / 15
    return step, np.floor(-low / step + 0.5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "per"), [("function", "tensor"), ("function", "row"), ("linen", "tensor"), ("nnx", "row")]
)
def test_derivatives_pass_straight_through_rounded_inputs(kind, per):
    model, given, paths = perceptron(kind)
    narrow = ranges.Percentile(0.9) if per == "tensor" else None  # so that some inputs lie beyond the grid
    activations = jpfq.Activations(jpfq.Asymmetric(4), narrow, per=per)
    batches = zoo.batches(32, 12, count=1)
    quantized = jpfq.quantize(model, batches, zoo.plain(bits=6, activations=activations), **given)
    kernels = [quantized.tensors[path].dequantize() for path in paths]
    laid = lambda path: [float(getattr(quantized.inputs[path][0].levels, name)[0]) for name in ("step", "zero")]
    grids = [by_row if per == "row" else (lambda x, path=path: laid(path)) for path in paths]
    x = batches[0][:8]
    outputs, expected, passed = straight_through(x, kernels, grids)
    np.testing.assert_allclose(quantized.apply(x), outputs, rtol=1e-4, atol=1e-5)
    assert (per == "row") == all(np.all(part > 0) for part in passed)  # with steps per row nothing is beyond the grid
    along, against = zoo.normal(30, 8, 12), zoo.normal(31, 8, 6)
    _, forwards = jax.jvp(quantized.apply, (x,), (along,))
    np.testing.assert_allclose(forwards, np.einsum("soi,si->so", expected, along), rtol=1e-4, atol=1e-4)
    backwards = jax.jit(lambda x: jax.vjp(quantized.apply, x)[1](against)[0])(x)
    np.testing.assert_allclose(backwards, np.einsum("soi,so->si", expected, against), rtol=1e-4, atol=1e-4)
    rows = jax.vmap(jax.jacobian(lambda row: quantized.apply(row[None])[0]))(x)
    np.testing.assert_allclose(rows, expected, rtol=1e-4, atol=1e-4)

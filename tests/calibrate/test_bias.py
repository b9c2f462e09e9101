"""Bias correction: no mean error is left, the calibration error never grows; folded BatchNorms change nothing."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jpfq
from tests.network import zoo


class Net(nn.Module):
    """A convolution with BatchNorm and one with a bias, then a Dense layer."""

    scale: bool = True

    @nn.compact
    def __call__(self, x):
        norm = partial(nn.BatchNorm, use_running_average=True, use_scale=self.scale)
        x = nn.relu(norm()(nn.Conv(6, (3, 3), use_bias=False)(x)))
        x = nn.relu(norm()(nn.Conv(8, (3, 3), strides=2)(x)))
        return nn.Dense(5)(x.mean((1, 2)))


def net(scale=True):
    model, batches = Net(scale), [b + 0.5 for b in zoo.batches(16, 8, 8, 3)]
    rng = np.random.default_rng(3)
    draw = lambda x: jnp.asarray(rng.uniform(0.5, 1.5, x.shape), x.dtype)  # positive: variances are among them
    variables = zoo.initial(model, batches[0])
    variables = jax.tree.map(lambda x: draw(x) if x.ndim == 1 else x, variables)
    return model, batches, variables


def layer_outputs(model, variables, batches):
    """Output of each layer with what follows it affinely, of all rows (layer -> (rows, neurons))."""
    found = {}
    for batch in batches:
        for name, value in captured(model, variables, batch).items():
            x = np.asarray(value["__call__"][0])
            found.setdefault(name, []).append(x.reshape(-1, x.shape[-1]))
    return {name: np.concatenate(parts) for name, parts in found.items()}


@partial(jax.jit, static_argnums=0)
def captured(model, variables, batch):
    kinds = lambda module, _: isinstance(module, (nn.BatchNorm, nn.Dense))
    _, state = model.apply(variables, batch, capture_intermediates=kinds, mutable="intermediates")
    return state["intermediates"]


@pytest.mark.slow
@pytest.mark.parametrize("method", [jpfq.MSQ(), jpfq.Qronos()], ids=str)
def test_no_mean_error_is_left(method):
    """At every layer, in the network that comes back: behind BatchNorm, a bias before BatchNorm, and a plain bias."""
    model, batches, variables = net()
    rule = lambda correct: zoo.plain(bits=3, method=method, correct_bias=correct)
    exact = layer_outputs(model, variables, batches)
    mean_error = {}
    for correct in (False, True):
        quantized = jpfq.quantize(model, batches, rule(correct), variables=variables)
        made = layer_outputs(model, quantized.variables, batches)
        mean_error[correct] = {k: np.abs((made[k] - exact[k]).mean(0)).max() for k in exact}
    assert quantized.biases == ("BatchNorm_0/bias", "Conv_1/bias", "Dense_0/bias")
    for name, error in mean_error[True].items():
        assert error < 2e-5 < 1e-2 < mean_error[False][name]


@pytest.mark.slow
@pytest.mark.parametrize("method", [jpfq.MSQ(), jpfq.GPFQ(), jpfq.OPTQ(), jpfq.Qronos()], ids=str)
def test_the_calibration_error_never_grows(method):
    """One layer, so that both see the same data; and figures agree with the outputs."""
    model, batches = nn.Dense(7), [b + jnp.arange(12) / 4 for b in zoo.batches(50, 12)]
    variables = zoo.initial(model, batches[0])
    for bits in (2, 3, 4):
        plain, corrected = (
            jpfq.quantize(
                model, batches, zoo.plain(bits=bits, method=method, correct_bias=correct), variables=variables
            )
            for correct in (False, True)
        )
        change = lambda q, name: np.float64(q.params[name]) - np.float64(variables["params"][name])
        error = lambda q: sum(np.sum((np.float64(b) @ change(q, "kernel") + change(q, "bias")) ** 2) for b in batches)
        assert error(corrected) <= error(plain) * (1 + 1e-5)
        assert float(corrected.info["kernel"].square_error) == pytest.approx(error(corrected), rel=1e-3)
        energy = sum(np.sum((np.float64(b) @ np.float64(variables["params"]["kernel"])) ** 2) for b in batches)
        assert float(corrected.info["kernel"].energy) == pytest.approx(energy, rel=1e-4)


def test_the_same_codes_as_with_a_column_of_ones_that_is_not_rounded():
    """Bias correction is the last coordinate of the recursion: GPFQ in float64 by its published loop, on centred inputs."""
    rng = np.random.default_rng(0)
    X, W = rng.standard_normal((40, 6)) + 1.0, rng.standard_normal((6, 3))
    Z = X - X.mean(0)
    step = np.abs(W).max(0) / 3
    q, u = np.zeros_like(W), np.zeros((40, 3))
    for t in range(6):
        u += np.outer(Z[:, t], W[t])
        q[t] = step * np.clip(np.floor(Z[:, t] @ u / (Z[:, t] @ Z[:, t]) / step + 0.5), -3, 3)
        u -= np.outer(Z[:, t], q[t])
    model = nn.Dense(3)
    params = {"kernel": jnp.asarray(W), "bias": jnp.zeros(3)}
    rule = zoo.plain(grid=jpfq.Integer(3, narrow=True), scale=jpfq.scale.AbsMax(), correct_bias=True, form="gram")
    quantized = jpfq.quantize(model, [jnp.asarray(X)], rule, variables={"params": params})
    np.testing.assert_allclose(quantized.params["kernel"], q, atol=1e-5)
    np.testing.assert_allclose(quantized.params["bias"], X.mean(0) @ (W - q), atol=1e-5)


@pytest.mark.slow
def test_rows_and_gram_agree(x64):
    """Exactly, behind a convolution and a dense layer, with weights of rows and without."""

    def fn(params, x):
        x = jax.nn.relu(zoo.convolve(x, params["conv"], (2, 2)) + params["conv_bias"])
        return x.mean((1, 2)) @ params["dense"] + params["dense_bias"]

    shapes = {"conv": (3, 3, 3, 8), "conv_bias": (8,), "dense": (8, 5), "dense_bias": (5,)}
    params = {name: zoo.normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}
    batches = [b + 0.5 for b in zoo.batches(16, 8, 8, 3)]
    for weights in (None, np.arange(16) % 2):
        data = batches if weights is None else [jpfq.Weighted(b, weights) for b in batches]
        rows, gram = (
            jpfq.quantize(fn, data, zoo.plain(bits=4, correct_bias=True, form=form), params=params)
            for form in ("data", "gram")
        )
        assert rows.biases == gram.biases == ("conv_bias", "dense_bias")
        for path in rows.tensors:
            np.testing.assert_array_equal(rows.tensors[path].codes, gram.tensors[path].codes)
        for name in params:
            np.testing.assert_allclose(rows.params[name], gram.params[name], rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mlp", "stack", "experts"])
def test_every_kind_of_model(name):
    """The network inside is the one that comes back, and biases that do not follow a kernel are as they were."""
    case = zoo.mlp(jnp.float32) if name == "mlp" else zoo.CASES[name]()
    quantized = jpfq.quantize(case.model, case.batches, zoo.plain(bits=6, correct_bias=True), **case.given)
    given, back = (case.model, quantized.model) if case.variables is None else (case.variables, quantized.variables)
    exact, made = ([case(m, b) for b in case.batches] for m in (given, back))
    square = lambda xs: sum(float(jnp.sum(x**2)) for x in xs)
    error = np.sqrt(square([a - b for a, b in zip(exact, made)]) / square(exact))
    assert quantized.output_error == pytest.approx(error, rel=1e-3)
    expected = {"mlp": 3, "stack": 1, "experts": 0}
    assert len(quantized.biases) == expected[name]


@pytest.mark.slow
def test_layers_of_a_stack_have_biases_and_ranges_of_their_own():
    case = zoo.scanned()
    rule = zoo.plain(bits=8, activation_bits=8, correct_bias=True)
    stacked = jpfq.quantize(case.model, case.batches, rule, **case.given)
    layers = case.variables["params"]["layers"]
    params = {f"layer_{i}": jax.tree.map(lambda x, i=i: x[i], layers) for i in range(4)}
    params["head"] = case.variables["params"]["head"]
    alone = jpfq.quantize(zoo.Unrolled(), case.batches, rule, variables={"params": params})
    for i in range(4):
        for layer in ("Dense_0", "Dense_1"):
            np.testing.assert_allclose(
                stacked.params["layers"][layer]["bias"][i], alone.params[f"layer_{i}"][layer]["bias"], atol=1e-5
            )
            own, other = stacked.inputs[f"layers/{layer}/kernel"][i], alone.inputs[f"layer_{i}/{layer}/kernel"][0]
            np.testing.assert_allclose(own.levels.step, other.levels.step, rtol=1e-5)
    steps = [float(rounding.levels.step[0]) for rounding in stacked.inputs["layers/Dense_0/kernel"]]
    assert len(set(steps)) == 4


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_folded_batchnorms_change_no_output(framework):
    if framework == "linen":
        model, batches, variables = net()
        folded = jpfq.fold_batchnorm(model, batches[0], variables=variables)
        before, after = (model.apply(v, batches[1]) for v in (variables, folded))
        stats, params = folded["batch_stats"], folded["params"]
        factors = [params[n]["scale"] / jnp.sqrt(stats[n]["var"] + 1e-5) for n in ("BatchNorm_0", "BatchNorm_1")]
        untouched = [folded["params"]["Dense_0"]["kernel"], variables["params"]["Dense_0"]["kernel"]]
    else:

        class Model(nnx.Module):
            def __init__(self, rngs):
                self.first, self.norm = nnx.Linear(6, 5, rngs=rngs), nnx.BatchNorm(5, rngs=rngs)
                self.last = nnx.Linear(5, 2, rngs=rngs)

            def __call__(self, x):
                return self.last(nnx.relu(self.norm(self.first(x))))

        model, batch = Model(nnx.Rngs(0)), zoo.normal(0, 9, 6)
        model.norm.mean[...], model.norm.var[...] = zoo.normal(1, 5), jnp.arange(5) + 0.5
        model.norm.scale[...] = jnp.array([1.0, -2.0, 0.0, 3.0, 0.5])  # a neuron that is switched off, too
        model.eval()
        folded = jpfq.fold_batchnorm(model, batch)
        before, after = model(batch), folded(batch)
        factors = [(folded.norm.scale / jnp.sqrt(folded.norm.var + 1e-5))[jnp.array([0, 1, 3, 4])]]
        untouched = [folded.last.kernel[...], model.last.kernel[...]]
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)
    for factor in factors:
        np.testing.assert_allclose(factor, jnp.ones_like(factor), rtol=1e-5)
    np.testing.assert_array_equal(*untouched)


def test_nothing_to_fold_is_said():
    model, batches, variables = net(scale=False)
    with pytest.raises(ValueError, match="There is no BatchNorm to fold"):
        jpfq.fold_batchnorm(model, batches[0], variables=variables)


@pytest.mark.slow
def test_a_shared_bias_is_left():
    def fn(params, x):
        for name in ("a", "b"):
            x = jnp.tanh(x @ params[name] + params["bias"])
        return x

    params = {"a": zoo.normal(0, 6, 6), "b": zoo.normal(1, 6, 6), "bias": zoo.normal(2, 6)}
    quantized = jpfq.quantize(fn, [zoo.normal(3, 30, 6)], zoo.plain(bits=4, correct_bias=True), params=params)
    assert quantized.biases == ()
    np.testing.assert_array_equal(quantized.params["bias"], params["bias"])

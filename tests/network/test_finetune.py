"""Training code: parameters on their grids, derivatives through them, and the way back to codes and steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import jpfq
from tests.helpers import assert_close
from tests.network import zoo

X = zoo.normal(0, 48, 16)
PARAMS = {
    "turned": zoo.normal(1, 16, 16),
    "grouped": zoo.normal(2, 16, 16),
    "stacked": zoo.normal(3, 3, 16, 8),
    "bias": jnp.ones(8),
}


def fn(params, x):
    x = jnp.tanh(jnp.tanh(x @ params["turned"]) @ params["grouped"])
    return jnp.einsum("bi,eio->beo", x, params["stacked"]) + params["bias"]


@functools.cache
def quantized():
    """A rotation, groups with fitted zeros, and a stack of kernels."""
    groups = {"grid": jpfq.Asymmetric(3), "scale": jpfq.scale.AbsMax(per=jpfq.scale.PerGroup(4))}
    rules = [
        zoo.plain("turned", bits=4, scale=jpfq.scale.AbsMax(), rotation=jpfq.Hadamard(1)),
        zoo.plain("grouped", **groups),
        zoo.plain("stacked", grid=jpfq.Ternary()),
    ]
    return jpfq.quantize(fn, [X], rules, params=PARAMS)


def assert_same(one, two):
    """Trees of the same arrays."""
    jax.tree.map(np.testing.assert_array_equal, one, two)


@pytest.mark.slow
def test_both_ways_start_at_the_quantized_network():
    """With codes fixed exactly; straight through the rounding of what is at levels already, exactly too."""
    q = quantized()
    assert_same(jpfq.fake_quant(q.tunable, q), q.params)
    found = jpfq.fake_quant(q.params, q)
    assert_same({**found, "turned": 0}, {**q.params, "turned": 0})
    assert_close(found["turned"], q.params["turned"])  # rotated and unrotated once more
    shapes = jax.tree.map(jnp.shape, q.tunable)
    assert shapes["grouped"] == jpfq.Steps((4, 16))
    assert shapes["bias"] == (8,)


@pytest.mark.slow
def test_tensors_may_be_arguments_of_a_compiled_function():
    q = quantized()
    found = jax.jit(jpfq.fake_quant)(q.tunable, q.tensors)
    jax.tree.map(assert_close, found, dict(q.params))


@pytest.mark.slow
def test_derivatives_reach_the_steps():
    """Of <D, kernel>, by multiples of a step: the sum of D (kernel) over the weights that the step serves."""
    q = quantized()
    D = jax.tree.map(lambda x: zoo.normal(9, *x.shape), q.params)
    inner = lambda params: sum(jnp.vdot(D[k], v) for k, v in jpfq.fake_quant(params, q).items())
    found = jax.grad(inner)(q.tunable)
    by_group = (D["grouped"] * q.params["grouped"]).reshape(4, 4, 16).sum(1)
    assert_close(found["grouped"].multiple, by_group)
    assert_close(found["stacked"].multiple, (D["stacked"] * q.params["stacked"]).sum(1, keepdims=True))
    whole = (D["turned"] * q.params["turned"]).sum()  # each step serves a rotated kernel; all together, the kernel
    steps = found["turned"].multiple
    assert steps.shape == (1, 16)
    assert_close(steps, (D["turned"] * q.params["turned"]).sum(0, keepdims=True))
    assert_close(steps.sum(), whole)
    assert_same(found["bias"], D["bias"])


def test_derivatives_pass_straight_through_but_beyond_the_grid():
    q = quantized()
    params = dict(q.params) | {"stacked": PARAMS["stacked"]}
    D = jax.tree.map(lambda x: zoo.normal(9, *x.shape), q.params)
    inner = lambda params: sum(jnp.vdot(D[k], v) for k, v in jpfq.fake_quant(params, q).items())
    found = jax.grad(inner)(params)
    inside = np.abs(PARAMS["stacked"] / q.tensors["stacked"].step) < 1.5
    assert 0 < inside.mean() < 1
    assert_close(found["stacked"], jnp.where(inside, D["stacked"], 0))
    for name in ("turned", "grouped"):
        assert_close(found[name], D[name])


def test_float_weights_are_rounded_to_the_nearest_level():
    q = quantized()
    found = jpfq.fake_quant(PARAMS, q)
    step = q.tensors["stacked"].step
    assert_close(found["stacked"], step * jnp.clip(jnp.floor(PARAMS["stacked"] / step + 0.5), -1, 1))
    turn = lambda W: q.tensors["turned"].rotated[0].rotate(W)
    step = q.tensors["turned"].step
    assert_close(turn(found["turned"]), step * jnp.clip(jnp.floor(turn(PARAMS["turned"]) / step + 0.5), -8, 7))


def test_what_was_trained_is_what_comes_back():
    q = quantized()
    moved = jax.tree.map(lambda x: x + 0.1 * zoo.normal(4, *x.shape), q.tunable)
    back = q.tuned(moved)
    assert_same(back.params, jpfq.fake_quant(moved, q))
    for path, tensor in back.tensors.items():
        assert_same(tensor.codes, q.tensors[path].codes)
        assert_same(tensor.step, q.tensors[path].step * moved[path].multiple)
        assert_same(tensor.dequantize(), back.params[path])
    assert_close(back.apply(X), fn(back.params, X))
    assert np.isnan(back.output_error)
    assert "Relative error of the outputs: unknown since training." in back.summary()
    assert back.nbytes == q.nbytes
    assert_same(q.tuned(q.tunable).params, q.params)


def test_trained_kernels_go_to_codes():
    """Half of them by arrays, half by steps."""
    q = quantized()
    back = q.tuned(PARAMS | {"turned": q.tunable["turned"]})
    assert_same(back.tensors["turned"].codes, q.tensors["turned"].codes)
    codes = back.tensors["stacked"].codes
    assert codes.dtype == np.int8
    assert (codes != q.tensors["stacked"].codes).mean() > 0.01
    assert_same(back.params["stacked"], back.tensors["stacked"].dequantize())


class Linen(nn.Module):
    """With BatchNorm, whose statistics are no parameters."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(nn.BatchNorm(use_running_average=True)(nn.Dense(8)(x)))


def linen():
    return zoo.Case(Linen(), zoo.initial(Linen(), X), [X], set())


@pytest.mark.slow
@pytest.mark.parametrize("case", [linen, zoo.mlp])
def test_both_frameworks(case):
    """Types and structure stay; the model runs on what comes back."""
    model = case()
    q = jpfq.quantize(model.model, model.batches[:1], zoo.plain(bits=3, method=jpfq.MSQ()), **model.given)
    describe = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    tunable = q.tunable
    found = jpfq.fake_quant(tunable, q)
    assert describe(found) == describe(q.params)
    assert_same(found, q.params)
    back = q.tuned(jax.tree.map(lambda x: x * 2, tunable))
    assert_same(back.params, jax.tree.map(lambda x: x * 2, q.params))
    weights = back.model if model.variables is None else back.variables
    whole = nnx.state(weights) if model.variables is None else weights
    before = nnx.state(q.model) if model.variables is None else q.variables
    assert describe(whole) == describe(before)
    out = model(weights, model.batches[0])
    assert not np.array_equal(out, model(q.model if model.variables is None else q.variables, model.batches[0]))


def test_training_halves_the_error_and_keeps_the_codes():
    """Steps and biases of a ternary network, towards the float network's outputs on new inputs."""
    kernels, biases = [zoo.normal(i, 16, 16) / 3 for i in range(2)], [0.1 * zoo.normal(i + 2, 16) for i in range(2)]
    params = {"kernels": kernels, "biases": biases}

    def run(params, x):
        for W, b in zip(params["kernels"], params["biases"], strict=True):
            x = jnp.tanh(x @ W + b)
        return x

    train, test = zoo.normal(8, 256, 16) + 1, zoo.normal(9, 256, 16) + 1
    q = jpfq.quantize(
        run, [train], zoo.plain(grid=jpfq.Ternary(), method=jpfq.MSQ(), scale=jpfq.scale.AbsMax()), params=params
    )
    loss = lambda p: jnp.mean((run(jpfq.fake_quant(p, q), train) - run(params, train)) ** 2)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def trained(p):
        def step(state, _):
            change, memory = optimizer.update(jax.grad(loss)(state[0]), state[1])
            return (optax.apply_updates(state[0], change), memory), None

        return jax.lax.scan(step, (p, optimizer.init(p)), length=100)[0][0]

    back = q.tuned(trained(q.tunable))
    error = lambda p: float(jnp.mean((run(p, test) - run(params, test)) ** 2))
    assert error(back.params) < 0.5 * error(q.params)
    for path, tensor in q.tensors.items():
        assert_same(back.tensors[path].codes, tensor.codes)
        assert not np.array_equal(back.tensors[path].step, tensor.step)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda q: {"params": q.tunable}, "no leaf 'turned', which is quantized.*'params' alone.*params/bias"),
        (lambda q: q.tunable | {"bias": jpfq.Steps(jnp.ones(8))}, "bias is given as Steps, but was not quantized"),
        (
            lambda q: q.tunable | {"grouped": jpfq.Steps(jnp.ones(16))},
            r"takes multiples of its steps of shape \(4, 16\); got",
        ),
        (
            lambda q: q.params | {"grouped": jnp.ones((4, 16))},
            r"grouped takes weights of shape \(16, 16\); got \(4, 16\)",
        ),
    ],
    ids=["variables", "no kernel", "steps", "weights"],
)
def test_parameters_that_do_not_fit_are_refused(change, match):
    with pytest.raises(ValueError, match=match):
        jpfq.fake_quant(change(quantized()), quantized())
    with pytest.raises(ValueError, match=match):
        quantized().tuned(change(quantized()))


def test_parameters_of_another_model_are_refused():
    q = quantized()
    with pytest.raises(ValueError, match=r"differ from the model's in \['more'\]"):
        q.tuned(q.tunable | {"more": X})


def test_rounding_undoes_dequantizing():
    for tensor in quantized().tensors.values():
        assert_same(tensor.rounded(tensor.dequantize()).codes, tensor.codes)

"""One model written in two ways gets the same codes: exactly in float64, in float32 but for ties."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jpfq
from tests.network import zoo

SETTINGS = {"grid": jpfq.Symmetric(4), "scale": jpfq.scale.AbsMax(0.8)}


class Pair(NamedTuple):
    """Two models as `quantize` takes them, their batches, and which kernel of the one is which of the other."""

    one: tuple[Any, dict]
    two: tuple[Any, dict]
    batches: list
    kernels: list  # (path, index in it, path of the other model)


def scanned(dtype):
    """Layers stacked by nn.scan under remat, and layers one by one."""
    stacked = zoo.scanned()
    params = jax.tree.map(lambda p: p.astype(dtype), stacked.variables["params"])
    single = {f"layer_{i}": jax.tree.map(lambda p: p[i], params["layers"]) for i in range(4)}
    kernels = [
        (f"layers/{name}/kernel", i, f"layer_{i}/{name}/kernel") for name in ("Dense_0", "Dense_1") for i in range(4)
    ]
    return Pair(
        (stacked.model, {"variables": {"params": params}}),
        (zoo.Unrolled(), {"variables": {"params": single | {"head": params["head"]}}}),
        zoo.batches(32, 16),
        [*kernels, ("head/kernel", ..., "head/kernel")],
    )


def vmapped(dtype):
    """NNX layers made by nnx.vmap and run by nnx.scan, and a function that runs them one by one."""
    model = zoo.stack().model
    nnx.update(model, jax.tree.map(lambda p: p.astype(dtype), nnx.state(model, nnx.Param)))
    kernel, bias = model.layers.kernel[...], model.layers.bias[...]

    def fn(params, x):
        for i in range(3):
            x = nn.relu(x @ params[f"kernel_{i}"] + bias[i])
        return x

    params = {f"kernel_{i}": kernel[i] for i in range(3)}
    kernels = [("layers/kernel", i, f"kernel_{i}") for i in range(3)]
    return Pair((model, {}), (fn, {"params": params}), zoo.batches(32, 16), kernels)


def grouped(dtype):
    """A convolution in groups, with stride and dilation, and one convolution for each group."""
    convolve = lambda x, w, groups: zoo.convolve(x, w, (2, 1), groups, dilation=(1, 2))
    w = zoo.normal(3, 3, 2, 2, 12).astype(dtype)
    split = lambda x: jnp.split(x, 3, -1)
    fn = lambda params, x: jnp.concatenate([convolve(x, params[f"w{i}"], 1) for i, x in enumerate(split(x))], -1)
    return Pair(
        (lambda params, x: convolve(x, params["w"], 3), {"params": {"w": w}}),
        (fn, {"params": {f"w{i}": part for i, part in enumerate(split(w))}}),
        zoo.batches(5, 9, 8, 6),
        [("w", np.s_[..., 4 * i : 4 * i + 4], f"w{i}") for i in range(3)],
    )


def experts(dtype):
    """Products with a batch axis of experts, one feeding the next, and layers of their own."""
    up, down = zoo.normal(3, 4, 8, 8).astype(dtype), zoo.normal(4, 4, 8, 8).astype(dtype)

    def together(params, x):
        hidden = jnp.tanh(jnp.einsum("bd,edf->ebf", x, params["up"]))
        return jnp.einsum("ebf,efd->ebd", hidden, params["down"])

    def apart(params, x):
        return jnp.stack([jnp.tanh(x @ params[f"up{e}"]) @ params[f"down{e}"] for e in range(4)])

    params = {f"{name}{e}": w[e] for name, w in (("up", up), ("down", down)) for e in range(4)}
    kernels = [(name, e, f"{name}{e}") for name in ("up", "down") for e in range(4)]
    both = {"params": {"up": up, "down": down}}
    return Pair((together, both), (apart, {"params": params}), zoo.batches(32, 8), kernels)


def frameworks(dtype):
    """Linen and NNX: two layers, a convolution and BatchNorm."""

    class InLinen(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(8, (3, 3), name="conv", param_dtype=dtype)(x))
            x = nn.BatchNorm(use_running_average=True, name="norm", param_dtype=dtype)(x).mean((1, 2))
            x = nn.relu(nn.Dense(16, name="hidden", param_dtype=dtype)(x))
            return nn.Dense(5, name="head", param_dtype=dtype)(x)

    class InNNX(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 8, (3, 3), param_dtype=dtype, rngs=rngs)
            self.norm = nnx.BatchNorm(8, use_running_average=True, param_dtype=dtype, rngs=rngs)
            self.hidden = nnx.Linear(8, 16, param_dtype=dtype, rngs=rngs)
            self.head = nnx.Linear(16, 5, param_dtype=dtype, rngs=rngs)

        def __call__(self, x):
            x = self.norm(nnx.relu(self.conv(x))).mean((1, 2))
            return self.head(nnx.relu(self.hidden(x)))

    module, model, batches = InLinen(), InNNX(nnx.Rngs(0)), zoo.batches(16, 6, 6, 3)
    statistics = zoo.initial(module, batches[0])["batch_stats"]
    variables = {"params": nnx.to_pure_dict(nnx.state(model, nnx.Param)), "batch_stats": statistics}
    paths = ("conv/kernel", "hidden/kernel", "head/kernel")
    return Pair((module, {"variables": variables}), (model, {}), batches, [(path, ..., path) for path in paths])


PAIRS = [scanned, vmapped, grouped, experts, frameworks]


def differences(pair, rules):
    """Of all weights, how many have other codes or steps; and both results."""
    one, two = (jpfq.quantize(model, pair.batches, rules, **given) for model, given in (pair.one, pair.two))
    assert {path for path, _, _ in pair.kernels} == set(one.tensors)
    assert {path for _, _, path in pair.kernels} == set(two.tensors)
    wrong = total = 0
    for path, index, other in pair.kernels:
        a, b = one.tensors[path].codes[index], two.tensors[other].codes
        np.testing.assert_allclose(
            one.tensors[path].dequantize()[index][a == b],
            two.tensors[other].dequantize()[a == b],
            rtol=100 * np.finfo(one.tensors[path].step.dtype).eps,
        )
        wrong, total = wrong + int(np.sum(a != b)), total + b.size
    return wrong, total, one, two


@pytest.mark.parametrize("written", [pytest.param(f, marks=[pytest.mark.slow] * (f is not grouped)) for f in PAIRS])
def test_exactly_in_float64(written, x64):
    wrong, _, one, two = differences(written(jnp.float64), zoo.plain(**SETTINGS))
    assert not wrong
    assert one.output_error == pytest.approx(two.output_error, rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("written", [grouped, experts, frameworks])
def test_but_for_ties_in_float32(written):
    wrong, total, one, two = differences(written(jnp.float32), zoo.plain(**SETTINGS))
    assert wrong <= 0.003 * total
    assert one.output_error == pytest.approx(two.output_error, rel=1e-2)

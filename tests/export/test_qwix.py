"""qwix runs our results: its outputs are those of `apply`, for kernels it quantizes itself otherwise."""

import dataclasses
from importlib.util import find_spec

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpfq
from jpfq.calibrate.activation import ActivationQuantizer
from jpfq.matrix.layout import ConvLayout, DotLayout
from jpfq.matrix.signed import signed
from tests.network.saved import result, tensor
from tests.network.zoo import normal
from tests.storage.test_save import linear, rotation

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # qwix 0.1.8 calls what Flax gives up
needs_qwix = pytest.mark.skipif(find_spec("qwix") is None, reason="takes qwix: pip install 'jpfq[peers]'")
LEVELS = jpfq.scalar.ScaledGrid(*map(jnp.asarray, ([0.03], [0.0], -128.0, 127.0)))
SHIFTED = jpfq.scalar.ScaledGrid(*map(jnp.asarray, ([0.03], [90.0], 0.0, 255.0)))


def conv(shape):
    """As Flax calls it, 3x3 with padding."""
    return ConvLayout(shape, (1, 1), ((1, 1), (1, 1)), (1, 1), (1, 1), (0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2), 1)


def inputs():
    """Static, static with a zero point, and by row."""
    rows = jpfq.Activations(jpfq.Integer(8), per="row")
    return {
        "first": [ActivationQuantizer(jpfq.Activations(jpfq.Integer(8)), conv((3, 3, 3, 8)), LEVELS)],
        "second": [ActivationQuantizer(jpfq.Activations(), conv((3, 3, 8, 8)), SHIFTED)],
        "third": [ActivationQuantizer(rows, DotLayout((8, 4), (0,), (), (1,), (), False), None)],
    }


class LinenDense(nn.Module):
    """Two dense layers, one with outputs of two axes, and one that is not quantized."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(16, name="wide")(x))
        return nn.Dense(3, name="head")(nn.DenseGeneral((2, 4), name="heads")(x).reshape(len(x), -1))


class NNXDense(nnx.Module):
    def __init__(self, rngs):
        self.wide, self.head = nnx.Linear(256, 16, rngs=rngs), nnx.Linear(8, 3, rngs=rngs)
        self.rest = nnx.List([nnx.LinearGeneral(16, (2, 4), rngs=rngs)])

    def __call__(self, x):
        return self.head(self.rest[0](nnx.relu(self.wide(x))).reshape(len(x), -1))


class LinenConv(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), padding=1, name="first")(x))
        x = nn.Conv(8, (3, 3), padding=1, name="second")(x)
        return nn.Dense(4, name="third")(x.mean((1, 2)))


class NNXConv(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Conv(3, 8, (3, 3), padding=1, rngs=rngs)
        self.second = nnx.Conv(8, 8, (3, 3), padding=1, rngs=rngs)
        self.third = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        return self.third(self.second(nnx.relu(self.first(x))).mean((1, 2)))


def assert_qwix_agrees(quantized, x, model=None):
    expected = quantized.apply(x)
    if model is None:
        held = quantized.to_qwix(x)
        found = nnx.jit(lambda model, x: model(x))(held, x)
        held = nnx.state(held)
    else:
        module, held = quantized.to_qwix(x, model)
        found = jax.jit(module.apply)(held, x)
    integers = sum(leaf.size for leaf in jax.tree.leaves(held) if leaf.dtype in (jnp.int4, jnp.int8) and leaf.ndim > 1)
    assert integers >= sum(kernel.codes.size for kernel in quantized.tensors.values())
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * float(abs(expected).max()))


def dense(wide, heads):
    """Quantized in both frameworks."""
    x, module = normal(0, 5, 256), LinenDense()
    variables = module.init(jax.random.key(0), x)
    yield result(module, {"wide/kernel": wide, "heads/kernel": heads}, variables=variables), x, module
    yield result(NNXDense(nnx.Rngs(0)), {"wide/kernel": wide, "rest/0/kernel": heads}), x, None


@needs_qwix
@pytest.mark.parametrize(
    ("wide", "heads"),
    [
        (tensor((256, 16), (1, 16), jpfq.Integer(4)), tensor((16, 2, 4), (1, 2, 4), jpfq.Integer(8))),  # per channel
        (
            tensor((256, 16), (2, 16), jpfq.Integer(8)),
            tensor((16, 2, 4), (4, 2, 4), jpfq.Integer(4)),
        ),  # in groups of 128, 4
        (tensor((256, 16), (2, 16), jpfq.Asymmetric(4)), tensor((16, 2, 4), (1, 1, 1), jpfq.Equispaced(4))),
    ],
    ids=["channel", "group", "zero"],
)
def test_dense_layers(wide, heads):
    for quantized, x, module in dense(wide, heads):
        assert_qwix_agrees(quantized, x, module)


@needs_qwix
@pytest.mark.parametrize("bits", [4, 8])
def test_convolutions_with_quantized_inputs(bits):
    x = normal(0, 2, 6, 6, 3)
    shapes = {"first": (3, 3, 3, 8), "second": (3, 3, 8, 8), "third": (8, 4)}
    make = lambda shape: tensor(shape, (*(1,) * (len(shape) - 1), shape[-1]), jpfq.Integer(bits))
    tensors = {f"{name}/kernel": make(shape) for name, shape in shapes.items()}
    rounded = {f"{name}/kernel": uses for name, uses in inputs().items()}
    module = LinenConv()
    variables = module.init(jax.random.key(0), x)
    assert_qwix_agrees(result(module, tensors, variables=variables, inputs=rounded), x, module)
    assert_qwix_agrees(result(NNXConv(nnx.Rngs(0)), tensors, inputs=rounded), x)


GROUPS_OF_64 = jpfq.scale.AbsMax(per=jpfq.scale.PerGroup(64))
FLOATS = {  # rules -> qwix's name of the type, its storage, the runs of a step
    "mxfp4": (jpfq.formats.mxfp4(), "mxfp4", jnp.float4_e2m1fn, 32),
    "mxfp8": (jpfq.formats.mxfp8(), "mxfp8", jnp.float8_e4m3fn, 32),
    "nvfp4": (jpfq.formats.nvfp4(), "nvfp4", jnp.float4_e2m1fn, 16),
    "nf4": (jpfq.formats.nf4(group=32), "nf4", jnp.uint4, 32),
    "fp8": (jpfq.formats.fp8(), jnp.dtype(jnp.float8_e4m3fn), jnp.float8_e4m3fn, 256),
    "mxfp8, E5M2": (jpfq.formats.mxfp8(jpfq.E5M2()), jnp.dtype(jnp.float8_e5m2), jnp.float8_e5m2, 32),
    "groups of 64": (jpfq.Rule(".*", grid=jpfq.E2M1(), scale=GROUPS_OF_64), jnp.dtype(jnp.int8), jnp.int8, 64),
}


def held_by(path, quantized, x, model):
    """The kernel that qwix holds."""
    if model is None:
        found = quantized.to_qwix(x)
        for name in path.split("/"):
            found = found[int(name)] if name.isdigit() else getattr(found, name)
        return jax.tree.map(lambda v: v[...], found.array, is_leaf=lambda v: isinstance(v, nnx.Variable))
    found = quantized.to_qwix(x, model)[1]["params"]
    for name in path.split("/"):
        found = found[name]
    return found.array


@needs_qwix
@pytest.mark.parametrize("framework", ["linen", "nnx"])
@pytest.mark.parametrize("name", FLOATS)
def test_floating_point_formats_are_dequantized_to_our_values(name, framework):
    """qwix' own `dequantize`, to the bit, and its own products."""
    import qwix

    rules, kind, storage, run = FLOATS[name]
    rules = rules if isinstance(rules, list) else [rules]
    rules = [dataclasses.replace(r, pattern="wide.*", plain=True, method=jpfq.MSQ()) for r in rules]
    rules = [
        dataclasses.replace(r, scale=r.scale.base) if isinstance(r.scale, jpfq.scale.MinError) else r for r in rules
    ]
    rules += [jpfq.Rule(".*", skip=True)]
    x, module = normal(0, 5, 256), LinenDense()
    if framework == "linen":
        quantized = jpfq.quantize(module, [x], rules, variables=module.init(jax.random.key(0), x))
    else:
        module, quantized = None, jpfq.quantize(NNXDense(nnx.Rngs(0)), [x], rules)
    held = held_by("wide/kernel", quantized, x, module)
    assert (held.qtype, held.qvalue.dtype) == (kind, storage)
    assert held.scale.shape == (256 // run, 16)
    ours = quantized.tensors["wide/kernel"].dequantize()
    assert len(np.unique(np.asarray(ours))) > 10
    np.testing.assert_array_equal(qwix.dequantize(held), ours)
    found = quantized.to_qwix(x, module) if module else quantized.to_qwix(x)
    found = found(x) if module is None else found[0].apply(found[1], x)
    expected = quantized.apply(x)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * float(abs(expected).max()))


@needs_qwix
def test_blocks_of_heads_run_along_one_axis():
    """Two axes are contracted: groups of 32 inputs are a qwix format where they lie along the last of them."""
    for heads, size, kind in ((4, 64, "mxfp4"), (16, 16, jnp.dtype(jnp.int8))):

        class Join(nn.Module):
            @nn.compact
            def __call__(self, x):
                return nn.DenseGeneral(8, axis=(-2, -1), name="join")(x)

        x = normal(0, 5, heads, size)
        variables = Join().init(jax.random.key(0), x)
        rules = jpfq.formats.mxfp4(plain=True, method=jpfq.MSQ(), scale=jpfq.scale.AbsMax(per=jpfq.scale.PerGroup(32)))
        quantized = jpfq.quantize(Join(), [x], rules, variables=variables)
        if kind == "mxfp4":
            held = held_by("join/kernel", quantized, x, Join())
            assert held.qtype == kind
        module, held = quantized.to_qwix(x, Join())
        np.testing.assert_allclose(module.apply(held, x), quantized.apply(x), rtol=0, atol=1e-4)


@needs_qwix
def test_inputs_rounded_by_row_do_not_go_with_groups():
    """qwix would round them by the groups of the weights: other outputs than those of `apply`."""
    x, module = normal(0, 5, 256), LinenDense()
    variables = module.init(jax.random.key(0), x)
    rows = jpfq.Activations(jpfq.Integer(8), per="row")
    uses = [ActivationQuantizer(rows, DotLayout((256, 16), (0,), (), (1,), (), False), None)]
    quantized = result(
        module,
        {"wide/kernel": tensor((256, 16), (2, 16), jpfq.Integer(8))},
        variables=variables,
        inputs={"wide/kernel": uses},
    )
    with pytest.raises(ValueError, match="its inputs are rounded by row, which qwix does by the groups of the weights"):
        quantized.to_qwix(x, module)


@needs_qwix
def test_what_it_cannot_hold_is_listed():
    x = normal(0, 2, 6, 6, 3)
    tensors = {
        "first/kernel": tensor((3, 3, 3, 8), (1, 1, 1, 8), jpfq.Integer(8)),
        "second/kernel": tensor((3, 3, 8, 8), (1, 1, 1, 8), jpfq.Integer(12)),
        "third/kernel": tensor((8, 4), (1, 4), jpfq.Integer(4), rotated=rotation((8, 4))),
    }
    quantized = result(NNXConv(nnx.Rngs(0)), tensors)
    with pytest.raises(ValueError, match="cannot hold these kernels") as caught:
        quantized.to_qwix(x)
    lines = str(caught.value).splitlines()[1:]
    assert "first/kernel: a convolution has inputs quantized to as many bits" in lines[0]
    assert "second/kernel: Integer(12) takes 12 bits with a sign" in lines[1]
    assert "third/kernel: its inputs are rotated" in lines[2]


@needs_qwix
def test_a_function_is_refused_and_linen_needs_its_module():
    x = normal(0, 5, 12)
    quantized = result(linear, {}, params={"w": jnp.ones((12, 4))})
    with pytest.raises(ValueError, match="Linen modules and NNX models"):
        quantized.to_qwix(x)


@pytest.mark.parametrize(
    ("grid", "bits"),
    [
        (jpfq.Integer(4), 4),
        (jpfq.Integer(8, narrow=True), 8),
        (jpfq.Ternary(), 2),
        (jpfq.Binary(), 2),
        (jpfq.Equispaced(4), 3),
        (jpfq.Equispaced(5), 3),
        (jpfq.Symmetric(4), 4),
        (jpfq.Asymmetric(4), 4),
        (jpfq.Asymmetric(8), 8),
    ],
    ids=str,
)
def test_signed_integers_have_the_values_of_the_tensor(grid, bits):
    kernel = tensor((12, 4), (1, 4), grid)
    found = signed(kernel)
    zero = 0 if found.zero is None else found.zero
    assert found.bits == bits
    assert -(2 ** (bits - 1)) <= int(found.codes.min()) <= int(found.codes.max()) < 2 ** (bits - 1)
    values = found.step * (found.codes - zero).astype(jnp.float32)
    np.testing.assert_array_equal(values, kernel.dequantize())

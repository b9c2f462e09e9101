"""The floating-point layouts of compressed-tensors: unpacked by hand, and by the package itself where it is installed."""

import dataclasses
import json
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open

import jpfq
from jpfq.scalar.step_types import StepStorage, step_type
from tests.network.saved import result, tensor
from tests.storage.test_save import linear

FP4 = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
DYNAMIC_INT8 = jpfq.Activations(jpfq.Integer(8), per="row")
DYNAMIC_FP8 = jpfq.Activations(jpfq.E4M3(), per="row")
FORMATS = {  # rules, options, format, strategy of the inputs
    "int4": (jpfq.formats.int4(), {}, "pack-quantized", None),
    "int4, groups, fp8 inputs": (jpfq.formats.int4(32), {"dynamic_inputs": "fp8"}, "pack-quantized", "token"),
    "W4A8": (jpfq.formats.int4(activations=DYNAMIC_FP8), {}, "pack-quantized", "token"),
    "int8": (jpfq.formats.int8(), {}, "pack-quantized", None),
    "W8A8": (jpfq.formats.int8(activations=DYNAMIC_INT8), {}, "int-quantized", "token"),
    "W8A8, static": (jpfq.formats.int8(activation_bits=8), {}, "int-quantized", "tensor"),
    "fp8": (jpfq.formats.fp8(), {}, "float-quantized", None),
    "fp8, groups": (jpfq.formats.fp8(32), {}, "float-quantized", None),
    "fp8, blocks": (jpfq.formats.fp8(block=(32, 32)), {}, "float-quantized", None),
    "fp8, fp8 inputs": (jpfq.formats.fp8(activations=DYNAMIC_FP8), {}, "float-quantized", "token"),
    "mxint8": (jpfq.formats.mxint8(), {}, "pack-quantized", None),
    "mxfp4": (jpfq.formats.mxfp4(), {}, "mxfp4-pack-quantized", None),
    "mxfp6": (jpfq.formats.mxfp6(), {}, "mxfp6-pack-quantized", None),
    "mxfp8": (jpfq.formats.mxfp8(), {}, "mxfp8-quantized", None),
    "nvfp4": (jpfq.formats.nvfp4(), {}, "nvfp4-pack-quantized", None),
}


class Heads(nn.Module):
    """Kernels of rank 2 and 3, the latter with one and with two axes of inputs."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(96, name="up")(x))
        x = nn.DenseGeneral((4, 24), name="split")(x)
        x = nn.DenseGeneral(64, axis=(-2, -1), name="join")(x)
        return nn.Dense(32, name="down")(x)


def read(folder):
    """The arrays of a file, float8 too, and quantization_config."""
    with safe_open(folder / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
    raw = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    kinds = {"F8_E4M3": ml_dtypes.float8_e4m3fn, "U8": np.uint8, "I8": np.int8, "I32": np.int32, "I64": np.int64}
    kinds |= {"F16": np.float16, "F32": np.float32}
    arrays = {}
    for name, entry in json.loads(raw[8 : 8 + size]).items():
        if name != "__metadata__":
            first, last = entry["data_offsets"]
            part = np.frombuffer(raw[8 + size + first : 8 + size + last], kinds[entry["dtype"]])
            arrays[name] = part.reshape(entry["shape"])
    return arrays, json.loads((folder / "config.json").read_text())["quantization_config"]


def stored(grid, dtype, group, shape=(64, 6)):
    """A kernel of random codes, with steps that are stored in a type."""
    made = tensor(shape, (shape[0] // group, shape[1]), grid)
    store = StepStorage.over(made.step, step_type(dtype), 6, jnp.max)
    return dataclasses.replace(made, step=store(made.step), step_dtype=step_type(dtype))


def fields(words, bits):
    """Integers of so many bits, lowest first, along the last axis of bytes."""
    each = (words[..., None] >> np.arange(8, dtype=np.uint8)) & 1
    each = each.reshape(*words.shape[:-1], -1, bits)
    return (each.astype(np.int64) << np.arange(bits)).sum(-1)


def test_floating_point_layouts_unpacked_by_hand(tmp_path):
    kernels = {
        "nvfp4": stored(jpfq.E2M1(), "float8_e4m3fn", 16),
        "mxfp4": stored(jpfq.E2M1(), "float8_e8m0fnu", 32),
        "mxfp6": stored(jpfq.E2M3(), "float8_e8m0fnu", 32),
        "mxfp8": stored(jpfq.E4M3(), "float8_e8m0fnu", 32),
        "fp8": tensor((64, 6), (1, 6), jpfq.E4M3()),
        "blocks": tensor((64, 6), (4, 2), jpfq.E4M3()),
    }
    params = {name: {"kernel": jnp.ones(t.shape)} for name, t in kernels.items()}
    quantized = result(linear, {f"{name}/kernel": t for name, t in kernels.items()}, params=params)
    assert quantized.export("compressed-tensors", tmp_path / "o") == {}
    arrays, config = read(tmp_path / "o")
    assert config["format"] == "mixed-precision"
    spread = lambda x, size: np.repeat(x.astype(np.float32), size, 1)
    power = lambda x: np.float32(2.0) ** (x.astype(np.float32) - 127)
    fp6 = np.arange(64, dtype=np.uint8).view(ml_dtypes.float6_e2m3fn).astype(np.float32)
    found = {
        "nvfp4": FP4[fields(arrays["nvfp4.weight_packed"], 4)]
        * spread(arrays["nvfp4.weight_scale"], 16)
        / arrays["nvfp4.weight_global_scale"],
        "mxfp4": FP4[fields(arrays["mxfp4.weight_packed"], 4)] * spread(power(arrays["mxfp4.weight_scale"]), 32),
        "mxfp6": fp6[fields(arrays["mxfp6.weight_packed"], 6)] * spread(power(arrays["mxfp6.weight_scale"]), 32),
        "mxfp8": arrays["mxfp8.weight"].astype(np.float32) * spread(power(arrays["mxfp8.weight_scale"]), 32),
        "fp8": arrays["fp8.weight"].astype(np.float32) * arrays["fp8.weight_scale"],
        "blocks": arrays["blocks.weight"].astype(np.float32)
        * np.kron(arrays["blocks.weight_scale"], np.ones((3, 16), np.float32)),
    }
    for name, values in found.items():
        np.testing.assert_array_equal(values, np.asarray(kernels[name].dequantize()).T, err_msg=name)


def test_what_a_layout_cannot_hold_is_said(tmp_path):
    kernels = {
        "a": tensor((64, 6), (1, 6), jpfq.Integer(4)),
        "nf4": tensor((64, 6), (1, 6), jpfq.NF4()),
        "fp4": tensor((64, 6), (1, 6), jpfq.E2M1()),
        "fp6": stored(jpfq.E2M3(), "float8_e8m0fnu", 16),
        "heads": tensor((8, 8, 6), (1, 1, 6), jpfq.Integer(4)),
    }
    params = {name: {"kernel": jnp.ones(t.shape)} for name, t in kernels.items()}
    quantized = result(linear, {f"{name}/kernel": t for name, t in kernels.items()}, params=params)
    held = "is held in groups of 32 with steps of float8_e8m0fnu (jpfq.formats.mxfp4, mxfp6)"
    assert quantized.export("compressed-tensors", tmp_path / "o") == {
        "nf4/kernel": "the levels of NF4() are no whole multiples of one number",
        "fp4/kernel": f"E2M1() {held}, or of 16 with steps of float8_e4m3fn (jpfq.formats.nvfp4)",
        "fp6/kernel": f"E2M3() {held}",
        "heads/kernel": "it is of rank 3, and a product of matrices only if batch=.., an input, says so: give it to export",
    }
    with pytest.raises(ValueError, match="dynamic_inputs is 'int8' or 'fp8'; got 'int4'"):
        quantized.export("compressed-tensors", tmp_path / "p", dynamic_inputs="int4")


@pytest.fixture(scope="module")
def heads():
    x = jax.random.normal(jax.random.key(0), (256, 64))
    return Heads(), Heads().init(jax.random.key(1), x), x


def exported(heads, rules, options, folder):
    """A result by plain rounding, what is left of it, and what is read of the file."""
    model, variables, x = heads
    base = lambda scale: scale.base if isinstance(scale, jpfq.scale.MinError) else scale
    rules = [dataclasses.replace(r, plain=True, method=jpfq.MSQ(), scale=base(r.scale)) for r in rules]
    quantized = jpfq.quantize(model, [x], rules, variables=variables)
    return quantized, quantized.export("compressed-tensors", folder, batch=x, **options)


@pytest.mark.slow
def test_kernels_of_heads_are_matrices_by_their_product(heads, tmp_path):
    _, left = exported(heads, jpfq.formats.int4(32), {}, tmp_path / "o")
    assert left == {}
    arrays, config = read(tmp_path / "o")
    assert {name: tuple(x) for name, x in arrays.items() if name.endswith("shape")} == {
        "up.weight_shape": (96, 64),
        "split.weight_shape": (96, 96),
        "join.weight_shape": (64, 96),
        "down.weight_shape": (32, 64),
    }
    (group,) = config["config_groups"].values()
    assert group["weights"]["group_size"] == 32
    assert group["input_activations"] is None


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_the_package_reads_our_values(heads, name, tmp_path):
    """compressed-tensors' own decompression, to the bit, of every kernel."""
    torch = pytest.importorskip("torch", reason="takes torch: pip install 'jpfq[peers]'")
    pytest.importorskip("compressed_tensors", reason="takes compressed-tensors: pip install 'jpfq[peers]'")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from safetensors.torch import load_file

    rules, options, kind, strategy = FORMATS[name]
    quantized, left = exported(heads, rules, options, tmp_path / "o")
    assert left == {}
    config = json.loads((tmp_path / "o" / "config.json").read_text())["quantization_config"]
    groups = list(config["config_groups"].values())
    assert {(g["format"], (g["input_activations"] or {}).get("strategy")) for g in groups} == {(kind, strategy)}
    arrays = load_file(tmp_path / "o" / "model.safetensors")
    for path, kernel in quantized.tensors.items():
        stem = path.removesuffix("kernel").replace("/", ".")
        own = {key.removeprefix(stem): x for key, x in arrays.items() if key.startswith(stem) and "bias" not in key}
        target = "Linear" if len(groups) == 1 else f"re:^{re.escape(stem.removesuffix('.'))}$"
        (scheme,) = [QuantizationScheme(**g) for g in groups if target in g["targets"]]
        found = BaseCompressor.get_value_from_registry(kind).decompress(own, scheme)["weight"]
        ours = np.asarray(kernel.dequantize())
        ours = ours.reshape(-1, ours.shape[-1] if stem != "split." else 96).T
        np.testing.assert_array_equal(found.to(torch.float32).numpy(), ours)

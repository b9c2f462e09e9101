"""compressed-tensors: an independent unpacking of the documented layout gives our values."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jpfq
from tests.network.saved import result, tensor
from tests.storage.test_save import linear, rotation


def unpacked(words, bits, count):
    """Along the last axis: field i of a word is its bits i * bits .. , less 2^(bits - 1)."""
    fields = [(words.view(np.uint32).astype(np.int64) >> (bits * i)) % 2**bits for i in range(32 // bits)]
    return np.stack(fields, -1).reshape(len(words), -1)[:, :count] - 2 ** (bits - 1)


def weight(arrays, stem, bits):
    """(out, in) of a linear layer, as a loader computes it."""
    out, count = arrays[f"{stem}.weight_shape"]
    codes = unpacked(arrays[f"{stem}.weight_packed"], bits, count).astype(np.float32)
    scale = arrays[f"{stem}.weight_scale"]
    assert codes.shape == (out, count)
    runs = count // scale.shape[1]
    if f"{stem}.weight_zero_point" in arrays:
        zero = unpacked(arrays[f"{stem}.weight_zero_point"].T, bits, out).T
        codes = codes - np.repeat(zero, runs, 1).astype(np.float32)
    return codes * np.repeat(scale, runs, 1)


ASK = "and a product of matrices only if batch=.., an input, says so: give it to export"
KERNELS = {  # path -> tensor, bits in the file, group
    "a/kernel": (tensor((12, 5), (1, 5), jpfq.Integer(4)), 4, None),
    "b/kernel": (tensor((12, 5), (3, 5), jpfq.Asymmetric(4)), 4, 4),
    "c/kernel": (tensor((12, 5), (1, 1), jpfq.Integer(8)), 8, None),
    "d/kernel": (tensor((12, 5), (1, 5), jpfq.Ternary()), 4, None),
    "e/kernel": (tensor((12, 5), (1, 5), jpfq.Binary()), 4, None),
    "f/kernel": (tensor((12, 5), (2, 5), jpfq.Asymmetric(8)), 8, 6),
    "g/w": (tensor((5, 12), (5, 3), jpfq.Equispaced(16)), 8, 4),  # outputs first, as its steps tell
}


@pytest.fixture(scope="module")
def mixed():
    left = {
        "conv/kernel": tensor((3, 3, 2, 5), (1, 1, 1, 5), jpfq.Integer(4)),
        "wide/kernel": tensor((12, 5), (1, 5), jpfq.Integer(12)),
        "turned/kernel": tensor((12, 5), (1, 5), jpfq.Integer(4), rotated=rotation((12, 5))),
        "either/w": tensor((12, 5), (1, 1), jpfq.Integer(4)),
    }
    tensors = {path: kernel for path, (kernel, *_) in KERNELS.items()} | left
    params: dict = {path.split("/")[0]: {path.split("/")[1]: jnp.ones(t.shape)} for path, t in tensors.items()}
    params |= {
        "norm": {"scale": jnp.arange(5.0)},
        "head": {"kernel": jnp.ones((12, 5), jnp.bfloat16), "bias": jnp.ones(5)},
    }
    return result(linear, tensors, params=params)


def test_another_unpacking_gives_our_values_to_the_bit(mixed, tmp_path):
    left = mixed.export("compressed-tensors", tmp_path / "out", config={"architectures": ["Mine"]})
    arrays = load_file(tmp_path / "out" / "model.safetensors")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["Mine"]
    settings = config["quantization_config"]
    assert (settings["quant_method"], settings["format"]) == ("compressed-tensors", "pack-quantized")
    assert {"head", "wide", "turned"} == set(settings["ignore"])
    for path, (kernel, bits, group) in KERNELS.items():
        stem = path.split("/")[0]
        name = stem if path.endswith("kernel") else f"{stem}.w"
        if path == "g/w":
            assert "does not end in .weight" in left[path]
            continue
        assert arrays[f"{name}.weight_packed"].dtype == np.int32
        np.testing.assert_array_equal(weight(arrays, name, bits), np.asarray(kernel.dequantize()).T)
        (scheme,) = [g["weights"] for g in settings["config_groups"].values() if f"re:^{name}$" in g["targets"]]
        assert (scheme["num_bits"], scheme["group_size"]) == (bits, group)
        assert scheme["strategy"] == ("channel" if group is None else "group")
        assert scheme["symmetric"] == (f"{name}.weight_zero_point" not in arrays)
    np.testing.assert_array_equal(arrays["norm.weight"], np.arange(5.0))
    assert arrays["head.weight"].shape == (5, 12)
    assert arrays["head.weight"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(arrays["turned.weight"], np.asarray(mixed.params["turned"]["kernel"]).T)
    assert arrays["conv.weight"].shape == (3, 3, 2, 5)
    assert {path: why for path, why in left.items() if path != "g/w"} == {
        "conv/kernel": f"it is of rank 4, {ASK}",
        "wide/kernel": "Integer(12) takes 12 bits with a sign, and there are 4 or 8",
        "turned/kernel": "its inputs are rotated",
        "either/w": "its steps do not tell inputs from outputs: give export batch=.., an input",
    }


def test_names_are_those_one_gives_and_steps_tell_outputs(mixed, tmp_path):
    names = lambda path: "model." + re.sub("/(kernel|w|scale)$", ".weight", path).replace("/", ".")
    left = mixed.export("compressed-tensors", tmp_path / "out", names=names)
    arrays = load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(weight(arrays, "model.g", 8), np.asarray(mixed.params["g"]["w"]))
    assert left["either/w"] == "its steps do not tell inputs from outputs: give export batch=.., an input"
    with pytest.raises(ValueError, match="already in use"):
        mixed.export("compressed-tensors", tmp_path / "out")
    with pytest.raises(ValueError, match="Two parameters take the name x"):
        mixed.export("compressed-tensors", tmp_path / "new", names=lambda path: "x")


def test_one_way_of_quantizing_is_for_all_linear_layers(tmp_path):
    kernel = tensor((12, 5), (1, 5), jpfq.Integer(4))
    quantized = result(linear, {"a/kernel": kernel}, params={"a": {"kernel": jnp.ones((12, 5))}})
    assert quantized.export("compressed-tensors", tmp_path / "out") == {}
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert config["ignore"] == []


def test_a_result_without_a_matrix_is_refused(tmp_path):
    kernel = tensor((3, 3, 2, 5), (1, 1, 1, 5), jpfq.Integer(4))
    quantized = result(linear, {"a": kernel}, params={"a": jnp.ones(kernel.shape)})
    with pytest.raises(ValueError, match=r"none of the quantized kernels:\n  a: it is of rank 4"):
        quantized.export("compressed-tensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="kind is 'compressed-tensors' or 'awq' or 'gguf'; got 'gptq'"):
        quantized.export("gptq", tmp_path / "out")

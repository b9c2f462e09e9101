"""Our files through the unpacking functions of tpu-inference, which is what vLLM on TPU loads with.

The package itself needs vLLM and a TPU; these functions are plain JAX, and are read from their own file.
"""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from tests.export.test_layouts import read

N, OUT = 128, 96


@pytest.fixture(scope="module")
def theirs():
    found = importlib.util.find_spec("tpu_inference")
    if found is None:
        pytest.skip("takes tpu-inference: pip install --no-deps tpu-inference")
    (folder,) = found.submodule_search_locations
    path = Path(folder) / "layers" / "common" / "quantization" / "__init__.py"
    spec = importlib.util.spec_from_file_location("unpacking_of_tpu_inference", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def layer():
    params = {"layer": {"kernel": jax.random.normal(jax.random.key(0), (N, OUT))}}
    return params, [jax.random.normal(jax.random.key(1), (256, N))]


def exported(layer, rules, folder, kind="compressed-tensors", **options):
    params, batches = layer
    model = lambda params, x: x @ params["layer"]["kernel"]
    found = jpfq.quantize(model, batches, rules, params=params)
    assert found.export(kind, folder, **options) == {}
    arrays, config = read(folder)
    return np.asarray(found.tensors["layer/kernel"].dequantize()).T, arrays, config


def group(config):
    (one,) = config["config_groups"].values()
    return one


def spread(scale, n):
    return jnp.repeat(scale.astype(jnp.float32), n // scale.shape[1], 1)


@pytest.mark.slow
@pytest.mark.parametrize("size", [None, 32])
def test_integers_of_4_bits_with_inputs_in_fp8(theirs, layer, tmp_path, size):
    ours, arrays, config = exported(layer, jpfq.formats.int4(size), tmp_path / "o", dynamic_inputs="fp8")
    assert group(config)["weights"]["symmetric"]
    assert group(config)["input_activations"]["dynamic"]
    packed, scale = jnp.asarray(arrays["layer.weight_packed"]), jnp.asarray(arrays["layer.weight_scale"])
    weight, scale = theirs.unpack_wna16_linear_weight(packed, scale, N)
    found = theirs.dequantize_tensor(weight.T, scale.T, 1, jnp.float32)
    np.testing.assert_array_equal(found, ours)


@pytest.mark.slow
def test_nvfp4_and_mxfp4(theirs, layer, tmp_path):
    ours, arrays, _ = exported(layer, jpfq.formats.nvfp4(), tmp_path / "nv")
    weight = theirs.u8_unpack_e2m1(jnp.asarray(arrays["layer.weight_packed"])).astype(jnp.float32)
    scale = jnp.asarray(arrays["layer.weight_scale"].astype(np.float32)) / arrays["layer.weight_global_scale"]
    np.testing.assert_array_equal(weight * spread(scale, N), ours)
    ours, arrays, _ = exported(layer, jpfq.formats.mxfp4(), tmp_path / "mx")
    weight = theirs.u8_unpack_e2m1(jnp.asarray(arrays["layer.weight_packed"])).astype(jnp.float32)
    scale = theirs.e8m0_to_fp32(jnp.asarray(arrays["layer.weight_scale"]))
    np.testing.assert_array_equal(weight * spread(scale, N), ours)


@pytest.mark.slow
@pytest.mark.parametrize("block", [None, (32, 32)])
def test_fp8_by_neuron_and_in_blocks(theirs, layer, tmp_path, block):
    ours, arrays, config = exported(layer, jpfq.formats.fp8(block=block), tmp_path / "o", dynamic_inputs="fp8")
    assert group(config)["weights"]["strategy"] == ("channel" if block is None else "block")
    weight, scale = jnp.asarray(arrays["layer.weight"]), jnp.asarray(arrays["layer.weight_scale"])
    axis = 1 if block is None else (0, 1)
    np.testing.assert_array_equal(theirs.dequantize_tensor(weight, scale, axis, jnp.float32), ours)


@pytest.mark.slow
def test_integers_of_8_bits(theirs, layer, tmp_path):
    inputs = jpfq.Activations(jpfq.Integer(8), per="row")
    ours, arrays, config = exported(layer, jpfq.formats.int8(activations=inputs), tmp_path / "o")
    assert group(config)["format"] == "int-quantized"
    weight, scale = jnp.asarray(arrays["layer.weight"]), jnp.asarray(arrays["layer.weight_scale"])
    np.testing.assert_array_equal(theirs.dequantize_tensor(weight, scale, 1, jnp.float32), ours)


@pytest.mark.slow
def test_awq(theirs, layer, tmp_path):
    ours, arrays, config = exported(layer, jpfq.formats.awq(group=32), tmp_path / "o", "awq")
    assert json.loads((tmp_path / "o" / "config.json").read_text())["quantization_config"] == config
    unpack = lambda name: theirs.awq_u32_unpack_u4(jax.lax.bitcast_convert_type(arrays[f"layer.{name}"], jnp.uint32))
    codes, zeros = (unpack(name).astype(jnp.float32) for name in ("qweight", "qzeros"))
    scale = jnp.asarray(arrays["layer.scales"].astype(np.float32))
    wide = lambda x: jnp.repeat(x, 32, 0)
    np.testing.assert_array_equal(((codes - wide(zeros)) * wide(scale)).T, ours)

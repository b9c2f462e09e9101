"""AWQ: an independent unpacking of the documented layout gives our values, and so do the packages that read it."""

import dataclasses
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jpfq
from jpfq.calibrate.activation import ActivationQuantizer
from tests.network.saved import result, tensor
from tests.storage.test_save import linear, rotation

F16 = np.dtype(np.float16)


def half(*args, **rest):
    """A kernel of random codes with steps of float16."""
    made = tensor(*args, **rest)
    return dataclasses.replace(made, step=made.step.astype(jnp.float16).astype(jnp.float32), step_dtype=F16)


def unpacked(words):
    """(rows, out): column j of eight is the field of four bits at the place of j in 0, 2, 4, 6, 1, 3, 5, 7."""
    place = [(0, 2, 4, 6, 1, 3, 5, 7).index(j) for j in range(8)]
    fields = [(words.view(np.uint32) >> np.uint32(4 * at)) & np.uint32(15) for at in place]
    return np.stack(fields, -1).reshape(len(words), -1).astype(np.int32)


def weight(arrays, stem):
    """(in, out) of a layer, as a loader computes it, but in float32."""
    codes, zeros, scales = (arrays[f"{stem}.{end}"] for end in ("qweight", "qzeros", "scales"))
    assert (codes.dtype, zeros.dtype, scales.dtype) == (np.int32, np.int32, np.float16)
    group = len(codes) // len(scales)
    codes, zeros = unpacked(codes), unpacked(zeros)
    return (codes - np.repeat(zeros, group, 0)).astype(np.float32) * np.repeat(scales.astype(np.float32), group, 0)


KERNELS = {
    "a/kernel": half((64, 16), (2, 16), jpfq.Asymmetric(4)),
    "b/kernel": half((64, 24), (2, 24), jpfq.Integer(4)),
    "c/kernel": half((64, 8), (1, 8), jpfq.Ternary()),  # a step per neuron, which serves both groups
    "d/kernel": half((32, 8), (1, 8), jpfq.Binary()),  # whose zero lies between two codes
    "e/kernel": half((96, 8), (1, 1), jpfq.Asymmetric(4)),
    "f/kernel": half((64, 8), (2, 8), jpfq.Asymmetric(3)),
    "g/weight": half((8, 64), (8, 2), jpfq.Integer(4)),  # outputs first, as its steps tell
}


def exported(tensors, folder, **rest):
    params = {path.split("/")[0]: {path.split("/")[1]: jnp.ones(t.shape)} for path, t in tensors.items()}
    quantized = result(linear, tensors, params=params | {"norm": {"scale": jnp.arange(5.0)}})
    left = quantized.export("awq", folder, **rest)
    config = json.loads((folder / "config.json").read_text())
    return left, load_file(folder / "model.safetensors"), config


def test_another_unpacking_gives_our_values_to_the_bit(tmp_path):
    left, arrays, config = exported(KERNELS, tmp_path / "o", config={"architectures": ["Mine"]})
    assert left == {}
    assert config["architectures"] == ["Mine"]
    assert config["quantization_config"] == {
        "quant_method": "awq",
        "version": "gemm",
        "bits": 4,
        "group_size": 32,
        "zero_point": True,
        "modules_to_not_convert": None,
    }
    for path, kernel in KERNELS.items():
        stem = path.split("/")[0]
        ours = np.asarray(kernel.dequantize())
        inputs, outputs = ours.shape if path != "g/weight" else ours.shape[::-1]
        assert arrays[f"{stem}.qweight"].shape == (inputs, outputs // 8)
        assert arrays[f"{stem}.qzeros"].shape == (inputs // 32, outputs // 8)
        assert arrays[f"{stem}.scales"].shape == (inputs // 32, outputs)
        np.testing.assert_array_equal(weight(arrays, stem), ours if path != "g/weight" else ours.T, err_msg=path)
    np.testing.assert_array_equal(unpacked(arrays["b.qzeros"]), 8)
    np.testing.assert_array_equal(arrays["norm.weight"], np.arange(5.0))


def test_the_words_are_those_of_the_published_order(tmp_path):
    """Outputs 0 .. 7 with codes 0 .. 7 make the word 0x75316420: 0, 2, 4, 6, 1, 3, 5, 7 from the lowest four bits."""
    kernel = half((32, 8), (1, 8), jpfq.Asymmetric(4))
    kernel = dataclasses.replace(kernel, codes=jnp.broadcast_to(jnp.arange(8, dtype=kernel.codes.dtype), (32, 8)))
    _, arrays, _ = exported({"a/kernel": kernel}, tmp_path / "o")
    np.testing.assert_array_equal(arrays["a.qweight"], np.full((32, 1), 0x75316420, np.int32))


@pytest.mark.parametrize(
    ("shapes", "size", "left"),
    [
        ({(256, 8): 1, (128, 8): 1}, 128, {}),  # neurons have one step: the largest group of kernels that serves all
        ({(256, 8): 1, (96, 8): 1}, 32, {}),
        ({(40, 8): 1, (24, 8): 1}, -1, {}),
        (
            {(256, 8): 2, (64, 8): 1},
            128,
            {(64, 8): "it has 64 inputs, and AWQ one group size for all layers, here 128"},
        ),
        ({(128, 8): 2, (96, 8): 3, (48, 8): 2}, 32, {(48, 8): "it has groups of 24, and AWQ one"}),
    ],
)
def test_one_group_size_for_all_layers(shapes, size, left, tmp_path):
    tensors = {f"k{n}/kernel": half((n, out), (runs, out), jpfq.Integer(4)) for (n, out), runs in shapes.items()}
    found, arrays, config = exported(tensors, tmp_path / "o")
    assert config["quantization_config"]["group_size"] == size
    assert set(found) == {f"k{n}/kernel" for n, _ in left}
    for (n, _), why in left.items():
        assert found[f"k{n}/kernel"].startswith(why)
        np.testing.assert_array_equal(arrays[f"k{n}.weight"], np.asarray(tensors[f"k{n}/kernel"].dequantize()).T)
    assert config["quantization_config"]["modules_to_not_convert"] == ([f"k{n}" for n, _ in left] or None)
    for path in tensors.keys() - found.keys():
        np.testing.assert_array_equal(weight(arrays, path.split("/")[0]), np.asarray(tensors[path].dequantize()))


def test_what_it_cannot_hold_is_said(tmp_path):
    real = half((64, 8), (2, 8), jpfq.Asymmetric(4))
    tensors = {
        "a/kernel": half((64, 8), (2, 8), jpfq.Asymmetric(4)),
        "bytes/kernel": half((64, 8), (2, 8), jpfq.Integer(8)),
        "five/kernel": half((64, 8), (2, 8), jpfq.Asymmetric(5)),
        "table/kernel": half((64, 8), (2, 8), jpfq.NF4()),
        "real/kernel": dataclasses.replace(real, zero=real.zero + 0.25),
        "odd/kernel": half((64, 12), (2, 12), jpfq.Integer(4)),
        "single/kernel": tensor((64, 8), (2, 8), jpfq.Integer(4)),
        "small/kernel": dataclasses.replace(real, step=real.step * 1e-9),
        "conv/kernel": half((3, 3, 8, 8), (1, 1, 1, 8), jpfq.Integer(4)),
        "turned/kernel": half((64, 8), (1, 8), jpfq.Integer(4), rotated=rotation((64, 8))),
    }
    left, arrays, _ = exported(tensors, tmp_path / "o")
    steps = "its steps are not of float16: see jpfq.formats.awq, or set step_dtype='float16'"
    assert left == {
        "bytes/kernel": "Integer(8) takes 8 bits with a sign, and AWQ has 4",
        "five/kernel": "Asymmetric(5) takes 5 bits with a sign, and AWQ has 4",
        "table/kernel": "the levels of NF4() are no whole multiples of one number",
        "real/kernel": "its zero points differ and are no integers",
        "odd/kernel": "it has 12 outputs, and AWQ takes multiples of 8",
        "single/kernel": steps,
        "small/kernel": steps,
        "conv/kernel": "it is of rank 4, and a product of matrices only if batch=.., an input, says so: give it to export",
        "turned/kernel": "its inputs are rotated",
    }
    assert {name for name in arrays if name.startswith("a.")} == {"a.qweight", "a.qzeros", "a.scales"}
    np.testing.assert_array_equal(arrays["odd.weight"], np.asarray(tensors["odd/kernel"].dequantize()).T)


def test_names_that_servers_would_take_for_each_other_are_refused(tmp_path):
    tensors = {"heads/kernel": half((32, 8), (1, 8), jpfq.Integer(4))}
    params = {"heads": {"kernel": jnp.ones((32, 8))}, "head": {"kernel": jnp.ones((4, 4))}}
    quantized = result(linear, tensors, params=params)
    with pytest.raises(ValueError, match=r"'head' is part of 'heads', which is quantized: tell them apart by names="):
        quantized.export("awq", tmp_path / "o")
    assert list(tmp_path.iterdir()) == []
    names = lambda path: (
        f"body.{path.replace('/', '.')}".replace("kernel", "weight") if "heads" in path else "top.weight"
    )
    assert quantized.export("awq", tmp_path / "o", names=names) == {}


def test_quantized_inputs_are_refused(tmp_path):
    tensors = {"a/kernel": half((32, 8), (1, 8), jpfq.Integer(4))}
    rounded = {"a/kernel": [ActivationQuantizer(jpfq.Activations(jpfq.Integer(8), per="row"), None, None)]}
    quantized = result(linear, tensors, params={"a": {"kernel": jnp.ones((32, 8))}}, inputs=rounded)
    with pytest.raises(ValueError, match="Quantize without activations"):
        quantized.export("awq", tmp_path / "o")
    with pytest.raises(
        ValueError, match=r"takes names, config, batch, overwrite, like, max_shard_size; got dynamic_inputs"
    ):
        quantized.export("awq", tmp_path / "o", dynamic_inputs="fp8")


def test_rounded_operands_are_listed(tmp_path):
    """A cache is no input of a kernel: the weights are held all the same."""
    rounded = {"key": [ActivationQuantizer(jpfq.Activations(jpfq.Integer(8), per="row"), None, None)]}
    tensors = {"a/kernel": half((32, 8), (1, 8), jpfq.Integer(4))}
    quantized = result(linear, tensors, params={"a": {"kernel": jnp.ones((32, 8))}}, inputs=rounded)
    left = quantized.export("awq", tmp_path / "o")
    assert left == {"key": "a product without weights, which servers round in their own way"}
    np.testing.assert_array_equal(
        weight(load_file(tmp_path / "o/model.safetensors"), "a"), tensors["a/kernel"].dequantize()
    )


@pytest.fixture(scope="module")
def model():
    """A function of two layers by the rules for AWQ files."""
    x = jax.random.normal(jax.random.key(0), (128, 64))
    params = {name: {"kernel": jax.random.normal(jax.random.key(1), (64, 64)) / 8} for name in ("up", "down")}
    fn = lambda p, x: jax.nn.relu(x @ p["up"]["kernel"]) @ p["down"]["kernel"]
    rules = jpfq.formats.awq(group=32, plain=True, method=jpfq.MSQ())
    return jpfq.quantize(fn, [x], rules, params=params)


def test_the_rules_by_that_name_are_held(model, tmp_path):
    assert model.export("awq", tmp_path / "o") == {}
    arrays = load_file(tmp_path / "o" / "model.safetensors")
    for path, kernel in model.tensors.items():
        assert len(np.unique(np.asarray(kernel.zero))) > 2
        np.testing.assert_array_equal(weight(arrays, path.split("/")[0]), np.asarray(kernel.dequantize()))


def test_compressed_tensors_converts_it_to_our_values(model, tmp_path):
    """The package's own reader of AWQ files, and its own decompression."""
    pytest.importorskip("torch", reason="takes torch: pip install 'jpfq[peers]'")
    converters = pytest.importorskip(
        "compressed_tensors.entrypoints.convert.converters", reason="takes compressed-tensors and transformers"
    )
    from compressed_tensors.compressors import BaseCompressor
    from safetensors.torch import load_file as torch_file

    model.export("awq", tmp_path / "o")
    config = json.loads((tmp_path / "o" / "config.json").read_text())["quantization_config"]
    reader = converters.AutoAWQConverter.from_autoawq_config(config)
    arrays = reader.process(torch_file(tmp_path / "o" / "model.safetensors"))
    scheme = reader.update_config(None).config_groups["config_group_0"]
    for path, kernel in model.tensors.items():
        stem = f"{path.split('/')[0]}."
        own = {name.removeprefix(stem): x for name, x in arrays.items() if name.startswith(stem)}
        found = BaseCompressor.get_value_from_registry("pack-quantized").decompress(own, scheme)["weight"]
        np.testing.assert_array_equal(found.numpy(), np.asarray(kernel.dequantize()).astype(np.float16).T)


def test_autoawq_dequantizes_it_to_our_values(model, tmp_path):
    """AutoAWQ's own arithmetic, in float16. Its file alone is run, since the package imports what a CPU has not."""
    pytest.importorskip("torch", reason="takes torch: pip install 'jpfq[peers]'")
    from safetensors.torch import load_file as torch_file

    spec = importlib.util.find_spec("awq")
    if spec is None:
        pytest.skip("takes autoawq: pip install --no-deps autoawq")
    file = pathlib.Path(spec.submodule_search_locations[0]) / "utils" / "packing_utils.py"
    inner = importlib.util.spec_from_file_location("packing_utils", file)
    package = importlib.util.module_from_spec(inner)
    inner.loader.exec_module(package)
    model.export("awq", tmp_path / "o")
    arrays = torch_file(tmp_path / "o" / "model.safetensors")
    for path, kernel in model.tensors.items():
        own = [arrays[f"{path.split('/')[0]}.{end}"] for end in ("qweight", "qzeros", "scales")]
        found = package.dequantize_gemm(*own, 4, 32)
        np.testing.assert_array_equal(found.numpy(), np.asarray(kernel.dequantize()).astype(np.float16))

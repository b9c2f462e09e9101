"""GGUF: the package's own dequantization of the file gives our values to the bit, in the places of the float model's."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

import jpfq
from jpfq.export.gguf import blocks
from tests.hub import gguf_files, tiny

gguf = pytest.importorskip("gguf", reason="takes gguf: pip install 'jpfq[hub]'")

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
CONFIGS = {"llama": tiny.LLAMA, "qwen2": tiny.QWEN2}


@pytest.fixture(scope="module", params=CONFIGS)
def made(request, tmp_path_factory):
    """A float decoder, its file, and the decoder by plain rounding to Q4_0, its MLPs to Q8_0."""
    config = dataclasses.replace(CONFIGS[request.param], **SIZES)
    model = tiny.decoder(config)
    file = tmp_path_factory.mktemp("gguf") / "float.gguf"
    gguf_files.write(file, model)
    tokens = jax.random.randint(jax.random.key(0), (8, 16), 0, config.vocab_size)
    plain = {"plain": True, "method": jpfq.MSQ()}
    rules = [*jpfq.formats.q8_0(pattern=".*mlp.*", **plain), *jpfq.formats.q4_0(**plain)]
    return model, file, jpfq.quantize(model, [tokens], rules), tokens


def test_the_package_reads_our_values(made, tmp_path):
    model, file, quantized, tokens = made
    assert quantized.export("gguf", tmp_path / "w4.gguf", like=file, batch=tokens) == {}
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "w4.gguf").tensors}
    assert kinds["blk.1.attn_k.weight"] == kinds["blk.0.attn_output.weight"] == "Q4_0"
    assert kinds["blk.0.ffn_down.weight"] == "Q8_0"
    assert kinds["token_embd.weight"] == kinds["blk.0.attn_norm.weight"] == "F32"
    again = jpfq.hub.load(tmp_path / "w4.gguf")
    assert again.config == model.config
    found, ours = (nnx.to_flat_state(nnx.state(m, nnx.Param)) for m in (again.model, quantized.model))
    assert [path for path, _ in found] == [path for path, _ in ours]
    for (path, x), (_, y) in zip(found, ours, strict=True):
        np.testing.assert_array_equal(x[...], y[...], err_msg=str(path))
    np.testing.assert_array_equal(again.model(tokens), quantized.model(tokens))


def test_what_the_format_cannot_hold_is_said(made, tmp_path):
    model, file, quantized, tokens = made
    per_neuron = jpfq.quantize(model, [tokens], jpfq.Rule(".*", bits=4, plain=True, method=jpfq.MSQ()))
    left = per_neuron.export("gguf", tmp_path / "float.gguf", like=file)
    assert set(left) == set(per_neuron.tensors)
    assert "its steps are not of float16" in next(iter(left.values()))
    again = jpfq.hub.load(tmp_path / "float.gguf").model
    np.testing.assert_allclose(again(tokens), per_neuron.model(tokens), atol=1e-5)
    with pytest.raises(ValueError, match="exists: give another name, or overwrite=True"):
        quantized.export("gguf", tmp_path / "float.gguf", like=file)
    quantized.export("gguf", tmp_path / "float.gguf", like=file, overwrite=True)
    other = tmp_path / "other.gguf"
    gguf_files.write(other, tiny.decoder(dataclasses.replace(model.config, num_hidden_layers=1)))
    with pytest.raises(ValueError, match="is none of the tensors of the file"):
        quantized.export("gguf", tmp_path / "x.gguf", like=other)
    with pytest.raises(ValueError, match="give it as like="):
        quantized.export("gguf", tmp_path / "x.gguf")
    with pytest.raises(ValueError, match="is no GGUF file that can be read"):
        quantized.export("gguf", tmp_path / "x.gguf", like=__file__)
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.parametrize(("kind", "least", "most"), [("Q4_0", -8, 7), ("Q8_0", -128, 127)])
def test_blocks_are_those_of_the_format(kind, least, most):
    rng = np.random.default_rng(0)
    codes, steps = rng.integers(least, most + 1, (6, 96)), rng.uniform(0.01, 1, (6, 3)).astype(np.float16)
    found = gguf.quants.dequantize(blocks(kind, codes, steps), gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(found, np.repeat(np.float32(steps), 32, 1) * np.float32(codes))


@pytest.mark.slow
def test_values_of_any_grid_are_written_as_they_are(made, tmp_path):
    """Codes of tables and of grids whose zero lies between two are no values: those that the format lacks are floats."""
    model, file, _, tokens = made
    for grid in (jpfq.E2M1(), jpfq.NF4(), jpfq.Binary()):
        rule = jpfq.Rule(".*", grid=grid, plain=True, method=jpfq.MSQ(), scale=jpfq.scale.AbsMax(0.6))
        found = jpfq.quantize(model, [tokens], rule)
        assert set(found.export("gguf", tmp_path / "x.gguf", like=file, overwrite=True)) == set(found.tensors)
        again = jpfq.hub.load(tmp_path / "x.gguf").model
        for (path, x), (_, y) in zip(*(nnx.to_flat_state(nnx.state(m, nnx.Param)) for m in (again, found.model))):
            np.testing.assert_array_equal(x[...], y[...], err_msg=f"{grid} {path}")


def test_quantized_inputs_are_refused(made, tmp_path):
    model, file, _, tokens = made
    rules = jpfq.formats.q4_0(plain=True, method=jpfq.MSQ(), activation_bits=8)
    with pytest.raises(ValueError, match="Quantize without activations"):
        jpfq.quantize(model, [tokens], rules).export("gguf", tmp_path / "x.gguf", like=file)


def test_rounded_operands_are_listed(made, tmp_path):
    _, file, quantized, tokens = made
    left = dataclasses.replace(quantized, inputs={"key": []}).export("gguf", tmp_path / "x", like=file, batch=tokens)
    assert left == {"key": "a product without weights, which servers round in their own way"}

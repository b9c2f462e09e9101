"""GGUF: the package's own dequantization of the file gives our values to the bit, in the places of the float model's."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

import jpfq
from jpfq.export import quants
from jpfq.scalar.step_types import factors
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


@pytest.mark.parametrize(("kind", "least", "most"), [("q4_0", -8, 7), ("q8_0", -128, 127)])
def test_blocks_are_those_of_the_format(kind, least, most):
    rng = np.random.default_rng(0)
    codes, steps = rng.integers(least, most + 1, (6, 96)), rng.uniform(0.01, 1, (6, 3)).astype(np.float16)
    data = getattr(quants, kind)(codes, steps)
    found = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind.upper()])
    np.testing.assert_array_equal(found, np.repeat(np.float32(steps), 32, 1) * np.float32(codes))


@pytest.mark.parametrize("kind", ["Q4_1", "Q4_K", "Q6_K"])
def test_blocks_of_k_quants_are_those_of_the_format(kind):
    """Every bit of scales, minima and codes in its place, for numbers at random and at the ends."""
    rng = np.random.default_rng(1)
    half = lambda n: rng.uniform(0.01, 1, (5, n)).astype(np.float16)
    ends = lambda most, shape: rng.choice([0, 1, most // 2, most - 1, most, *rng.integers(0, most + 1, 5)], shape)
    group, top = {"Q4_1": (32, 15), "Q4_K": (32, 15), "Q6_K": (16, 63)}[kind]
    codes = ends(top, (5, 512))
    spread = lambda x: np.repeat(np.float32(x), group, 1)
    if kind == "Q4_1":
        d, least = half(16), -half(16)
        data = quants.q4_1(codes, d, least)
        values = spread(d) * np.float32(codes) + spread(least)
    else:
        d, dmin = half(2), half(2)
        times = lambda half, x: spread((np.float32(half)[..., None] * np.float32(x)).reshape(5, -1))
        scale, least = (ends({"Q4_K": 63, "Q6_K": 127}[kind], (5, 2, 256 // group)).astype(np.uint8) for _ in "ab")
        if kind == "Q4_K":
            data = quants.q4_k(codes, d, scale, dmin, least)
            values = times(d, scale) * np.float32(codes) - times(dmin, least)
        else:
            data = quants.q6_k(codes - 32, d, scale)
            values = times(d, scale) * np.float32(codes - 32)
    assert 8 * data.size / codes.size == {"Q4_1": 5.0, "Q4_K": 4.5, "Q6_K": 6.5625}[kind]
    np.testing.assert_array_equal(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]), values)


@pytest.mark.parametrize("name", ["q4_1", "q4_k", pytest.param("q6_k", marks=pytest.mark.slow)])
def test_the_package_reads_solved_k_quants(name):
    """Kernels (in, out) by the recommended recipe; tiny ones too, whose float16 are the least there are."""
    rng = np.random.default_rng(2)
    X = rng.standard_normal((300, 512)).astype(np.float32)
    W = (rng.standard_normal((512, 6)) * [[1, 1, 1e-3, 1e-5, 0, -1]]).astype(np.float32)
    W[:40, 1] = 0
    W[:, 5] = -abs(W[:, 5])
    product = lambda params, x: x @ params["kernel"]
    found = jpfq.quantize(product, [X], getattr(jpfq.formats, name)(), params={"kernel": W})
    tensor = found.tensors["kernel"]
    kind, data = quants.blocks_of(tensor, "kernel", None)
    assert kind == name.upper()
    values = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    np.testing.assert_array_equal(values.T, tensor.dequantize())
    assert data.nbytes == tensor.nbytes
    np.testing.assert_array_equal(values.T, found.params["kernel"])


def test_a_factor_that_is_none_is_refused():
    half, whole = factors(np.float32([[0.25, 0.5, 63 * 0.25], [0, 0, 0], [2.0**-24, 0, 2.0**-23]]), 63)
    np.testing.assert_array_equal(np.float32(half), np.float32([0.25, 0, 2.0**-24]))
    np.testing.assert_array_equal(whole, [[1, 2, 63], [0, 0, 0], [1, 0, 2]])
    with pytest.raises(ValueError, match="no integers up to 63 times one float16 for 3 of them"):
        factors(np.float32([[1.0, 1 / 3, 0.1]]), 63)


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

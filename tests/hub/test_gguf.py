"""GGUF: what llama.cpp lays out is what comes back, the order of queries and keys included; its tokenizers."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from jpfq import hub
from jpfq.hub.decoder import tensors_of
from jpfq.hub.gguf_file import unpermuted
from tests.helpers import assert_close
from tests.hub import tiny
from tests.reference import decoder as reference

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed: pip install 'jpfq[hub]'")
from tests.hub import gguf_files  # noqa: E402

LLAMA3 = dataclasses.replace(tiny.LLAMA, rope_factors=(1.0, 1.5, 4.0, 8.0))
CONFIGS = tiny.CONFIGS | {"llama3": LLAMA3}


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "linear"])
def test_a_file_comes_back_as_it_was(name, tmp_path):
    """Weights, and the logits of NumPy, which knows nothing of the order of a file."""
    model = tiny.decoder(CONFIGS[name])
    found = hub.load(gguf_files.write(tmp_path / "tiny.gguf", model))
    assert found.config == model.config
    after = tensors_of(found.model)
    for key, x in tensors_of(model).items():
        np.testing.assert_array_equal(after[key], x)
    tokens = tiny.tokens(9, batch=1)
    assert_close(
        found.model(jnp.asarray(tokens))[0], reference.forward(tiny.weights(model), tokens[0], model.config)[1]
    )


def test_rows_of_a_llama_are_put_in_order_and_of_a_qwen_are_left(tmp_path):
    stored = np.arange(8.0)[:, None]  # two heads of four coordinates
    np.testing.assert_array_equal(unpermuted(stored, 2)[:, 0], [0, 2, 1, 3, 4, 6, 5, 7])
    np.testing.assert_array_equal(gguf_files.interleaved(unpermuted(stored, 2), 2), stored)
    for name, moves in (("llama", True), ("qwen2", False)):
        model = tiny.decoder(CONFIGS[name])
        reader = gguf.GGUFReader(gguf_files.write(tmp_path / name, model))
        (found,) = (t for t in reader.tensors if t.name == "blk.0.attn_k.weight")
        same = np.array_equal(found.data, tensors_of(model)["model.layers.0.self_attn.k_proj.weight"])
        assert same != moves


def test_quantized_tensors_are_dequantized(tmp_path):
    """The float weights are those of the levels in the file."""
    config = dataclasses.replace(tiny.LLAMA, hidden_size=32, head_dim=8)
    model, kind = tiny.decoder(config), gguf.GGMLQuantizationType.Q4_1
    kinds = {"blk.0.ffn_up.weight": kind, "blk.1.attn_q.weight": kind}
    after = tensors_of(hub.load(gguf_files.write(tmp_path / "q", model, kinds)).model)
    for key, x in tensors_of(model).items():
        packed = "layers.0.mlp.up" in key or "layers.1.self_attn.q" in key
        np.testing.assert_allclose(after[key], x, atol=0.6 * np.ptp(x, -1).max() / 15 if packed else 0, rtol=0)
        if packed:
            assert all(len(np.unique(row)) <= 16 for row in after[key])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rope.scaling.type": "yarn"}, "'yarn'. Known are none, linear"),
        ({"expert_count": 4}, "4 experts"),
    ],
)
def test_what_is_not_known_is_refused(keys, message, tmp_path):
    path = gguf_files.write(tmp_path / "x", tiny.decoder(tiny.LLAMA), keys=keys)
    with pytest.raises(ValueError, match=message):
        hub.load(path)


def test_linear_positions(tmp_path):
    keys = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    path = gguf_files.write(tmp_path / "x", tiny.decoder(tiny.LINEAR), keys=keys)
    assert hub.load(path).config == tiny.LINEAR


def test_other_architectures_and_other_files_are_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x", "mamba")
    writer.add_tensor("token_embd.weight", np.ones((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"the architecture mamba, .* Known are llama \(LlamaForCausalLM\), qwen2"):
        hub.load(tmp_path / "x")
    (tmp_path / "y").write_bytes(b"no such thing")
    with pytest.raises(ValueError, match="no GGUF file"):
        hub.load(tmp_path / "y")


def test_a_tensor_that_cannot_be_dequantized_is_named(tmp_path):
    """One of integers, whose type the package has and does not turn into floats."""
    file = tmp_path / "model.gguf"
    gguf_files.write(file, tiny.decoder(tiny.LLAMA))
    raw = bytearray(file.read_bytes())
    name = b"blk.0.attn_k.weight"
    at = raw.index(name) + len(name) + 4 + 2 * 8  # after its name: the number of axes, and two sizes
    assert raw[at : at + 4] == bytes(4)  # float32
    raw[at] = gguf_files.gguf.GGMLQuantizationType.I32
    file.write_bytes(raw)
    with pytest.raises(ValueError, match=r"the tensor blk\.0\.attn_k\.weight cannot be dequantized by gguf"):
        hub.load(file)


def test_the_package_is_asked_for(tmp_path, monkeypatch):
    path = gguf_files.write(tmp_path / "x", tiny.decoder(tiny.LLAMA))
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ValueError, match=r"pip install 'jpfq\[hub\]'"):
        hub.load(path)


# ---------------------------------------------------------------------------------------------------------- tokenizers

MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2"]
LETTERS = ["h", "e", "l", "o", "w", "Ġ", "1", "2", "3", "!", "'", "s", "H", "Ċ"]
WORDS = ["<|end|>", *LETTERS, *(merge.replace(" ", "") for merge in MERGES), "<tool>"]
TYPES = [3, *[1] * (len(WORDS) - 2), 4]


def of_cut(cut, tmp_path, **changes):
    given = {"tokens": WORDS, "types": TYPES, "merges": MERGES, "cut": cut} | changes
    path = gguf_files.write(tmp_path / "t", tiny.decoder(tiny.LLAMA), words=tuple(given.values()))
    return hub.load(path)


@pytest.mark.parametrize(
    ("cut", "pieces"),
    [
        ("gpt-2", ["hello", "Ġw", "o", "<|end|>", "<tool>", "12", "3", "!", "'", "s"]),
        ("smollm", ["hello", "Ġw", "o", "<|end|>", "<tool>", "1", "2", "3", "!", "'", "s"]),
        ("qwen2", ["hello", "Ġw", "o", "<|end|>", "<tool>", "1", "2", "3", "!", "'", "s"]),
        ("llama-bpe", ["hello", "Ġw", "o", "<|end|>", "<tool>", "12", "3", "!", "'", "s"]),
    ],
)
def test_text_is_cut_and_merged(cut, pieces, tmp_path):
    pytest.importorskip("tokenizers", reason="the package tokenizers is not installed: pip install 'jpfq[hub]'")
    found, text = of_cut(cut, tmp_path), "hello wo<|end|><tool>123!'s"
    ids = found.encode(text)
    assert [WORDS[i] for i in ids] == pieces
    assert ids.dtype == np.int32
    assert found.tokenizer.decode(ids, skip_special_tokens=False) == text
    assert found.tokenizer.decode(ids) == text.replace("<|end|>", "")


def test_a_tokenizer_that_is_not_known_is_said_to_be_missing(tmp_path):
    found = of_cut("tekken", tmp_path)
    assert found.tokenizer is None
    with pytest.raises(ValueError, match="cuts text into words by 'tekken'; known are gpt-2, smollm, llama-bpe, qwen2"):
        found.encode("hello")
    bare = hub.load(gguf_files.write(tmp_path / "u", tiny.decoder(tiny.LLAMA)))
    with pytest.raises(ValueError, match="tokenizer of the kind None"):
        bare.encode("hello")

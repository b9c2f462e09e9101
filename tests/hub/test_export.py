"""A quantized decoder served by another runtime: transformers, which reads compressed-tensors."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jpfq
from tests.hub import tiny

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
FORMATS = {
    "int4": jpfq.formats.int4(32, plain=True, method=jpfq.MSQ()),
    "fp8": jpfq.formats.fp8(plain=True, method=jpfq.MSQ()),
}


def quantized(rules, config=tiny.LLAMA):
    model = tiny.decoder(dataclasses.replace(config, **SIZES, max_position_embeddings=128))
    tokens = jax.random.randint(jax.random.key(0), (8, 16), 0, config.vocab_size)
    return jpfq.quantize(model, [tokens], rules), tokens


@pytest.mark.slow
def test_a_folder_has_the_names_and_config_of_the_hub(tmp_path):
    found, _ = quantized(FORMATS["int4"])
    assert jpfq.hub.export(found, tmp_path / "o", dynamic_inputs="fp8") == {}
    from safetensors import safe_open

    with safe_open(tmp_path / "o" / "model.safetensors", "np") as file:
        names = set(file.keys())
    assert {"model.layers.1.self_attn.q_proj.weight_packed", "model.norm.weight", "model.embed_tokens.weight"} <= names
    with pytest.raises(ValueError, match="quantized already"):
        jpfq.hub.load(tmp_path / "o")
    params = {"w": jnp.ones((32, 4))}
    other = jpfq.quantize(lambda p, x: x @ p["w"], [jnp.ones((8, 32))], FORMATS["int4"], params=params)
    with pytest.raises(ValueError, match=r"takes what jpfq\.quantize made of a jpfq\.hub\.Decoder"):
        jpfq.hub.export(other, tmp_path / "p")


@pytest.mark.slow
def test_awq_folders_have_them_too(tmp_path):
    found, _ = quantized(jpfq.formats.awq(32, plain=True, method=jpfq.MSQ()))
    assert jpfq.hub.export(found, tmp_path / "o", "awq", max_shard_size=10_000) == {}
    config = json.loads((tmp_path / "o" / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["quantization_config"]["modules_to_not_convert"] == ["lm_head"]
    index = json.loads((tmp_path / "o" / "model.safetensors.index.json").read_text())["weight_map"]
    assert {"model.layers.1.self_attn.q_proj.qzeros", "model.norm.weight", "model.embed_tokens.weight"} <= index.keys()
    assert len(set(index.values())) > 1


@pytest.mark.slow
def test_like_the_folder_it_was_loaded_from(tmp_path):
    """By our names and by value the same files, with the config and what else lies in that folder."""
    rules = jpfq.formats.awq(32, plain=True, method=jpfq.MSQ())
    config = dataclasses.replace(tiny.QWEN2, tie_word_embeddings=False)
    config = dataclasses.replace(config, **SIZES)
    jpfq.hub.save(tiny.decoder(config, jnp.bfloat16), tmp_path / "float")
    floats = json.loads((tmp_path / "float" / "config.json").read_text()) | {"note": "kept"}
    (tmp_path / "float" / "config.json").write_text(json.dumps(floats))
    (tmp_path / "float" / "generation_config.json").write_text("{}")
    checkpoint = jpfq.hub.load(tmp_path / "float")
    tokens = jax.random.randint(jax.random.key(0), (8, 16), 0, config.vocab_size)
    found = jpfq.quantize(checkpoint.model, [tokens], rules)
    assert jpfq.hub.export(found, tmp_path / "a", "awq", like=tmp_path / "float") == {}
    assert found.export("awq", tmp_path / "b", like=tmp_path / "float") == {}
    files = [{f.name: f.read_bytes() for f in (tmp_path / name).iterdir()} for name in "ab"]
    assert files[0] == files[1]
    assert files[0].keys() == {"config.json", "model.safetensors", "generation_config.json"}
    written = json.loads(files[0]["config.json"])
    assert floats.items() <= written.items()
    assert written["quantization_config"]["quant_method"] == "awq"


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMATS)
def test_another_runtime_generates_the_same_tokens(tmp_path, name):
    """Sixty-four tokens, each the likeliest after those before."""
    torch = pytest.importorskip("torch", reason="takes torch: pip install 'jpfq[peers]'")
    transformers = pytest.importorskip("transformers", reason="takes transformers: pip install transformers")
    pytest.importorskip("compressed_tensors", reason="takes compressed-tensors: pip install 'jpfq[peers]'")
    found, tokens = quantized(FORMATS[name])
    assert jpfq.hub.export(found, tmp_path / "o") == {}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "o", dtype=torch.float32).eval()
    line, model = np.asarray(tokens[:1]), nnx.jit(found.model)
    with torch.no_grad():
        logits = theirs(torch.tensor(line)).logits.numpy()
        settings = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "max_new_tokens": 64}
        mask = torch.ones(line.shape, dtype=torch.int64)  # else tokens 0 would count as padding
        made = theirs.generate(torch.tensor(line), attention_mask=mask, **settings)
    np.testing.assert_allclose(logits, model(jnp.asarray(line)), atol=2e-4 * np.abs(logits).max())
    for end in range(16, 80):  # attention is causal: what fills up behind is not looked at
        filled = jnp.pad(jnp.asarray(line), ((0, 0), (0, 80 - end)))
        line = np.concatenate([line, np.argmax(np.asarray(model(filled))[:, end - 1 : end], -1)], 1)
    np.testing.assert_array_equal(made.numpy(), line)

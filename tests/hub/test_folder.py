"""Folders as Hugging Face has them: in and out, in several files, and beside transformers where that is installed."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
import safetensors.numpy

from jpfq import hub
from jpfq.hub.config import as_json, from_json
from jpfq.hub.decoder import tensors_of
from tests.hub import tiny

TEXT = "the cat and the hat and the bat"


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_a_model_is_saved_and_comes_back(name, tmp_path):
    model = tiny.decoder(tiny.CONFIGS[name])
    if name == "biased":  # as config.json can say it: all four of attention have biases
        assert from_json(as_json(model.config)) == model.config
    hub.save(model, tmp_path / "saved")
    found = hub.load(tmp_path / "saved")
    assert found.config == model.config
    for key, x in tensors_of(model).items():
        np.testing.assert_array_equal(tensors_of(found.model)[key], x)
    with pytest.raises(ValueError, match="already holds something"):
        hub.save(model, tmp_path / "saved")


def test_what_config_json_cannot_say_is_refused(tmp_path):
    odd = dataclasses.replace(tiny.LLAMA, rope_factors=(1.0, 2.0, 3.0, 4.0))
    with pytest.raises(ValueError, match="factors of their own"):
        hub.save(tiny.decoder(odd), tmp_path / "x")
    odd = dataclasses.replace(tiny.QWEN2, o_bias=True, qkv_bias=False)
    with pytest.raises(ValueError, match="A qwen2 has other biases"):
        hub.save(tiny.decoder(odd), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_several_files_with_an_index_in_bfloat16(tmp_path):
    model = tiny.decoder(tiny.QWEN3)
    hub.save(model, tmp_path / "one")
    (tmp_path / "many").mkdir()
    (tmp_path / "many" / "config.json").write_text((tmp_path / "one" / "config.json").read_text())
    halves = {name: jnp.asarray(x, jnp.bfloat16) for name, x in tensors_of(model).items()}
    where = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(halves)}
    for file in set(where.values()):
        part = {name: x for name, x in halves.items() if where[name] == file}
        safetensors.flax.save_file(part, tmp_path / "many" / file)
    with pytest.raises(ValueError, match=r"2 \.safetensors files and no model\.safetensors\.index\.json"):
        hub.load(tmp_path / "many")
    (tmp_path / "many" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    found = hub.load(tmp_path / "many")
    for key, x in tensors_of(found.model).items():
        np.testing.assert_array_equal(x, np.asarray(halves[key], np.float32))
    (tmp_path / "many" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks model-00002-of-00002\.safetensors"):
        hub.load(tmp_path / "many")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"GPT2LMHeadModel, which is not known. Known are llama \(Llama"),
        ({"architectures": None, "model_type": "gemma2"}, "gemma2, which is not known"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantized already"),
        ({"use_sliding_window": True}, "sliding window"),
        ({"partial_rotary_factor": 0.5}, "a share of each head"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "'yarn' are not known. Known are default, linear, llama3"),
        ({"hidden_size": ...}, "does not say 'hidden_size'"),
    ],
)
def test_a_config_that_is_not_known_is_refused(change, message, tmp_path):
    hub.save(tiny.decoder(tiny.LLAMA), tmp_path / "x")
    config = json.loads((tmp_path / "x" / "config.json").read_text()) | change
    (tmp_path / "x" / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    with pytest.raises(ValueError, match=message):
        hub.load(tmp_path / "x")


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match="There is no "):
        hub.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        hub.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="no JSON"):
        hub.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(as_json(tiny.LLAMA)))
    with pytest.raises(ValueError, match=r"no \.safetensors file"):
        hub.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read"):
        hub.load(tmp_path)


def test_tokenizer_json_is_read(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="the package tokenizers is not installed")
    hub.save(tiny.decoder(tiny.LLAMA), tmp_path / "x")
    with pytest.raises(ValueError, match=r"has no tokenizer\.json. Give tokens in place of text"):
        hub.load(tmp_path / "x").encode(TEXT)
    words = sorted(set(TEXT.split()))
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "x" / "tokenizer.json"))
    np.testing.assert_array_equal(hub.load(tmp_path / "x").encode(TEXT), [words.index(word) for word in TEXT.split()])


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 69, "rope_theta": 100.0}


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("Llama", {}),
        ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
        ("Llama", {"rope_parameters": LLAMA3}),
        ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 100.0}}),
        ("Qwen2", {"tie_word_embeddings": True}),
        ("Qwen3", {"tie_word_embeddings": False, "attention_bias": True}),
    ],
)
def test_transformers_says_the_same(name, more, tmp_path):
    """Random weights of its own, norms and biases too, saved by it and read here: all hidden states and the logits."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {k: v for k, v in tiny.SIZES.items() if k != "rope_theta"}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0}}
    settings = sizes | rope | {"tie_word_embeddings": True, "rms_norm_eps": 1e-3} | more
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    theirs = getattr(transformers, f"{name}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for x in theirs.parameters():
            x.copy_(torch.randn_like(x) / x.shape[-1] ** 0.5 if x.ndim == 2 else 1 + 0.3 * torch.randn_like(x))
        theirs.save_pretrained(tmp_path / "x")
        tokens = tiny.tokens(40, batch=2)
        out = theirs(torch.from_numpy(tokens), output_hidden_states=True)
    model = hub.load(tmp_path / "x").model
    x = model.embed_tokens(jnp.asarray(tokens))
    turn, far = model.turn(40, x.dtype), []
    for layer, state in zip(model.layers, out.hidden_states[:-1], strict=True):  # the last of which is behind the norm
        far.append(np.abs(np.asarray(x) - state.numpy()).max() / np.abs(state.numpy()).max())
        x = layer(x, turn)
    logits = out.logits.numpy()
    far.append(np.abs(np.asarray(model(jnp.asarray(tokens))) - logits).max() / np.abs(logits).max())
    print(f"{name} {sorted(more)}: largest difference {max(far):.1e}")
    assert max(far) < 1e-5

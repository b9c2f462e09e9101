"""The decoder against NumPy, layer by layer; parameters in and out; perplexity."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from jpfq import hub
from jpfq.hub.checkpoint import nats
from jpfq.hub.config import from_json
from jpfq.hub.decoder import filled, tensors_of, turned
from tests.helpers import assert_close
from tests.hub import tiny
from tests.reference import decoder as reference

POSITIONS = 11


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_each_block_and_the_logits_are_those_of_numpy(name, x64):
    config = tiny.CONFIGS[name]
    model, tokens = tiny.decoder(config, jnp.float64), tiny.tokens(POSITIONS, batch=2)
    expected = [reference.forward(tiny.weights(model), row, config) for row in tokens]
    x = model.embed_tokens(jnp.asarray(tokens))
    turn = model.turn(POSITIONS, x.dtype)
    for i in range(config.num_hidden_layers + 1):
        assert_close(x, np.stack([streams[i] for streams, _ in expected]))
        x = model.layers[i](x, turn) if i < config.num_hidden_layers else x
    assert_close(model(jnp.asarray(tokens)), np.stack([logits for _, logits in expected]))


def test_positions_turn_as_numpy_turns_them(x64):
    x = np.random.default_rng(0).standard_normal((POSITIONS, 3, 8))
    turn = tiny.decoder(tiny.LINEAR, jnp.float64).turn(POSITIONS, jnp.float64)
    assert_close(turned(jnp.asarray(x)[None], turn)[0], reference.rotary(x, 100.0, (4.0,) * 4))


def test_products_of_queries_and_keys_depend_on_the_distance_alone(x64):
    q, k = np.random.default_rng(0).standard_normal((2, 1, 1, 1, 8))
    turn = tiny.decoder(tiny.LLAMA, jnp.float64).turn(20, jnp.float64)
    at = lambda x, p: np.asarray(turned(jnp.asarray(x), tuple(y[p : p + 1] for y in turn)))[0, 0, 0]
    assert_close(at(q, 17) @ at(k, 9), at(q, 8) @ at(k, 0))


@pytest.mark.slow
def test_a_later_token_changes_nothing_before_it():
    model, tokens = tiny.decoder(tiny.QWEN3), tiny.tokens(POSITIONS, batch=1)
    other = tokens.copy()
    other[0, 6:] = (other[0, 6:] + 1) % tiny.SIZES["vocab_size"]
    first, second = (np.asarray(model(jnp.asarray(x))) for x in (tokens, other))
    assert_close(jnp.asarray(first[:, :6]), second[:, :6])
    assert np.abs(first[:, 6:] - second[:, 6:]).max() > 0.1


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_parameters_go_out_and_come_back(name):
    model = tiny.decoder(tiny.CONFIGS[name])
    again = filled(model.config, tensors_of(model).items(), jnp.float32)
    tokens = jnp.asarray(tiny.tokens(POSITIONS, batch=1))
    np.testing.assert_array_equal(model(tokens), again(tokens))


@pytest.mark.slow
def test_the_dtype_is_that_of_all_parameters_and_of_the_logits():
    model = filled(tiny.QWEN3, tensors_of(tiny.decoder(tiny.QWEN3)).items(), jnp.bfloat16)
    assert {x.dtype.name for x in tensors_of(model).values()} == {"bfloat16"}
    assert model(jnp.asarray(tiny.tokens(POSITIONS, batch=1))).dtype == jnp.bfloat16


def test_what_is_missing_or_too_much_is_named():
    tensors = tensors_of(tiny.decoder(tiny.QWEN2))
    with pytest.raises(ValueError, match=r"has, and .*model\.layers\.0\.self_attn\.k_proj\.bias.* and 2 more"):
        filled(tiny.LLAMA, tensors.items(), jnp.float32)
    del tensors["model.norm.weight"]
    with pytest.raises(ValueError, match=r"lacks the tensors model\.norm\.weight"):
        filled(tiny.QWEN2, tensors.items(), jnp.float32)
    with pytest.raises(ValueError, match=r"model\.norm\.weight has shape \(3,\).*\(24,\)"):
        filled(tiny.QWEN2, (tensors | {"model.norm.weight": np.ones(3)}).items(), jnp.float32)
    for name, shape in (
        ("model.embed_tokens.weight", r"\(48, 24\)"),
        ("model.layers.1.mlp.up_proj.weight", r"\(40, 24\)"),
    ):
        with pytest.raises(ValueError, match=rf"{name} has shape \(2, 3\), and the config asks for {shape}"):
            filled(tiny.QWEN2, (tensors | {name: np.ones((2, 3))}).items(), jnp.float32)


def test_too_many_positions_are_refused():
    with pytest.raises(ValueError, match="64 positions; got 65"):
        tiny.decoder(tiny.LLAMA)(jnp.zeros((1, 65), int))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head_dim": 7}, "even"),
        ({"num_key_value_heads": 4}, "multiple"),
        ({"rope_factors": (1.0,)}, "4 numbers"),
        ({"architecture": "gpt2"}, r"Known are llama \(LlamaForCausalLM\), qwen2"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny.LLAMA, **change)


def test_llama3_divides_long_waves_only(x64):
    """By 8 where a wave does not turn once in the old context, by 1 where it turns four times, by a blend between."""
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 69, "rope_theta": 100.0}
    given = {k: v for k, v in tiny.SIZES.items() if k != "rope_theta"}
    config = from_json(given | {"architectures": ["LlamaForCausalLM"], "rope_parameters": rope})
    turns = 69 * 100.0 ** (-np.arange(4) / 4) / (2 * np.pi)
    assert turns[0] > 4 > turns[1] > turns[2] > 1 > turns[3]
    share = (turns[1:3] - 1) / 3
    assert_close(jnp.array(config.rope_factors), [1, *(1 / ((1 - share) / 8 + share)), 8])
    assert_close(jnp.array(config.frequencies), 100.0 ** (-np.arange(4) / 4) / config.rope_factors)


@pytest.mark.slow
def test_perplexity_is_that_of_numpy(x64):
    model, tokens = tiny.decoder(tiny.LLAMA, jnp.float64), tiny.tokens(60)
    windows = hub.windows(tokens, 12, batch=3)
    assert [x.shape for x in windows] == [(3, 12), (2, 12)]
    rows = tokens.reshape(5, 12)
    expected = [reference.perplexity(reference.forward(tiny.weights(model), x, tiny.LLAMA)[1], x) for x in rows]
    wanted = np.exp(np.mean(np.log(expected)))
    assert_close(jnp.array(hub.perplexity(model, windows)), wanted)
    assert_close(jnp.array(hub.perplexity(lambda x: model(x), windows)), wanted)
    assert_close(jnp.exp(nats(model, windows)), wanted)


def test_windows_are_cut_from_the_beginning_and_too_few_are_an_error():
    (first,) = hub.windows(range(100), 10, count=3)
    np.testing.assert_array_equal(first, np.arange(30).reshape(3, 10))
    with pytest.raises(
        ValueError, match="11 windows of 10 tokens are asked for, and there are 100 tokens, enough for 10"
    ):
        hub.windows(range(100), 10, count=11)
    with pytest.raises(ValueError, match="positive"):
        hub.windows(range(100), 0)
    with pytest.raises(ValueError, match="no windows"):
        hub.perplexity(tiny.decoder(tiny.LLAMA), [])


@pytest.mark.parametrize("name", ["biased", "qwen3"])
def test_all_kernels_are_quantized_and_named_as_in_the_file(name):
    config = tiny.CONFIGS[name]
    model = tiny.decoder(config)
    result = jpfq.quantize(model, hub.windows(tiny.tokens(1024), 32), 4, progress=False)
    matrices = {name for name, x in tensors_of(model).items() if x.ndim == 2} - {"model.embed_tokens.weight"}
    paths = {f"{path.removesuffix('/kernel').replace('/', '.')}.weight" for path in result.tensors}
    assert {path.removeprefix("model.") for path in matrices} == paths
    assert "embed_tokens/embedding" in result.skipped
    assert isinstance(result.model, hub.Decoder)
    assert result.output_error < 0.5


def test_a_tied_embedding_stays_as_it_is():
    model = tiny.decoder(tiny.LLAMA)
    plan = jpfq.plan(model, hub.windows(tiny.tokens(64), 32)[0], 4)
    assert "embed_tokens/embedding" in str(plan)
    result = jpfq.quantize(model, hub.windows(tiny.tokens(512), 32), 4, progress=False)
    np.testing.assert_array_equal(result.model.embed_tokens.embedding[...], model.embed_tokens.embedding[...])


@pytest.mark.slow
def test_a_deeper_model_compiles_nothing_more(compilations):
    def count(layers):
        config = dataclasses.replace(tiny.LLAMA, num_hidden_layers=layers, vocab_size=40 + layers)
        windows = hub.windows(tiny.tokens(512) % 40, 32)
        before = len(compilations)
        jpfq.quantize(tiny.decoder(config), windows, 4, progress=False)
        return len(compilations) - before

    count(2)  # what all such models share
    assert count(3) == count(6)

"""The Flax models of transformers: every family that runs with today's Flax, tiny and with random weights."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from tests.network import zoo
from tests.packages import helpers

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
transformers = pytest.importorskip("transformers", reason="needs transformers with Flax: pip install 'jpfq[packages]'")
if not hasattr(transformers, "FlaxBertForMaskedLM"):
    pytest.skip("this transformers has no Flax models: pip install 'transformers<5'", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs, on import and in use

WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = WIDTH | {"vocab_size": 50, "max_position_embeddings": 20}
GPT = {"vocab_size": 50, "n_positions": 20, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48}
IMAGE = WIDTH | {"image_size": 16, "patch_size": 4}
STAGES = {"embedding_size": 8, "hidden_sizes": [16, 16], "depths": [1, 1]}
HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
BOTH = HEADS | {"vocab_size": 50, "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "pad_token_id": 1}
SEQUENCES = BOTH | {"max_position_embeddings": 20}
ENDS = {"decoder_start_token_id": 2, "bos_token_id": 2, "eos_token_id": 2}
SPEECH = BOTH | ENDS | {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 12}
POSITIONS = {"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "do_stable_layer_norm": True}
WAVES = {"conv_dim": [16, 16], "conv_kernel": [5, 3], "conv_stride": [3, 2], "feat_extract_norm": "layer"}


def text(seed):
    return {"input_ids": helpers.tokens(seed)}


def translation(seed):
    return {"input_ids": helpers.tokens(seed), "decoder_input_ids": helpers.tokens(seed + 99, 6)}


def speech(seed):
    return {"input_features": helpers.normal(seed, 3, 8, 20), "decoder_input_ids": helpers.tokens(seed, 6)}


def image(seed):
    return {"pixel_values": helpers.normal(seed, 3, 3, 16, 16)}


MODELS = {  # class: fields of its configuration, and a batch by its number
    "GPT2LMHeadModel": (GPT, text),
    "GPTNeoForCausalLM": (
        {"vocab_size": 50, "max_position_embeddings": 20, "hidden_size": 32, "num_layers": 2, "num_heads": 4}
        | {"intermediate_size": 48, "attention_types": [[["global", "local"], 1]], "window_size": 4},
        text,
    ),
    "GPTJForCausalLM": (GPT | {"rotary_dim": 4}, text),
    "OPTForCausalLM": (TEXT | {"ffn_dim": 48, "word_embed_proj_dim": 16}, text),
    "LlamaForCausalLM": (TEXT | {"num_key_value_heads": 2}, text),
    "MistralForCausalLM": (TEXT | {"num_key_value_heads": 2, "sliding_window": 4}, text),
    "GemmaForCausalLM": (TEXT | {"num_key_value_heads": 2, "head_dim": 8}, text),
    "BloomForCausalLM": ({"vocab_size": 50, "hidden_size": 32, "n_layer": 2, "n_head": 4}, text),
    "XGLMForCausalLM": (
        {"vocab_size": 50, "max_position_embeddings": 20, "d_model": 32, "ffn_dim": 48}
        | {"num_layers": 2, "attention_heads": 4},
        text,
    ),
    "BertForMaskedLM": (TEXT, text),
    "BertForSequenceClassification": (TEXT, text),
    "RobertaForMaskedLM": (TEXT, text),
    "XLMRobertaForTokenClassification": (TEXT, text),
    "RobertaPreLayerNormForMaskedLM": (TEXT, text),
    "RoFormerForMaskedLM": (TEXT | {"embedding_size": 16}, text),
    "AlbertForMaskedLM": (TEXT | {"embedding_size": 16}, text),
    "ElectraForPreTraining": (TEXT | {"embedding_size": 16}, text),
    "DistilBertForMaskedLM": (
        {"vocab_size": 50, "max_position_embeddings": 20, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
        text,
    ),
    "BigBirdForMaskedLM": (TEXT | {"attention_type": "original_full"}, text),
    "BartForConditionalGeneration": (SEQUENCES, translation),
    "MBartForConditionalGeneration": (SEQUENCES, translation),
    "BlenderbotForConditionalGeneration": (SEQUENCES, translation),
    "BlenderbotSmallForConditionalGeneration": (SEQUENCES, translation),
    "MarianMTModel": (SEQUENCES, translation),
    "PegasusForConditionalGeneration": (SEQUENCES, translation),
    "WhisperForConditionalGeneration": (SPEECH, speech),
    "Wav2Vec2ForCTC": (
        WIDTH | WAVES | POSITIONS | {"vocab_size": 12},
        lambda seed: {"input_values": helpers.normal(seed, 2, 120)},
    ),
    "ViTForImageClassification": (IMAGE, image),
    "BeitForImageClassification": (IMAGE | {"use_relative_position_bias": True}, image),
    "Dinov2ForImageClassification": (IMAGE | {"mlp_ratio": 1}, image),
    "ResNetForImageClassification": (STAGES | {"layer_type": "bottleneck"}, image),
    "RegNetForImageClassification": (STAGES | {"groups_width": 8}, image),
    "CLIPModel": (
        {"text_config": TEXT | {"eos_token_id": 2}, "vision_config": IMAGE, "projection_dim": 16},
        lambda seed: text(seed) | image(seed),
    ),
}
SHARED = {"AlbertForMaskedLM": "albert_layer_groups"}  # one layer, run again and again


def build(name, **settings):
    """A model of its class and its parameters, without the time its initialisers take."""
    kind = getattr(transformers, f"Flax{name}")
    fields, batch = MODELS[name]
    model = kind(kind.config_class(**fields), _do_init=False, **settings)
    return model, helpers.random_like(dict(model.params_shape_tree)), [batch(seed) for seed in range(2)]


def as_function(model):
    return lambda params, **batch: model(**batch, params=params)


def kernels_of(name, params):
    """What Flax layers call a kernel, but for those that are shared."""
    shared = SHARED.get(name, "none of them")
    return {path for path in helpers.matrices(params) if path.endswith("/kernel") and shared not in path}


def as_case(name, model, params, batches):
    run = lambda params, batch: model(**batch, params=params)
    return helpers.Case(as_function(model), {"params": params}, params, run, batches, kernels_of(name, params))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_quantized_whole(name):
    model, params, batches = build(name)
    out = helpers.check(as_case(name, model, params, batches))
    for path, reason in out.skipped.items():
        assert (name in SHARED and path.endswith("kernel")) == reason.startswith("shared"), path
        assert not path.endswith("embedding") or "an embedding" in reason or "gather" in reason, path


def test_the_module_itself_is_quantized_with_its_state():
    """The Linen module inside the class, with BatchNorm's state beside its parameters."""
    model, variables, _ = build("ResNetForImageClassification")
    batches = [helpers.normal(seed, 3, 16, 16, 3) for seed in range(2)]
    kwargs = {"deterministic": True, "return_dict": False}
    out = helpers.check(helpers.linen_case(model.module, variables, kwargs, batches))
    before, after = (jax.tree.leaves(tree["batch_stats"]) for tree in (variables, out.variables))
    assert all(old is new for old, new in zip(before, after, strict=True))


def test_the_recommended_rules():
    model, params, batches = build("BertForMaskedLM")
    case = as_case("BertForMaskedLM", model, params, batches)
    assert helpers.check(case, 8).output_error < helpers.check(case, jpfq.paper.rtn(bits=8)).output_error


def test_padding_is_as_if_it_were_not_there():
    """Sequences padded under an attention mask, which weighs the rows too, give the codes of sequences cut short."""
    model, params, batches = build("BertForMaskedLM")
    mask = jnp.ones((3, 8), int).at[:, 6:].set(0)
    padded = [jpfq.Weighted(batch | {"attention_mask": mask}, mask) for batch in batches]
    short = [{"input_ids": batch["input_ids"][:, :6]} for batch in batches]
    one, two = (jpfq.quantize(as_function(model), data, zoo.plain(bits=8), params=params) for data in (padded, short))
    for path, tensor in one.tensors.items():
        assert np.mean(np.asarray(tensor.codes) == np.asarray(two.tensors[path].codes)) > 0.999, path


def test_a_model_of_seven_billion_weights_is_planned_from_its_shapes():
    model = transformers.FlaxLlamaForCausalLM(transformers.LlamaConfig(), _do_init=False)
    params = dict(model.params_shape_tree)
    batch = {"input_ids": jax.ShapeDtypeStruct((1, 512), jnp.int32)}
    plan = jpfq.plan(as_function(model), batch, 4, params=params, batches=128)
    assert {line.path for line in plan.lines} == kernels_of("LlamaForCausalLM", params)
    assert set(plan.skipped) == {"model/embed_tokens/embedding"}

"""The Flax models of transformers: every class that runs with today's Flax, tiny and with random weights."""

import functools

import jax
import pytest

from tests.network import zoo
from tests.packages import helpers

transformers = pytest.importorskip("transformers", reason="transformers is not installed (pip install 'transformers<5')")
if not hasattr(transformers, "FlaxBertForMaskedLM"):
    pytest.skip("this transformers has no Flax models (pip install 'transformers<5')", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs, on import and in use

WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = WIDTH | {"vocab_size": 50, "max_position_embeddings": 20}
GPT = {"vocab_size": 50, "n_positions": 20, "n_embd": 32, "n_layer": 2, "n_head": 4}
IMAGE = WIDTH | {"image_size": 16, "patch_size": 4}
STAGES = {"embedding_size": 8, "hidden_sizes": [16, 24], "depths": [1, 1]}
SIDES = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("attention_heads", 4), ("ffn_dim", 48))}
BOTH = SIDES | {"vocab_size": 50, "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "pad_token_id": 1}
SEQUENCES = BOTH | {"max_position_embeddings": 20}
SPEECH = BOTH | {
    "num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 12, "decoder_start_token_id": 2,
    "bos_token_id": 2, "eos_token_id": 2,
}  # fmt: skip
SOUND = WIDTH | {
    "vocab_size": 12, "conv_dim": [16, 16], "conv_kernel": [5, 3], "conv_stride": [3, 2], "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4, "feat_extract_norm": "layer", "do_stable_layer_norm": True,
}  # fmt: skip
PAIR = {
    "text_config": TEXT | {"eos_token_id": 2}, "vision_config": IMAGE, "projection_dim": 16
}  # fmt: skip


def text(seed):
    return {"input_ids": helpers.tokens(seed)}


def target(seed):
    return {"decoder_input_ids": helpers.tokens(seed + 99, 6)}


def pixels(seed, size=16):
    return {"pixel_values": helpers.normal(seed, 3, 3, size, size)}


MODELS = {  # class: fields of its configuration, a batch by its number, and whether its outputs use every kernel
    "GPT2LMHead": (GPT, text),
    "GPTNeoForCausalLM": (
        {"vocab_size": 50, "max_position_embeddings": 20, "hidden_size": 32, "num_layers": 2, "num_heads": 4}
        | {"attention_types": [[["global", "local"], 1]], "window_size": 4},
        text,
    ),
    "GPTJForCausalLM": (GPT | {"rotary_dim": 4}, text),
    "OPTForCausalLM": (TEXT | {"ffn_dim": 48, "word_embed_proj_dim": 24}, text),
    "LlamaForCausalLM": (TEXT | {"num_key_value_heads": 2}, text),
    "MistralForCausalLM": (TEXT | {"num_key_value_heads": 2, "sliding_window": 4}, text),
    "GemmaForCausalLM": (TEXT | {"num_key_value_heads": 1, "head_dim": 8}, text),
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
    "RoFormerForMaskedLM": (TEXT | {"embedding_size": 24}, text),
    "AlbertForMaskedLM": (TEXT | {"embedding_size": 16}, text),
    "ElectraForPreTraining": (TEXT | {"embedding_size": 24}, text),
    "DistilBertForMaskedLM": (
        {"vocab_size": 50, "max_position_embeddings": 20, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
        text,
    ),
    "BigBirdForMaskedLM": (TEXT | {"attention_type": "original_full"}, text),
    "BartForConditionalGeneration": (SEQUENCES, lambda seed: text(seed) | target(seed)),
    "MBartForConditionalGeneration": (SEQUENCES, lambda seed: text(seed) | target(seed)),
    "BlenderbotForConditionalGeneration": (SEQUENCES, lambda seed: text(seed) | target(seed)),
    "BlenderbotSmallForConditionalGeneration": (SEQUENCES, lambda seed: text(seed) | target(seed)),
    "MarianMTModel": (SEQUENCES, lambda seed: text(seed) | target(seed)),
    "PegasusForConditionalGeneration": (SEQUENCES, lambda seed: text(seed) | target(seed)),
    "WhisperForConditionalGeneration": (
        SPEECH,
        lambda seed: {"input_features": helpers.normal(seed, 3, 8, 20)} | target(seed),
    ),
    "Wav2Vec2ForCTC": (SOUND, lambda seed: {"input_values": helpers.normal(seed, 2, 120)}),
    "ViTForImageClassification": (IMAGE, pixels),
    "BeitForImageClassification": (IMAGE | {"use_relative_position_bias": True}, pixels),
    "Dinov2ForImageClassification": (IMAGE, pixels),
    "ResNetForImageClassification": (STAGES | {"layer_type": "bottleneck"}, lambda seed: pixels(seed, 32)),
    "RegNetForImageClassification": (STAGES | {"groups_width": 8}, lambda seed: pixels(seed, 32)),
    "CLIPModel": (PAIR, lambda seed: text(seed) | pixels(seed)),
}

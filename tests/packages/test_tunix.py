"""The NNX decoders of google-tunix, tiny and with random weights: einsum kernels, remat, experts, images, shared keys."""

import importlib

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jpfq
from tests.packages import helpers

pytest.importorskip("tunix", reason="needs google-tunix: see the extra 'packages'")

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs, on import and in use

SIZES = {"num_layers": 2, "embed_dim": 32, "hidden_dim": 48, "num_heads": 4, "head_dim": 8, "num_kv_heads": 2}
ROPE = SIZES | {"vocab_size": 50, "rope_theta": 10000, "norm_eps": 1e-5}
GEMMA = SIZES | {"num_embed": 50, "sliding_window_size": 4}
GEMMA1 = GEMMA | {"final_logit_softcap": 30.0, "use_post_attn_norm": True, "use_post_ffw_norm": True}
GEMMA4 = GEMMA | {"global_key_size": 16}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
PICTURE = {"image_height": 16, "image_width": 16, "patch_size": (4, 4), "soft_token_placeholder": 45}
TOWER = PICTURE | {"num_mm_tokens_per_image_prepool": 16, "num_mm_tokens_per_image": 4}
TOWER |= {"width": 32, "depth": 2, "mlp_dim": 48, "num_heads": 4}
EMBED = "embedder/input_embedding"
TABLES = {EMBED, "embedder/per_layer_input_embedding"}

MODELS = {  # name: file, class, fields of its configuration, and the matrices that stay as they are
    "llama3": ("llama3", "Llama3", ROPE | {"remat_config": "BLOCK"}, {EMBED}),
    "llama3-tied": ("llama3", "Llama3", ROPE | {"remat_config": "DECODER", "weight_tying": True}, {EMBED}),
    "qwen2": ("qwen2", "Qwen2", ROPE | {"remat_config": "BLOCK"}, {EMBED}),
    "qwen3": ("qwen3", "Qwen3", ROPE, {EMBED}),
    "qwen3-experts": ("qwen3", "Qwen3", ROPE | EXPERTS | {"remat_config": "DECODER"}, {EMBED}),
    "gemma": ("gemma", "Gemma", GEMMA1 | {"attention_types": ("GLOBAL", "LOCAL_SLIDING"), "num_kv_heads": 4}, {EMBED}),
    "gemma3": ("gemma3", "Gemma3", GEMMA | {"param_dtype": jnp.float32, "remat_config": "BLOCK"}, {EMBED}),
    "gemma3-images": (
        "gemma3",
        "Gemma3",
        GEMMA | {"param_dtype": jnp.float32, "vision_config": TOWER},
        {EMBED, "vision_encoder/siglip_encoder/pos_embedding"},
    ),
    "gemma4": (
        "gemma4",
        "Gemma4",
        GEMMA4 | {"attention_pattern": ("LOCAL_SLIDING", "GLOBAL"), "k_eq_v_global": True, "num_global_kv_heads": 1},
        {EMBED},
    ),
    "gemma4-shared": (  # half the layers take the keys of others, and a kernel is scaled on its way
        "gemma4",
        "Gemma4",
        GEMMA4
        | {"attention_pattern": ("LOCAL_SLIDING", "GLOBAL"), "num_layers": 4, "frac_shared_layers": 0.5}
        | {"per_layer_input_dim": 8, "remat_config": "DECODER"},
        TABLES | {"layers/2/attn/kv_einsum/w", "layers/3/attn/kv_einsum/w"},
    ),
    "gemma4-experts": (  # by ragged products
        "gemma4",
        "Gemma4",
        GEMMA4 | EXPERTS | {"attention_pattern": ("LOCAL_SLIDING", "GLOBAL"), "enable_moe": True, "expert_dim": 48},
        {EMBED} | {f"layers/{i}/moe/{name}" for i in (0, 1) for name in ("gating_einsum", "linear")},
    ),
}
REASONS = {
    EMBED: "an embedding",
    "embedder/per_layer_input_embedding": "gather",
    "vision_encoder/siglip_encoder/pos_embedding": "add",
    "kv_einsum/w": "not used by the outputs",
    "moe/gating_einsum": "ragged_dot",
    "moe/linear": "ragged_dot",
}


def configured(file, kind, fields):
    """A function that makes the model of a configuration, whose enumerations are given by name."""
    module = importlib.import_module(f"tunix.models.{file}.model")
    fields = dict(fields)
    if "remat_config" in fields:
        fields["remat_config"] = module.RematConfig[fields["remat_config"]]
    for name in ("attention_types", "attention_pattern"):
        if name in fields:
            fields[name] = tuple(module.AttentionType[kind] for kind in fields[name])
    if "vision_config" in fields:
        fields["vision_config"] = module.vision.SigLIPConfig(**fields["vision_config"])
    return lambda: getattr(module, kind)(module.ModelConfig(**fields), rngs=nnx.Rngs(0))


def batch(seed, images):
    """Tokens, positions, no cache and a causal mask; where there are images, each stands for four tokens."""
    length = 10 if images else 8
    positions = jnp.broadcast_to(jnp.arange(length), (3, length))
    mask = jnp.broadcast_to(jnp.tril(jnp.ones((length, length), bool)), (3, length, length))
    if not images:
        return helpers.tokens(seed), positions, None, mask
    tokens = helpers.tokens(seed, length, 40).at[:, 2:6].set(PICTURE["soft_token_placeholder"])
    pixels = helpers.normal(seed, 3, 1, 16, 16, 3)
    return {"last_tokens": tokens, "positions": positions, "attention_mask": mask, "images": pixels}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_quantized_whole(name):
    file, kind, fields, left = MODELS[name]
    model = helpers.filled(configured(file, kind, fields))
    batches = [batch(seed, "vision_config" in fields) for seed in range(2)]
    out = helpers.check(helpers.nnx_case(model, batches, left))
    for path in left:
        (expected,) = (reason for end, reason in REASONS.items() if path.endswith(end))
        assert expected in out.skipped[path]


def test_a_model_of_eight_billion_weights_is_planned_from_its_shapes():
    from tunix.models.llama3.model import Llama3, ModelConfig

    model = nnx.eval_shape(lambda: Llama3(ModelConfig.llama3p1_8b(), rngs=nnx.Rngs(0)))
    number = jax.ShapeDtypeStruct((1, 512), jnp.int32)
    plan = jpfq.plan(model, (number, number, None, jax.ShapeDtypeStruct((1, 512, 512), bool)), 4, batches=128)
    assert {line.path for line in plan.lines} == helpers.matrices(nnx.state(model, nnx.Param)) - {EMBED}
    assert set(plan.skipped) == {EMBED}

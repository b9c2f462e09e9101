"""Decoders with few random weights, and what tests write them as."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jpfq import hub
from jpfq.hub.decoder import tensors_of

SIZES = {
    "vocab_size": 48,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,  # which is not hidden_size / num_attention_heads
    "max_position_embeddings": 64,
    "rope_theta": 100.0,
}
LLAMA = hub.Config(**SIZES)
LLAMA_BIASED = dataclasses.replace(LLAMA, tie_word_embeddings=False, qkv_bias=True, o_bias=True, mlp_bias=True)
QWEN2 = dataclasses.replace(LLAMA, architecture="qwen2", qkv_bias=True)
QWEN3 = dataclasses.replace(LLAMA, architecture="qwen3", qk_norm=True, tie_word_embeddings=False, rms_norm_eps=1e-3)
LINEAR = dataclasses.replace(LLAMA, rope_factors=(4.0,) * 4)
CONFIGS = {"llama": LLAMA, "biased": LLAMA_BIASED, "qwen2": QWEN2, "qwen3": QWEN3, "linear": LINEAR}


def decoder(config, dtype=jnp.float32):
    """Random weights everywhere, norms and biases too."""
    model = hub.Decoder(config, nnx.Rngs(0), dtype)
    rng = np.random.default_rng(0)
    state = nnx.state(model, nnx.Param)
    flat = [
        (path, leaf.replace(jnp.asarray(_drawn(rng, leaf.shape), dtype))) for path, leaf in nnx.to_flat_state(state)
    ]
    nnx.update(model, nnx.from_flat_state(flat))
    return model


def weights(model):
    """By Hugging Face's names, in float64."""
    return {name: np.float64(x) for name, x in tensors_of(model).items()}


def tokens(positions, batch=None, seed=1):
    shape = positions if batch is None else (batch, positions)
    return np.random.default_rng(seed).integers(0, SIZES["vocab_size"], shape)


def _drawn(rng, shape):
    x = rng.standard_normal(shape)
    return x / np.sqrt(shape[0]) if len(shape) == 2 else 1 + 0.3 * x

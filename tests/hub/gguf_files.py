"""GGUF files with random weights, as llama.cpp lays them out."""

import gguf
import numpy as np

from jpfq.hub.decoder import tensors_of

NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTSIDE = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
OUTSIDE |= {"lm_head.weight": "output.weight"}


def named(name):
    """llama.cpp's name of a tensor."""
    if name in OUTSIDE:
        return OUTSIDE[name]
    _, _, number, rest = name.split(".", 3)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{number}.{NAMES[part]}.{kind}"


def interleaved(x, heads):
    """Rows (out, ..) with i and i + d / 2 of each head side by side: llama.cpp turns neighbours. Row by row."""
    d, out = len(x) // heads, np.empty_like(x)
    for h in range(heads):
        for i in range(d // 2):
            out[h * d + 2 * i], out[h * d + 2 * i + 1] = x[h * d + i], x[h * d + i + d // 2]
    return out


def write(path, model, kinds=None, keys=None, words=None):
    """A decoder as a GGUF file.

    kinds: types of tensors by name, else float32. keys: more keys, or others. words: (tokens, types, merges, cut) of a
    tokenizer.
    """
    c = model.config
    writer = gguf.GGUFWriter(path, c.architecture)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_key_length(c.head_dim)
    writer.add_rope_dimension_count(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    for key, value in (keys or {}).items():
        add = {str: writer.add_string, float: writer.add_float32, int: writer.add_uint32}[type(value)]
        add(f"{c.architecture}.{key}", value)
    if words is not None:
        tokens, types, merges, cut = words
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(cut)
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_merges(merges)
    factors = c.rope_factors
    if factors is not None and len(set(factors)) > 1:
        writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))
    for name, x in tensors_of(model).items():
        ours = named(name)
        heads = {"attn_q": c.num_attention_heads, "attn_k": c.num_key_value_heads}.get(ours.split(".")[-2])
        if c.architecture == "llama" and heads:
            x = interleaved(x, heads)
        kind = (kinds or {}).get(ours, gguf.GGMLQuantizationType.F32)
        packed = gguf.quants.quantize(x, kind)
        writer.add_tensor(ours, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

"""A decoder of the Llama family in NumPy, one number after the other where that is clearer; weights by Hugging Face's names.

Matrices are (out, in). Tokens are (position,): one sequence at a time.
"""

import numpy as np


def rms_norm(x, weight, eps):
    """Rows divided by the root of their mean square, times a weight for each coordinate."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def rotary(x, theta, factors=None):
    """(position, head, coordinate), where pair (i, i + d / 2) turns by position * theta ** (-2 i / d) / factor_i."""
    positions, _, d = x.shape
    out = np.empty_like(x)
    for p in range(positions):
        for i in range(d // 2):
            angle = p * theta ** (-2 * i / d) / (1 if factors is None else factors[i])
            z = (x[p, :, i] + 1j * x[p, :, i + d // 2]) * np.exp(1j * angle)
            out[p, :, i], out[p, :, i + d // 2] = z.real, z.imag
    return out


def linear(w, name, x):
    """x W^T, and a bias where there is one."""
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)


def attention(w, name, x, c):
    """Each position looks at itself and those before; query head h at head h // (heads / kv_heads) of keys and values."""
    positions, d = len(x), c.head_dim
    q, k, v = (linear(w, f"{name}.{part}_proj", x).reshape(positions, -1, d) for part in "qkv")
    if c.qk_norm:
        q = rms_norm(q, w[f"{name}.q_norm.weight"], c.rms_norm_eps)
        k = rms_norm(k, w[f"{name}.k_norm.weight"], c.rms_norm_eps)
    q, k = (rotary(y, c.rope_theta, c.rope_factors) for y in (q, k))
    out = np.empty_like(q)
    for h in range(c.num_attention_heads):
        g = h // (c.num_attention_heads // c.num_key_value_heads)
        for p in range(positions):
            scores = k[: p + 1, g] @ q[p, h] / np.sqrt(d)
            weights = np.exp(scores - scores.max())
            out[p, h] = weights / weights.sum() @ v[: p + 1, g]
    return linear(w, f"{name}.o_proj", out.reshape(positions, -1))


def mlp(w, name, x):
    """SwiGLU."""
    gate = linear(w, f"{name}.gate_proj", x)
    return linear(w, f"{name}.down_proj", gate / (1 + np.exp(-gate)) * linear(w, f"{name}.up_proj", x))


def forward(w, tokens, c):
    """The residual stream (position, coordinate) before and after each block, and the logits (position, vocabulary)."""
    x = w["model.embed_tokens.weight"][tokens]
    streams = [x]
    for i in range(c.num_hidden_layers):
        name = f"model.layers.{i}"
        x = x + attention(w, f"{name}.self_attn", rms_norm(x, w[f"{name}.input_layernorm.weight"], c.rms_norm_eps), c)
        x = x + mlp(w, f"{name}.mlp", rms_norm(x, w[f"{name}.post_attention_layernorm.weight"], c.rms_norm_eps))
        streams.append(x)
    head = "model.embed_tokens.weight" if c.tie_word_embeddings else "lm_head.weight"
    return streams, rms_norm(x, w["model.norm.weight"], c.rms_norm_eps) @ w[head].T


def perplexity(logits, tokens):
    """exp of the mean of -log p of each token but the first, of logits (position, vocabulary)."""
    lost = []
    for row, token in zip(logits[:-1], tokens[1:], strict=True):
        p = np.exp(row - row.max())
        lost.append(-np.log(p[token] / p.sum()))
    return np.exp(np.mean(lost))

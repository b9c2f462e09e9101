"""A decoder of the Llama family in Flax NNX, with Hugging Face's names for its parts."""

import functools
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .config import Config

LEAVES = {"kernel": "weight", "scale": "weight", "embedding": "weight", "bias": "bias"}  # Flax's names, and theirs


class Attention(nnx.Module):
    """Causal attention with rotary positions, where groups of queries share keys and values."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        size, width = config.head_dim, config.hidden_size
        heads, kv_heads = config.num_attention_heads * size, config.num_key_value_heads * size
        self.size = size
        self.q_proj = _linear(width, heads, config.qkv_bias, rngs, dtype)
        self.k_proj = _linear(width, kv_heads, config.qkv_bias, rngs, dtype)
        self.v_proj = _linear(width, kv_heads, config.qkv_bias, rngs, dtype)
        self.o_proj = _linear(heads, width, config.o_bias, rngs, dtype)
        self.q_norm = _norm(size, config, rngs, dtype) if config.qk_norm else None
        self.k_norm = _norm(size, config, rngs, dtype) if config.qk_norm else None

    def __call__(self, x: jax.Array, turn: tuple[jax.Array, jax.Array]) -> jax.Array:
        split = lambda y: y.reshape(*x.shape[:2], -1, self.size)
        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return self.o_proj(attended(turned(q, turn), turned(k, turn), v).reshape(*x.shape[:2], -1))


class MLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        width, hidden, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = _linear(width, hidden, bias, rngs, dtype)
        self.up_proj = _linear(width, hidden, bias, rngs, dtype)
        self.down_proj = _linear(hidden, width, bias, rngs, dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    """Attention, then the perceptron, each behind a norm and beside a shortcut."""

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        self.input_layernorm = _norm(config.hidden_size, config, rngs, dtype)
        self.self_attn = Attention(config, rngs, dtype)
        self.post_attention_layernorm = _norm(config.hidden_size, config, rngs, dtype)
        self.mlp = MLP(config, rngs, dtype)

    def __call__(self, x: jax.Array, turn: tuple[jax.Array, jax.Array]) -> jax.Array:
        x = x + self.self_attn(self.input_layernorm(x), turn)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nnx.Module):
    """A language model: logits (batch, position, vocabulary) of tokens (batch, position), integers.

    Kernels lie at paths such as "layers/0/self_attn/q_proj/kernel". With random weights:

    Args:
        config: its sizes and switches.
        rngs: from where its weights are drawn.
        dtype: of its parameters, and of what it computes; norms and attention weights take float32 at least.

    Raises:
        ValueError: on a call with more positions than the config has.

    Examples:
        >>> from flax import nnx
        >>> config = jpfq.hub.Config(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...                          num_attention_heads=4, num_key_value_heads=2, head_dim=8)
        >>> decoder = jpfq.hub.Decoder(config, nnx.Rngs(0))
        >>> decoder(jnp.zeros((1, 16), int)).shape
        (1, 16, 64)
    """

    def __init__(self, config: Config, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        self.config = config
        self.embed_tokens = nnx.Embed(config.vocab_size, config.hidden_size, param_dtype=dtype, rngs=rngs)
        self.layers = nnx.List([Block(config, rngs, dtype) for _ in range(config.num_hidden_layers)])
        self.norm = _norm(config.hidden_size, config, rngs, dtype)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else _linear(config.hidden_size, config.vocab_size, False, rngs, dtype)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.embed_tokens(tokens)
        turn = self.turn(tokens.shape[1], x.dtype)
        for layer in self.layers:
            x = layer(x, turn)
        x = self.norm(x)
        return self.embed_tokens.attend(x) if self.lm_head is None else self.lm_head(x)

    def turn(self, positions: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """Cosine and sine (position, 1, head_dim / 2) of the angles of so many positions."""
        if positions > self.config.max_position_embeddings:
            raise ValueError(
                f"The model has {self.config.max_position_embeddings} positions; got {positions}. Cut the tokens shorter."
            )
        angles = np.arange(positions)[:, None, None] * np.array(self.config.frequencies)
        return jnp.asarray(np.cos(angles), dtype), jnp.asarray(np.sin(angles), dtype)


def attended(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """(batch, position, head, coordinate): means of the values so far, weighted by softmax(q k / sqrt(head_dim)).

    Consecutive heads of q share a head of k and v. Unlike that of JAX, the softmax of float64 is in float64.
    """
    batch, positions, heads, size = q.shape
    q = q.reshape(batch, positions, k.shape[2], -1, size)
    scores = jnp.einsum("bpgrd,btgd->bgrpt", q, k) / np.sqrt(size).astype(q.dtype)
    scores = scores.astype(jnp.promote_types(q.dtype, jnp.float32))
    scores = jnp.where(jnp.tri(positions, dtype=bool)[None, None, None], scores, -jnp.inf)
    return jnp.einsum("bgrpt,btgd->bpgrd", jax.nn.softmax(scores).astype(v.dtype), v).reshape(
        batch, positions, heads, size
    )


def turned(x: jax.Array, turn: tuple[jax.Array, jax.Array]) -> jax.Array:
    """(batch, position, head, coordinate) with coordinates i and i + head_dim / 2 turned as a pair."""
    cos, sin = (y[None] for y in turn)
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def filled(config: Config, tensors: Iterable[tuple[str, Any]], dtype: Any) -> Decoder:
    """A decoder with weights given by Hugging Face's names: matrices (out, in), one at a time.

    Raises:
        ValueError: where a tensor is missing, or there is one too many, or one is of another shape.
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0), dtype)))
    leaves = {name_of(path): (path, leaf) for path, leaf in nnx.to_flat_state(state)}
    made, unknown = {}, []
    for name, tensor in tensors:
        if name not in leaves:
            unknown.append(name)
            continue
        path, leaf = leaves[name]
        value = tensor.T if path[-1] == "kernel" else tensor
        if value.shape != leaf.shape:
            wanted = leaf.shape[::-1] if path[-1] == "kernel" else leaf.shape
            raise ValueError(f"The tensor {name} has shape {tensor.shape}, and the config asks for {wanted}.")
        made[path] = leaf.replace(jnp.asarray(value, dtype))
    unknown = [name for name in unknown if not (name == "lm_head.weight" and config.tie_word_embeddings)]
    missing = [name for name, (path, _) in leaves.items() if path not in made]
    for names, what in ((missing, "lacks"), (unknown, "has, and the decoder here has no place for,")):
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            raise ValueError(
                f"The file {what} the tensors {', '.join(names[:4])}{more}. Is it a {config.architecture}?"
            )
    return nnx.merge(graph, nnx.from_flat_state(made))


def tensors_of(model: Decoder) -> dict[str, np.ndarray]:
    """The parameters by Hugging Face's names, matrices (out, in): the inverse of `filled`."""
    flat = ((path, np.asarray(leaf[...])) for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)))
    return {name_of(path): np.ascontiguousarray(x.T if path[-1] == "kernel" else x) for path, x in flat}


def name_of(path: tuple) -> str:
    """Hugging Face's name of a parameter at a path of ours."""
    name = ".".join([*map(str, path[:-1]), LEAVES[path[-1]]])
    return name if path[0] == "lm_head" else f"model.{name}"


def logits(model: Decoder, tokens: jax.Array) -> jax.Array:
    """The model's outputs, compiled once for all weights; unlike by `nnx.jit` no copy of them is made."""
    return _logits(*nnx.split(model), tokens)


@functools.partial(jax.jit, static_argnums=0)
def _logits(graph, state, tokens):
    return nnx.merge(graph, state)(tokens)


def _linear(inputs: int, outputs: int, bias: bool, rngs: nnx.Rngs, dtype: Any) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, use_bias=bias, param_dtype=dtype, rngs=rngs)


def _norm(size: int, config: Config, rngs: nnx.Rngs, dtype: Any) -> nnx.RMSNorm:
    return nnx.RMSNorm(size, epsilon=config.rms_norm_eps, param_dtype=dtype, use_fast_variance=False, rngs=rngs)

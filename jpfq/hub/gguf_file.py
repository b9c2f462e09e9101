"""A GGUF file: its config, its tensors dequantized and by Hugging Face's names, and what its tokenizer is made of."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .config import ARCHITECTURES, KNOWN, Config

NAMES = {  # of llama.cpp, and of Hugging Face
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
FACTORS = "rope_freqs.weight"


class GGUFFile:
    """A file that is open for reading; tensors are dequantized one at a time."""

    def __init__(self, path: Path):
        try:
            import gguf
        except ImportError as error:
            raise ValueError(
                f"{path} is read by the package gguf, which is missing: pip install 'jpfq[hub]'."
            ) from error
        try:
            reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError) as error:
            raise ValueError(f"{path} is no GGUF file that can be read: {error}.") from error
        self._dequantize = gguf.quants.dequantize
        self._fields = reader.fields
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._path = path

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, or the default."""
        return self._fields[key].contents() if key in self._fields else default

    def config(self) -> Config:
        """The config, of the file's keys and of which tensors there are.

        Raises:
            ValueError: for an architecture that is not known, or a switch that our decoder does not have.
        """
        kind = self.get("general.architecture")
        if kind not in ARCHITECTURES:
            raise ValueError(f"{self._path} holds the architecture {kind}, which is not known. Known are {KNOWN}.")
        get = lambda key, default=None: self.get(f"{kind}.{key}", default)
        if get("expert_count", 0):
            raise ValueError(f"{self._path} holds {get('expert_count')} experts, which are not known here.")
        heads, width = get("attention.head_count"), get("embedding_length")
        size = get("attention.key_length") or width // heads
        if get("rope.dimension_count", size) != size:
            raise ValueError(
                f"{self._path} turns {get('rope.dimension_count')} of the {size} coordinates of a head, not known here."
            )
        bias = lambda *names: any(f"blk.0.{name}.bias" in self._tensors for name in names)
        return Config(
            vocab_size=int(self._tensors["token_embd.weight"].shape[1]),
            hidden_size=width,
            intermediate_size=get("feed_forward_length"),
            num_hidden_layers=get("block_count"),
            num_attention_heads=heads,
            num_key_value_heads=get("attention.head_count_kv", heads),
            head_dim=size,
            max_position_embeddings=get("context_length"),
            rms_norm_eps=_short(get("attention.layer_norm_rms_epsilon")),
            rope_theta=_short(get("rope.freq_base", 10_000.0)),
            rope_factors=self._factors(get, size),
            tie_word_embeddings="output.weight" not in self._tensors,
            qkv_bias=bias("attn_q"),
            o_bias=bias("attn_output"),
            mlp_bias=bias("ffn_gate", "ffn_up", "ffn_down"),
            qk_norm="blk.0.attn_q_norm.weight" in self._tensors,
            architecture=kind,
        )

    def tensors(self, config: Config) -> Iterator[tuple[str, np.ndarray]]:
        """Names and arrays, matrices (out, in), as Hugging Face has them."""
        for name, tensor in self._tensors.items():
            if name == FACTORS:
                continue
            try:
                array = self._dequantize(tensor.data, tensor.tensor_type)
            except NotImplementedError as error:
                raise ValueError(f"{self._path}: the tensor {name} cannot be dequantized by gguf: {error}.") from error
            heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
            part = name.split(".")[-2]
            if config.architecture == "llama" and part in heads:
                array = unpermuted(array, heads[part])
            yield hugging_face(name), array

    def _factors(self, get, size):
        if FACTORS in self._tensors:
            tensor = self._tensors[FACTORS]
            return tuple(map(float, self._dequantize(tensor.data, tensor.tensor_type)))
        kind = get("rope.scaling.type", "none")
        if kind not in ("none", "linear"):
            raise ValueError(
                f"{self._path} scales rotary positions by {kind!r}. Known are none, linear, and {FACTORS}."
            )
        return None if kind == "none" else (float(get("rope.scaling.factor")),) * (size // 2)


def hugging_face(name: str) -> str:
    """Hugging Face's name of a tensor; the same name where there is none."""
    inside = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if inside and inside[2] in NAMES:
        return f"model.layers.{inside[1]}.{NAMES[inside[2]]}.{inside[3]}"
    part, _, kind = name.rpartition(".")
    return f"{OUTSIDE[part]}.{kind}" if part in OUTSIDE else name


def unpermuted(x: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys (out, ..) in Hugging Face's order.

    In a Llama of llama.cpp coordinates 2 i and 2 i + 1 of a head are turned as a pair, here i and i + head_dim / 2 are.
    """
    return x.reshape(heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def _short(x: float) -> float:
    """The shortest decimal number that is the same in float32, such as 1e-05 for 9.99999974e-06."""
    return float(str(np.float32(x)))

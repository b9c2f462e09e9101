"""The sizes and switches of a decoder, as config.json of a Hugging Face folder names them."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

ARCHITECTURES = {  # ours, and the class that config.json names
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
KNOWN = ", ".join(f"{name} ({cls})" for name, cls in ARCHITECTURES.items())


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and switches of a decoder of the Llama family; the names are those of Hugging Face's config.json.

    Args:
        vocab_size: tokens.
        hidden_size: width of the residual stream.
        intermediate_size: width of the gated perceptron.
        num_hidden_layers: blocks.
        num_attention_heads: heads of the queries.
        num_key_value_heads: heads of keys and values, each of which serves as many queries.
        head_dim: width of a head, even.
        max_position_embeddings: the longest sequence.
        rms_norm_eps: what RMSNorm adds to the mean square.
        rope_theta: base of the rotary frequencies, rope_theta ** (-2 i / head_dim).
        rope_factors: what each frequency is divided by, head_dim / 2 numbers; None where nothing is scaled.
        tie_word_embeddings: whether the embedding is the output matrix too.
        qkv_bias: whether queries, keys and values have biases, as in Qwen2.
        o_bias: whether the output of attention has a bias.
        mlp_bias: whether the perceptron has biases.
        qk_norm: whether queries and keys are normalized head by head, as in Qwen3.
        architecture: "llama", "qwen2" or "qwen3"; it is what `save` names the class by, and nothing else depends on it.

    Raises:
        ValueError: for sizes that do not fit each other.

    Examples:
        >>> config = jpfq.hub.Config(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...                          num_attention_heads=4, num_key_value_heads=2, head_dim=8)
        >>> config.frequencies[0]
        1.0
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_factors: tuple[float, ...] | None = None
    tie_word_embeddings: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    architecture: str = "llama"

    def __post_init__(self):
        if self.architecture not in ARCHITECTURES:
            raise ValueError(f"{self.architecture!r} is not an architecture that is known. Known are {KNOWN}.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads is a multiple of num_key_value_heads; got {self.num_attention_heads} and "
                f"{self.num_key_value_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim is even, since positions turn pairs of coordinates; got {self.head_dim}.")
        if self.rope_factors is not None and len(self.rope_factors) != self.head_dim // 2:
            raise ValueError(f"rope_factors has head_dim / 2 = {self.head_dim // 2} numbers; got {self.rope_factors}.")

    @property
    def frequencies(self) -> tuple[float, ...]:
        """The angle by which each pair of coordinates turns from one position to the next."""
        half = self.head_dim // 2
        factors = self.rope_factors or (1.0,) * half
        return tuple(self.rope_theta ** (-i / half) / factors[i] for i in range(half))


def from_json(config: Mapping[str, Any]) -> Config:
    """The config of a Hugging Face folder.

    Raises:
        ValueError: for an architecture that is not known, or a switch that our decoder does not have.
    """
    names = config.get("architectures") or [config.get("model_type")]
    architecture = next((ours for ours, cls in ARCHITECTURES.items() if names[0] in (cls, ours)), None)
    if architecture is None:
        raise ValueError(f"config.json names the architecture {names[0]}, which is not known. Known are {KNOWN}.")
    _refuse(config)
    get, heads = config.get, config["num_attention_heads"]
    bias = bool(get("attention_bias", False))
    rope = get("rope_parameters") or {}
    theta = rope.get("rope_theta") or get("rope_theta") or 10_000.0
    head_dim = get("head_dim") or config["hidden_size"] // heads
    made = Config(
        **{name: config[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")},
        num_attention_heads=heads,
        num_key_value_heads=get("num_key_value_heads") or heads,
        head_dim=head_dim,
        max_position_embeddings=get("max_position_embeddings", 2048),
        rms_norm_eps=get("rms_norm_eps", 1e-6),
        rope_theta=float(theta),
        tie_word_embeddings=bool(get("tie_word_embeddings", False)),
        qkv_bias=bias or architecture == "qwen2",
        o_bias=bias,
        mlp_bias=bool(get("mlp_bias", False)),
        qk_norm=architecture == "qwen3",
        architecture=architecture,
    )
    return dataclasses.replace(made, rope_factors=_factors(rope or get("rope_scaling") or {}, made))


def as_json(config: Config) -> dict[str, Any]:
    """A config as config.json has it: the inverse of `from_json`.

    Raises:
        ValueError: for rotary frequencies or biases that config.json has no words for.
    """
    factors = config.rope_factors or (1.0,) * (config.head_dim // 2)
    if len(set(factors)) > 1:
        raise ValueError(f"config.json has no words for frequencies divided by factors of their own; got {factors}.")
    found = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name in _SAME}
    if factors[0] != 1:
        found["rope_scaling"] = {"rope_type": "linear", "factor": factors[0]}
    found |= {"model_type": config.architecture, "architectures": [ARCHITECTURES[config.architecture]]}
    found |= {"hidden_act": "silu", "attention_bias": config.o_bias, "dtype": "float32"}
    if from_json(found) != config:
        raise ValueError(f"A {config.architecture} has other biases or norms than this config says: {config}.")
    return found


_SAME = {f.name for f in dataclasses.fields(Config)} - {
    *("rope_factors", "qkv_bias", "o_bias", "qk_norm", "architecture"),
}


def _refuse(config):
    """Raises for switches that change what is computed, and that our decoder lacks."""
    act = config.get("hidden_act", "silu")
    rope = config.get("rope_parameters") or {}
    partial = config.get("partial_rotary_factor") or rope.get("partial_rotary_factor") or 1.0
    if act not in ("silu", "swish"):
        raise ValueError(f"config.json asks for hidden_act {act!r}, and the decoder here has silu.")
    if config.get("quantization_config"):
        raise ValueError(
            "The weights of this folder are quantized already (quantization_config): take the float model."
        )
    if config.get("use_sliding_window"):
        raise ValueError(
            "config.json asks for attention in a sliding window (use_sliding_window), which is not known here."
        )
    if partial != 1.0:
        raise ValueError(
            f"config.json turns a share of each head only (partial_rotary_factor {partial}), not known here."
        )


def _factors(rope, config):
    """The divisor of each frequency, from `rope_scaling` or `rope_parameters`; None where nothing is scaled."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind == "linear":
        return (float(rope["factor"]),) * (config.head_dim // 2)
    if kind != "llama3":
        raise ValueError(f"Rotary positions of rope_type {kind!r} are not known. Known are default, linear, llama3.")
    return tuple(_llama3(rope, 2 * math.pi / f) for f in config.frequencies)


def _llama3(rope, wavelength):
    """The factor of one frequency in Llama 3: all for long waves, none for short ones, and a blend between the two."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] / wavelength  # in the context that the model was trained in
    share = min(max((turns - low) / (high - low), 0.0), 1.0)
    return 1.0 / ((1 - share) / rope["factor"] + share)

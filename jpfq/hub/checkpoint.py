"""`load`, `save` and `perplexity`: a language model from its own files, and what it is worth."""

import dataclasses
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from . import folder, tokens
from .config import Config, as_json
from .decoder import Decoder, filled, logits, name_of, tensors_of
from .gguf_file import GGUFFile


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The return value of `load`.

    Args:
        config: sizes and switches.
        model: the network, in Flax NNX.
        tokenizer: a `tokenizers.Tokenizer`; None where the files have none that can be read.
        why: why there is no tokenizer.

    Examples:
        >>> from flax import nnx
        >>> config = jpfq.hub.Config(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...                          num_attention_heads=4, num_key_value_heads=2, head_dim=8)
        >>> checkpoint = jpfq.hub.Checkpoint(config, jpfq.hub.Decoder(config, nnx.Rngs(0)), None, "there are no files")
        >>> plan = jpfq.plan(checkpoint.model, jnp.zeros((4, 16), int), 4)
    """

    config: Config
    model: Decoder
    tokenizer: Any
    why: str = ""

    def encode(self, text: str) -> np.ndarray:
        """The tokens (tokens,) of running text, without marks of begin and end.

        Args:
            text: of any length.

        Raises:
            ValueError: where there is no tokenizer.

        Examples:
            >>> checkpoint = jpfq.hub.Checkpoint(None, None, None, "there are no files")
            >>> checkpoint.encode("hello")
            Traceback (most recent call last):
            ...
            ValueError: There is no tokenizer, since there are no files. Give tokens in place of text.
        """
        if self.tokenizer is None:
            raise ValueError(f"There is no tokenizer, since {self.why}. Give tokens in place of text.")
        return np.asarray(self.tokenizer.encode(text, add_special_tokens=False).ids, np.int32)


def load(path: str | os.PathLike, *, dtype: Any = jnp.float32) -> Checkpoint:
    """A language model from a GGUF file, or from a folder as Hugging Face has them.

    Decoders of the Llama family are known: Llama, with SmolLM and whatever else names that class, Qwen2 and Qwen3. Weights
    of a GGUF file that are quantized are dequantized. Files are read where they lie, and none is fetched.

    Args:
        path: a GGUF file, which takes the package gguf, or a folder with config.json and *.safetensors, in one file or in
            several with an index.
        dtype: of all parameters, and of what the model computes.

    Returns:
        A `Checkpoint`: config, model and tokenizer. The model goes into `jpfq.quantize` as it is.

    Raises:
        ValueError: for files that are missing, and for an architecture or a switch that is not known.

    Examples:
        >>> from flax import nnx
        >>> config = jpfq.hub.Config(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...                          num_attention_heads=4, num_key_value_heads=2, head_dim=8)
        >>> jpfq.hub.save(jpfq.hub.Decoder(config, nnx.Rngs(0)), "tiny")  # in real life: a folder that you have
        >>> model = jpfq.hub.load("tiny").model
        >>> windows = jpfq.hub.windows(jax.random.randint(key, (1024,), 0, 64), length=32)
        >>> result = jpfq.quantize(model, windows, 4)
        >>> result.model(windows[0]).shape
        (8, 32, 64)
    """
    path = Path(path)
    if path.is_dir():
        config = folder.config_of(path)
        tensors, (tokenizer, why) = folder.tensors_of(path), tokens.from_folder(path)
    elif path.is_file():
        file = GGUFFile(path)
        config = file.config()
        tensors, (tokenizer, why) = file.tensors(config), tokens.from_gguf(file)
    else:
        raise ValueError(f"There is no {path}: give a GGUF file, or a folder with config.json and *.safetensors.")
    return Checkpoint(config, filled(config, tensors, dtype), tokenizer, why)


def save(model: Decoder, path: str | os.PathLike) -> None:
    """Writes a decoder as a folder as Hugging Face has them: config.json and model.safetensors.

    The model may be a quantized one, whose weights are then written as the values of their levels. The tokenizer is not
    written: copy tokenizer.json.

    Args:
        model: a `Decoder`.
        path: a folder that is new or empty.

    Raises:
        ValueError: where the folder holds something, or the config is one that config.json has no words for.

    Examples:
        >>> from flax import nnx
        >>> config = jpfq.hub.Config(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...                          num_attention_heads=4, num_key_value_heads=2, head_dim=8)
        >>> jpfq.hub.save(jpfq.hub.Decoder(config, nnx.Rngs(0)), "saved")
        >>> jpfq.hub.load("saved").config == config
        True
    """
    folder.write(Path(path), model.config, tensors_of(model))


def export(
    quantized: Any,
    path: str | os.PathLike,
    kind: Literal["compressed-tensors", "awq"] = "compressed-tensors",
    **options: Any,
) -> Any:
    """Writes a quantized decoder as a folder that vLLM, SGLang and transformers load.

    With `like`, the folder that the model was loaded from, config and tokenizer are those of it. Otherwise the tokenizer is
    not written: copy tokenizer.json.

    Args:
        quantized: what `jpfq.quantize` made of a `Decoder`.
        path: a new folder.
        kind: the format.
        **options: as for `Quantized.export`, such as `overwrite`, and `dynamic_inputs`: vLLM on TPU loads integer weights of
            4 bits in compressed-tensors with "fp8" only. `names` and `config` are known here.

    Returns:
        By path, the reason for each quantized kernel that is written dequantized, as of `Quantized.export`.

    Raises:
        ValueError: where the model is no `Decoder`, or the folder is in use.

    Examples:
        >>> from flax import nnx
        >>> config = jpfq.hub.Config(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        ...                          num_attention_heads=4, num_key_value_heads=2, head_dim=8)
        >>> windows = jpfq.hub.windows(jax.random.randint(key, (1024,), 0, 64), length=32)
        >>> small = jpfq.quantize(jpfq.hub.Decoder(config, nnx.Rngs(0)), windows, jpfq.formats.int4(16))
        >>> jpfq.hub.export(small, "decoder-vllm")
        {}
    """
    model = getattr(quantized, "model", None)
    if not isinstance(model, Decoder):
        raise ValueError(f"export takes what jpfq.quantize made of a jpfq.hub.Decoder; got {type(quantized).__name__}.")
    given: dict[str, Any] = {"names": lambda path: name_of(tuple(path.split("/")))}
    given |= {} if options.get("like") else {"config": as_json(model.config)}
    return quantized.export(kind, path, **{**given, **options})


def perplexity(model: Decoder | Callable[[jax.Array], jax.Array], windows: Iterable[jax.Array]) -> float:
    """The perplexity of a language model: exp of the mean of -log p over all tokens but the first of each window.

    Args:
        model: a `Decoder`, or a function that turns tokens (batch, position) into logits (batch, position, vocabulary), such
            as `quantized.apply`, which quantizes activations too.
        windows: tokens (batch, position), as `windows` cuts them.

    Returns:
        The perplexity, at least 1.

    Raises:
        ValueError: where there are no windows.

    Examples:
        >>> sure = lambda tokens: jnp.zeros((*tokens.shape, 64))
        >>> round(jpfq.hub.perplexity(sure, jpfq.hub.windows(range(64), length=32)))
        64
    """
    return float(np.exp(nats(model, windows)))


def nats(model: Decoder | Callable[[jax.Array], jax.Array], windows: Iterable[jax.Array]) -> jax.Array:
    """The logarithm of the perplexity, as an array, which may be traced."""
    run = (lambda x: logits(model, x)) if isinstance(model, Decoder) else model
    parts = [_losses(run(x), x) for x in windows]
    if not parts:
        raise ValueError("There are no windows to score on.")
    return jnp.stack([part.sum() for part in parts]).sum() / sum(part.size for part in parts)


_losses = jax.jit(tokens.losses)

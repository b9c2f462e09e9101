"""Text to tokens, and tokens to windows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .gguf_file import GGUFFile

SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*" + SPACES
PATTERNS = {  # how llama.cpp names the ways of cutting text into words, and those that are a regular expression
    "llama-bpe": WORDS + r"|\p{N}{1,3}" + REST,
    "qwen2": WORDS + r"|\p{N}" + REST,
}
CONTROL, USER = 3, 4  # types of tokens in GGUF


def from_folder(folder: Path) -> tuple[Any, str]:
    """The tokenizer of a folder, or None and why there is none."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return None, f"{folder} has no tokenizer.json"
    tokenizers, why = _package()
    return (tokenizers.Tokenizer.from_file(str(path)), "") if tokenizers else (None, why)


def from_gguf(file: GGUFFile) -> tuple[Any, str]:
    """The byte-level BPE of a GGUF file, or None and why there is none."""
    get = lambda key: file.get(f"tokenizer.ggml.{key}")
    kind, cut = get("model"), get("pre")
    if kind != "gpt2":
        return None, f"the file has a tokenizer of the kind {kind}, and gpt2, which is byte-level BPE, is known"
    known = ("gpt-2", "smollm", *PATTERNS)
    if cut not in known:
        return None, f"the file cuts text into words by {cut!r}; known are {', '.join(known)}"
    tokenizers, why = _package()
    if tokenizers is None:
        return None, why
    words, kinds = get("tokens") or [], get("token_type") or []
    merges = [tuple(merge.split(" ", 1)) for merge in get("merges") or []]
    vocabulary = {word: i for i, word in enumerate(words)}
    model = tokenizers.models.BPE(vocab=vocabulary, merges=merges, ignore_merges=cut == "llama-bpe")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = _cut(tokenizers, cut)
    made.decoder = tokenizers.decoders.ByteLevel()
    if cut == "qwen2":
        made.normalizer = tokenizers.normalizers.NFC()
    of_kind = lambda wanted: [word for word, kind in zip(words, kinds) if kind == wanted]
    added = lambda word, special: tokenizers.AddedToken(word, special=special, normalized=False)
    made.add_special_tokens([added(word, True) for word in of_kind(CONTROL)])
    made.add_tokens([added(word, False) for word in of_kind(USER)])
    return made, ""


def windows(tokens: Sequence[int] | np.ndarray, length: int = 256, count: int | None = None, batch: int = 8) -> list:
    """Running tokens cut into windows, as batches to calibrate or to score on.

    Args:
        tokens: (tokens,) integers.
        length: tokens of a window.
        count: how many windows, from the beginning; all that are whole where it is None.
        batch: windows of a batch; the last batch may be smaller.

    Returns:
        Arrays (batch, length) of int32.

    Raises:
        ValueError: where there are fewer tokens than that.

    Examples:
        >>> [x.shape for x in jpfq.hub.windows(range(1000), length=64, count=12)]
        [(8, 64), (4, 64)]
    """
    tokens = np.asarray(tokens, np.int32)
    if min(length, batch, 1 if count is None else count) < 1:
        raise ValueError(f"length, count and batch are positive; got {length}, {count} and {batch}.")
    there = len(tokens) // length
    if there < (count or 1):
        raise ValueError(
            f"{count or 1} windows of {length} tokens are asked for, and there are {len(tokens):,} tokens, enough for "
            f"{there}: give more text, or fewer or shorter windows."
        )
    cut = tokens[: (count or there) * length].reshape(-1, length)
    return [jnp.asarray(cut[i : i + batch]) for i in range(0, len(cut), batch)]


def losses(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """-log p (batch, position - 1) of each token but the first, in nats, from logits of those before."""
    logits = logits[:, :-1].astype(jnp.promote_types(logits.dtype, jnp.float32))
    chosen = jnp.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
    return jax.nn.logsumexp(logits, -1) - chosen


def _cut(tokenizers, name):
    """The part that cuts text into words, and writes their bytes as letters."""
    pre = tokenizers.pre_tokenizers
    if name in PATTERNS:
        split = pre.Split(tokenizers.Regex(PATTERNS[name]), "isolated")
        return pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])
    words = pre.ByteLevel(add_prefix_space=False, use_regex=True)
    return pre.Sequence([pre.Digits(individual_digits=True), words]) if name == "smollm" else words


def _package():
    """The package tokenizers, or None and why."""
    try:
        import tokenizers
    except ImportError:
        return None, "the package tokenizers is missing: pip install 'jpfq[hub]'"
    return tokenizers, ""

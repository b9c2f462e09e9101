"""Codes near their entropy: a range coder over the share that each code has in a kernel (Martin, 1979).

The coder is that of `constriction`, an optional package: pip install 'jpfq[entropy]'.
"""

from typing import Any

import numpy as np

MAX_LEVELS = 2**12  # a table of counts goes with every kernel
PER_WORD = 2**12  # codes to a word at most: what a file declares stays within a multiple of what it holds


def encode(codes: np.ndarray, levels: int) -> np.ndarray:
    """Codes 0 .. levels - 1 as uint32: how often each occurs, then the coded stream."""
    counts = np.bincount(codes, minlength=levels)
    encoder = _coder().stream.queue.RangeEncoder()
    encoder.encode(codes.astype(np.int32), _model(counts))
    stream = encoder.get_compressed()
    padding = max(0, -(-len(codes) // PER_WORD) - len(stream))  # the decoder reads no further than it needs
    return np.concatenate([counts.astype(np.uint32), stream, np.zeros(padding, np.uint32)])


def decode(words: np.ndarray, levels: int, count: int) -> np.ndarray:
    """The inverse of `encode`, for so many codes. Raises ValueError for words that `encode` does not make."""
    counts, stream = words[:levels].astype(np.int64), words[levels:]
    if levels > MAX_LEVELS or counts.sum() != count or count == 0 or count > PER_WORD * len(stream):
        raise ValueError(f"{len(words)} words do not hold {count} codes of {levels} levels.")
    try:
        codes = _coder().stream.queue.RangeDecoder(stream).decode(_model(counts), count)
    except AssertionError as error:  # which is how the coder says so
        raise ValueError(f"The coded stream is damaged: {error}") from error
    if (np.bincount(codes, minlength=levels) != counts).any():
        raise ValueError("The coded stream does not hold the codes that it counts.")
    return codes


def _model(counts):
    shares = counts / counts.sum()
    return _coder().stream.model.Categorical(np.append(shares, 0.0) if len(shares) < 2 else shares, perfect=False)


def _coder() -> Any:
    try:
        import constriction
    except ImportError as error:
        raise ValueError("Entropy-coded results need the package constriction: pip install 'jpfq[entropy]'.") from error
    return constriction

"""The formats that `Quantized.export` writes, by name: one file each, and one line here."""

from collections.abc import Callable
from typing import Any

from ..scalar.checks import check_choice
from .awq import awq
from .compressed_tensors import compressed_tensors
from .gguf import gguf

FORMATS: dict[str, Callable[..., dict[str, str]]] = {
    "compressed-tensors": compressed_tensors,
    "awq": awq,
    "gguf": gguf,
}


def writer_of(kind: Any) -> Callable[..., dict[str, str]]:
    """The function (quantized, folder, **options) that writes a format, and returns what it cannot hold, with reasons."""
    check_choice("kind", kind, tuple(FORMATS))
    return FORMATS[kind]

"""The answer of a command: text for people, and JSON for programs."""

import contextlib
import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from ...calibrate.progress import LOG

YES, NO, UNUSABLE = 0, 1, 2  # exit statuses, explained in the help of the command


class Answer(NamedTuple):
    """`text` goes to standard output, or `document` if the user asks for JSON."""

    text: str
    document: Any
    status: int = YES


def as_json(document: Any) -> str:
    """The document as JSON, where numbers that are not finite become null."""
    return json.dumps(_plain(document), indent=2, allow_nan=False)


def note(text: str) -> None:
    """Prints a message to standard error, because standard output has the answer only."""
    print(text, file=sys.stderr, flush=True)


def begun(what: str) -> None:
    """Announces something that takes a while, on a terminal."""
    if sys.stderr.isatty():
        note(what)


def ended(what: str, seconds: float) -> None:
    """Logs it once it is done, where there is no terminal."""
    if not sys.stderr.isatty():
        LOG.info(f"{what}: {seconds:.1f} s")


@contextlib.contextmanager
def log_to_stderr() -> Iterator[None]:
    """A context in which the log goes to standard error. The library itself leaves logging to its users."""
    handler, level, propagate = logging.StreamHandler(), LOG.level, LOG.propagate
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    LOG.addHandler(handler)
    try:
        yield
    finally:
        LOG.removeHandler(handler)
        LOG.setLevel(level)
        LOG.propagate = propagate


def _plain(x):
    """A value for JSON; other objects become their text."""
    if isinstance(x, Mapping):
        return {str(key): _plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(value) for value in x]
    if isinstance(x, np.generic):
        x = x.item()
    if isinstance(x, float):
        return x if math.isfinite(x) else None
    return x if x is None or isinstance(x, (bool, int)) else str(x)

"""The answer of a command: text for people, a document for programs, and the exit status."""

import contextlib
import json
import logging
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from ...calibrate.progress import LOG

YES, NO, UNUSABLE = 0, 1, 2  # exit statuses, of which the help of the command tells


class Answer(NamedTuple):
    """text goes to the standard output, or `document` in its place where the user asks for JSON."""

    text: str
    document: Any
    status: int = YES


def as_json(document: Any) -> str:
    """The document as JSON, which knows no numbers that are not finite: these become null."""
    return json.dumps(_plain(document), indent=2, allow_nan=False)


def note(text: str) -> None:
    """A word on the way, to the standard error: the standard output holds the answer only."""
    print(text, file=sys.stderr, flush=True)


def begun(what: str) -> None:
    """Likewise, of something that takes a while: where somebody watches."""
    if sys.stderr.isatty():
        note(what)


def ended(what: str, seconds: float) -> None:
    """The log has it once it is done."""
    if not sys.stderr.isatty():
        LOG.info(f"{what}: {seconds:.1f} s")


@contextlib.contextmanager
def log_to_stderr() -> Iterator[None]:
    """Lets the log through to the standard error; the library itself leaves logging to its users."""
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
    """In terms of JSON; whatever it does not know by its name."""
    if isinstance(x, Mapping):
        return {str(key): _plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_plain(value) for value in x]
    if isinstance(x, np.generic):
        x = x.item()
    if isinstance(x, float):
        return x if math.isfinite(x) else None
    return x if x is None or isinstance(x, (bool, int)) else str(x)

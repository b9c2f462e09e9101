"""Predicates for the arguments of settings, which may be Python numbers, arrays or tracers."""

from collections.abc import Callable
from typing import Any

from .grid import is_number


def is_count(x: Any, least: int = 1) -> bool:
    """True for an integer of at least `least`. Booleans are no integers here."""
    return isinstance(x, int) and not isinstance(x, bool) and x >= least


def may_be(x: Any, condition: Callable[[Any], bool]) -> bool:
    """False for a string, a boolean, or a number that fails `condition`. Tracers and arrays pass: they have no value yet."""
    return not isinstance(x, (str, bool)) and (not is_number(x) or condition(x))

"""Checks of arguments, each written once."""

from typing import Any


def check_choice(name: str, value: Any, choices: tuple) -> None:
    """Raises for a value that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} is {' or '.join(map(repr, choices))}; got {value!r}.")

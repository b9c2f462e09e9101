"""The space of a sweep: its settings, and the rules that each of them stands for."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from ..network.rules import Rule, as_rules

METRICS = ("loss", "output_error", "bits_per_weight", "nbytes")  # the entries of a record besides its setting


@dataclasses.dataclass(frozen=True, init=False)
class Space:
    """The settings of a sweep: all combinations of the given values, and the rules of each.

    Args:
        rules: a function from the values of one setting, by name, to its rules. None means `Rule(".*", **values)`.
        **axes: names with their values. An axis `seed` gives every setting its own random key, `jax.random.key(seed)`,
            and is not passed to `rules`.

    `points` lists the settings.

    Examples:
        >>> space = jpfq.Space(bits=[2, 3, 4], method=[jpfq.GPFQ(), jpfq.Qronos()])
        >>> rules = lambda bits, c: jpfq.Rule(".*", bits=bits, scale=jpfq.scale.AbsMax(c))
        >>> len(space), len(jpfq.Space(rules, bits=[2, 3], c=[0.6, 0.8, 1.0]))
        (6, 6)
    """

    rules: Callable[..., Any]
    points: tuple[dict[str, Any], ...]

    def __init__(self, rules: Callable[..., Any] | None = None, /, **axes: Iterable):
        for name, values in axes.items():
            if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
                raise ValueError(f"Space takes a list of values for each name; got {name}={values!r}.")
        columns = {name: [_plain(value) for value in values] for name, values in axes.items()}
        combined = itertools.product(*columns.values())
        self._set(rules, [dict(zip(columns, values, strict=True)) for values in combined] if axes else [])

    @classmethod
    def listed(cls, points: Iterable[Mapping[str, Any]], rules: Callable[..., Any] | None = None) -> "Space":
        """A space of the listed settings, instead of all combinations.

        Args:
            points: settings, each a dict of values by name.
            rules: the same as for `Space`.

        Examples:
            >>> scales = jpfq.scale.MinError(), jpfq.scale.AbsMax()
            >>> space = jpfq.Space.listed([{"bits": 2, "scale": scales[0]}, {"bits": 4, "scale": scales[1]}])
            >>> len(space)
            2
        """
        space = object.__new__(cls)
        space._set(rules, [{name: _plain(value) for name, value in point.items()} for point in points])
        return space

    def _set(self, rules, points):
        if not points:
            raise ValueError("The space is empty: give names and values, such as jpfq.Space(bits=[2, 3, 4]).")
        taken = sorted(set(METRICS) & set(points[0]))
        if taken or any(set(point) != set(points[0]) for point in points):
            what = f"{taken} are names of results; choose others" if taken else "all settings need the same names"
            raise ValueError(f"The names of a space cannot be used: {what}.")
        if rules is not None and not callable(rules):
            raise ValueError(f"The first argument of Space is a function from values to rules; got {rules!r}.")
        object.__setattr__(self, "rules", rules or functools.partial(Rule, ".*"))
        object.__setattr__(self, "points", tuple(points))

    def __len__(self):
        return len(self.points)

    def rules_of(self, point: Mapping[str, Any]) -> tuple[Rule, ...]:
        """The rules of one setting.

        Args:
            point: its values by name.

        Examples:
            >>> space = jpfq.Space(bits=[2, 3, 4])
            >>> space.rules_of(space.points[0])[0].bits
            2
        """
        try:
            return as_rules(self.rules(**{name: value for name, value in point.items() if name != "seed"}))
        except (ValueError, TypeError) as error:
            raise ValueError(f"The setting ({in_words(point)}) does not give rules: {error}") from error


def _plain(value):
    """A Python number instead of an array that holds one, because some settings must be static."""
    return value.item() if isinstance(value, (np.generic, np.ndarray, jax.Array)) and np.ndim(value) == 0 else value


def in_words(point: Mapping[str, Any]) -> str:
    """A setting as text."""
    return ", ".join(f"{name}={value}" for name, value in point.items())

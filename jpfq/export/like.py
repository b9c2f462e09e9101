"""The folder of a float model, whose config, tokenizer and names an export takes over: `like=`.

Which parameter a tensor of the folder is, is found by value (match.py), transposed or reshaped as it may be. Tensors that
are equal to parameters are copied, as are those that the model has not; the others are written as the model has them.
"""

import functools
import itertools
import json
import operator
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors

from . import match
from .matrix import arrangement

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
BESIDE = {".json", ".txt", ".model", ".jinja", ".tiktoken", ".py"}  # tokenizers, templates, settings and code
MOST_AXES = 4  # of parameters that are tried in all orders of their axes
EQUAL = 0.999  # correlation below which arrays are not equal
REMEDY = "Give names=, a function from the path of a parameter to the name of its tensor"


class Part(NamedTuple):
    """An array to be written: as `value` gives it, unless it is a quantized kernel that a format holds."""

    name: str
    value: Callable[[], np.ndarray]
    is_matrix: bool = False  # of a linear layer, as far as one can tell
    path: str | None = None  # of the parameter it is, if that was changed
    refused: str | None = None  # why no format holds it


class _Parameter(NamedTuple):
    path: str
    value: Callable[[], np.ndarray]  # a quantized kernel as a matrix (out, in)
    shape: tuple[int, ...]
    orders: Sequence[Any]  # of its axes; None for that which it has

    def arranged(self, shape: tuple[int, ...]) -> Iterator[tuple[np.ndarray, Any]]:
        """The parameter in the shape of a tensor, in all orders of its axes that fit it, with that order."""
        axes = range(len(self.shape))
        fit = [order for order in self.orders if _merges(tuple(self.shape[axis] for axis in order or axes), shape)]
        if fit:
            value = self.value()
            yield from (((value if order is None else value.transpose(order)).reshape(shape), order) for order in fit)

    def ordered(self, order: Any, shape: tuple[int, ...]) -> np.ndarray:
        """That of one order."""
        return next(x for x, other in self.arranged(shape) if other == order)


class Like:
    """A Hugging Face folder, whose tensors are read one at a time."""

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        path = self.folder / CONFIG
        if not path.is_file():
            raise ValueError(f"like={str(folder)!r} has no {CONFIG}: give the Hugging Face folder of the float model.")
        try:
            self.config = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is no JSON: {error}.") from error
        if "quantization_config" in self.config:
            raise ValueError(f"like={str(folder)!r} is quantized: give the folder of the float model.")
        self.files: dict[str, Path] = {}  # where each tensor lies
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.vectors: dict[str, np.ndarray] = {}
        for file in self._weights():
            with self._opened(file) as opened:
                for name in opened.keys():  # noqa: SIM118, it is no dict
                    self.files[name], self.shapes[name] = file, tuple(opened.get_slice(name).get_shape())

    def tensor(self, name: str) -> np.ndarray:
        """One of them. Vectors, which are small and many, are read once."""
        if name in self.vectors:
            return self.vectors[name]
        with self._opened(self.files[name]) as opened:
            try:
                found = opened.get_tensor(name)
            except (AttributeError, KeyError, TypeError) as error:
                raise ValueError(f"{name} of {self.folder} is of a type that NumPy has not: {error}.") from error
        if found.ndim < 2:
            self.vectors[name] = found
        return found

    def copy_beside(self, target: Path) -> None:
        """Copies what the folder holds beside config and weights."""
        for file in self.folder.iterdir():
            own = file.name == CONFIG or file.name.endswith(".index.json") or file.name.startswith(".")
            if file.is_file() and file.suffix in BESIDE and not own:
                shutil.copyfile(file, target / file.name)

    def parts(self, quantized: Any, sites: dict, names: Callable[[str], str] | None) -> Iterator[Part]:
        """All tensors, and which parameters they are.

        Raises:
            ValueError: a parameter that was changed is none of them, or may be several.
        """
        known = list(_parameters(quantized, sites))
        owned = self._by_name(known, names) if names else self._by_value(known, quantized.tensors)
        for name, shape in self.shapes.items():
            is_matrix = len(shape) == 2 and name.endswith(".weight")
            if name not in owned:
                yield Part(name, functools.partial(self.tensor, name), is_matrix)
                continue
            parameter, order = owned[name]
            as_is = order is None and parameter.shape == shape
            refused = None if as_is else f"{self.folder} holds it in shape {shape}, and not as outputs times inputs"
            yield Part(name, functools.partial(self._written, name, *owned[name]), is_matrix, parameter.path, refused)

    def _written(self, name, parameter, order):
        return np.ascontiguousarray(parameter.ordered(order, self.shapes[name]).astype(self.tensor(name).dtype))

    def _by_name(self, known, names):
        owned = {}
        for parameter in known:
            name, path = names(parameter.path), parameter.path
            if name not in self.files or name in owned:
                what = "which is taken" if name in owned else f"which {self.folder} has not"
                raise ValueError(f"names= gives {path} the name {name}, {what}.")
            found = [(_mark(x), path, order) for x, order in parameter.arranged(self.shapes[name])]
            if not found:
                raise ValueError(f"{path} is of shape {parameter.shape}, and {name}, its name, of {self.shapes[name]}.")
            best = match.nearest(name, _mark(self.tensor(name)), found, ())
            if best is None and len(parameter.shape) > 1:
                raise ValueError(f"{path} is not like {name}, the name that names= gives it, in any order of its axes.")
            owned[name] = parameter, best.how if best else None
        return owned

    def _by_value(self, known, quantized):
        marks: dict[tuple[int, ...], list] = {}
        for parameter in known:
            for shape in set(self.shapes.values()):
                found = [(_mark(x), parameter, order) for x, order in parameter.arranged(shape)]
                marks.setdefault(shape, []).extend(found)
        own = {name: _mark(self.tensor(name)) for name, shape in self.shapes.items() if shape in marks}
        equal = {}
        for name in own:
            near = [(m, p, order) for m, p, order in marks[self.shapes[name]] if p.path not in quantized]
            if same := frozenset(p.path for m, p, order in near if self._is(name, own[name], m, p, order)):
                equal[name] = same
        unchanged = self._unchanged(equal)
        changed = {p.path: p for p in known if p.path not in unchanged}
        owned, homes = {}, {next(iter(paths)): name for name, paths in equal.items() if len(paths) == 1}
        for vectors in (False, True):
            if vectors:  # whose values tell less: first by the layer that they are of
                for path, parameter in changed.items():
                    if (
                        path not in homes
                        and len(parameter.shape) == 1
                        and (name := self._beside(parameter, homes, owned))
                    ):
                        owned[name], homes[path] = (parameter, None), name
            for name in [n for n in own if n not in equal and n not in owned]:
                candidates = [
                    (m, p.path, order)
                    for m, p, order in marks[self.shapes[name]]
                    if p.path in changed and (p.path not in homes or not vectors) and (len(p.shape) == 1) == vectors
                ]
                try:
                    best = match.nearest(name, own[name], candidates, changed)
                except ValueError as error:
                    raise ValueError(f"{error} {REMEDY}.") from error
                if best and best.path in homes:
                    raise ValueError(f"{best.path} may be {homes[best.path]} or {name} of {self.folder}. {REMEDY}.")
                if best:
                    owned[name], homes[best.path] = (changed[best.path], best.how), name
        if lost := [path for path in changed if path not in homes]:
            raise ValueError(
                f"{lost[0]} is none of the tensors of {self.folder}: like= is the folder that the model was loaded from. "
                f"{REMEDY}, or where one holds several parameters, export without like=."
            )
        return owned

    def _is(self, name, own, other, parameter, order) -> bool:
        """True if a tensor is a parameter as it is, but for the type of one of them."""
        if len(self.shapes[name]) > 1 and own.any() and float(np.vdot(own, other)) < EQUAL:
            return False
        value, ours = self.tensor(name), parameter.ordered(order, self.shapes[name])
        return np.array_equal(ours.astype(value.dtype), value) or np.array_equal(value.astype(ours.dtype), ours)

    def _unchanged(self, equal) -> set[str]:
        """The parameters that are tensors of the folder as they are, by the parameters that each tensor is equal to."""
        for alike, count in Counter(equal.values()).items():
            if len(alike) > count:
                listing = ", ".join(sorted(alike))
                raise ValueError(f"{self.folder} has {count} tensors equal to {listing}: which ones changed? {REMEDY}.")
        return set().union(*equal.values())

    def _beside(self, parameter, homes, owned) -> str | None:
        """The name of a vector beside the other parameters of its layer, whose names are known."""
        parent, _, last = parameter.path.rpartition("/")
        stems = {name.rpartition(".")[0] for path, name in homes.items() if path.rpartition("/")[0] == parent}
        fit = [f"{stem}.{last}" for stem in stems if self.shapes.get(f"{stem}.{last}") == parameter.shape]
        return fit[0] if len(fit) == 1 and fit[0] not in owned else None

    def _weights(self) -> list[Path]:
        index = self.folder / INDEX
        if index.is_file():
            files = [self.folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        else:
            files = sorted(self.folder.glob("*.safetensors"))
        if not files or not all(file.is_file() for file in files):
            missing = ", ".join(file.name for file in files if not file.is_file()) or "*.safetensors"
            raise ValueError(f"like={str(self.folder)!r} lacks {missing}: give the folder of the float model.")
        return files

    def _opened(self, file) -> Any:
        try:
            return safetensors.safe_open(file, framework="np")
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{file} cannot be read: {error}.") from error


def _merges(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """True if neighbouring axes of one shape make up those of the other, such as (heads, 64) and (heads * 64,)."""
    ends = [set(itertools.accumulate((n for n in shape if n > 1), operator.mul, initial=1)) for shape in (a, b)]
    return max(ends[0]) == max(ends[1]) and (ends[0] <= ends[1] or ends[1] <= ends[0])


def _mark(x: np.ndarray) -> np.ndarray:
    """Vectors by what is not their mean, since those of norms are all near 1."""
    return match.mark(x if x.ndim > 1 else x.astype(np.float32) - x.astype(np.float32).mean())


def _parameters(quantized, sites) -> Iterator[_Parameter]:
    functional = quantized._functional
    for path, leaf, ours in zip(functional.paths, functional.leaves, functional.trainable, strict=True):
        if not ours or not jnp.issubdtype(getattr(leaf, "dtype", bool), jnp.floating):
            continue
        value, shape, orders = functools.partial(np.asarray, leaf), np.shape(leaf), [None]
        if path in quantized.tensors:
            try:
                arrange = arrangement(quantized.tensors[path], path, sites.get(path))
                shape = np.shape(arrange(np.broadcast_to(np.int8(0), shape)))
                yield _Parameter(
                    path, lambda arrange=arrange, leaf=leaf: arrange(np.asarray(leaf)), shape, [None, (1, 0)]
                )
                continue
            except ValueError:
                pass  # which no format holds as a matrix, and says why
        if 1 < len(shape) <= MOST_AXES:
            orders = [None, *itertools.permutations(range(len(shape)))][1:]
        yield _Parameter(path, value, shape, orders)

"""MODULE:FACTORY, the user's model: imports and calls it, and separates its errors from those of jpfq."""

import contextlib
import dataclasses
import difflib
import importlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ...calibrate.batches import shapes_of
from ...matrix.explicit_mesh import automatic, context
from ..compare import Subject

HELP = (
    "FACTORY is a function without arguments that returns (model, variables, batches) or (model, variables, batches, "
    "evaluate). variables: of a Linen module; the parameters of a plain function; None for NNX. evaluate(variables), or "
    "evaluate(model) for NNX, returns a number, larger is better."
)
TRACING = (jax.errors.JAXTypeError, jax.errors.JAXIndexError)  # errors of code that cannot be compiled


class ForeignError(Exception):
    """An error inside the user's code, which is its cause."""


@contextlib.contextmanager
def code_of(name: str) -> Iterator[None]:
    """A context that marks exceptions as errors of the user's code."""
    try:
        yield
    except (*TRACING, BrokenPipeError):
        raise
    except Exception as error:
        raise ForeignError(name) from error


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """The user's score, checked to be one number; its errors are marked as errors of the user's code."""

    function: Callable[[Any], Any]
    name: str

    def __call__(self, state: Any) -> Any:
        with code_of(f"evaluate, which {self.name} returns,"):
            found = self.function(state)
        if np.shape(found) != ():
            raise ValueError(
                f"evaluate of {self.name} must return one number; got an array of shape {np.shape(found)}."
            )
        return found


def add_factory(parser) -> None:
    """The argument that names a model."""
    parser.add_argument("factory", metavar="MODULE:FACTORY", help="for example mypackage.models:trained")


def check_name(name: str) -> None:
    """Raises if a name cannot be that of a factory. Checked first, as it takes no time."""
    module, _, function = name.partition(":")
    if module.endswith(".py"):
        raise ValueError(f"{name} names a file; name the module: {_as_module(module)}:{function or 'FACTORY'}.")
    if not function.isidentifier() or not all(part.isidentifier() for part in module.split(".")):
        raise ValueError(f"Name the factory as MODULE:FACTORY, such as mypackage.models:trained; got {name!r}.")


def _as_module(file: str) -> str:
    """The name by which a file is imported, after the folder to be in if it is not below this one."""
    path = os.path.relpath(file)
    folder, here = os.path.dirname(os.path.abspath(file)), path.split(os.sep)
    if here[0] == os.pardir or not all(part.isidentifier() for part in here[:-1]):
        return f"in {folder}, {os.path.basename(file)[:-3]}"
    return path[:-3].replace(os.sep, ".")


def subject_of(name: str) -> Subject:
    """The model that a factory returns."""
    check_name(name)
    module, _, function = name.partition(":")
    found = _module(name, module)
    if not hasattr(found, function):
        near = difflib.get_close_matches(function, [n for n in vars(found) if callable(getattr(found, n))], n=1)
        hint = f" Did you mean {module}:{near[0]}?" if near else ""
        raise ValueError(f"Cannot import {name}: the module {module} has no {function!r}.{hint}")
    with code_of(name):
        made = getattr(found, function)()
    if not isinstance(made, tuple) or len(made) not in (3, 4):
        kind = f"{len(made)} values" if isinstance(made, tuple) else type(made).__name__
        raise ValueError(f"{name} must return (model, variables, batches) or those and evaluate; got {kind}.")
    model, variables, batches, evaluate = made if len(made) == 4 else (*made, None)
    if evaluate is not None and not callable(evaluate):
        raise ValueError(f"{name} must return a function, evaluate, as its fourth value; got {evaluate!r}.")
    if not isinstance(batches, Iterable) or isinstance(batches, (dict, str)):
        raise ValueError(f"{name} must return batches, such as a list of arrays, as its third value; got {batches!r}.")
    with code_of(f"batches, which {name} returns,"):
        batches = list(batches)
    score = None if evaluate is None else Evaluate(evaluate, name)
    subject = Subject(type(model).__name__, model, variables, batches, score)
    _check_runs(subject, name)
    return subject


def _check_runs(subject, name):
    """Raises if the model does not accept the first batch; by shapes alone, without computing."""
    if not subject.batches:
        raise ValueError(f"{name} returns no batches, but quantization needs data.")
    functional = subject.functional
    with context(functional.leaves):
        leaves, batch = tuple(map(automatic, functional.leaves)), shapes_of(subject.batches[0])
        try:
            jax.eval_shape(functional.fn, leaves, batch)
        except ValueError:  # raised by jpfq, such as for a model in training mode
            raise
        except Exception as error:
            raise ForeignError(f"the model, which {name} returns,") from error


def _module(name, module):
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    importlib.invalidate_caches()
    try:
        with code_of(f"the module {module}"):
            return importlib.import_module(module)
    except ForeignError as error:
        missing = error.__cause__
        if isinstance(missing, ModuleNotFoundError) and missing.name and f"{module}.".startswith(f"{missing.name}."):
            near = difflib.get_close_matches(module, [path.stem for path in Path.cwd().glob("*.py")], n=1)
            hint = f" Did you mean {near[0]}?" if near else f" Searched {Path.cwd()} and the installed packages."
            raise ValueError(f"Cannot import {name}: there is no module {missing.name}.{hint}") from missing
        raise

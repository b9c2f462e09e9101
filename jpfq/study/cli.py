"""The command `jpfq`."""

import argparse
import importlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from ..network import Rule
from ..scalar import AbsMax, Grid, MinError, MinMSE, Ternary, grid_of_bits
from .compare import METHODS, SHOWN, Subject, Trial, compare, trial_table
from .inspect import inspect, inspected
from .plot import score_against_bits

SCALES = {"minmse": MinMSE(), "absmax": AbsMax(), "minerror": MinError()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status: 0, or 2 for input that cannot be used."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except ValueError as error:
        if options.debug:
            raise
        print(f"jpfq: {error}", file=sys.stderr)
        return 2
    return 0


def _parser():
    parser = argparse.ArgumentParser(prog="jpfq", description="Quantize trained JAX networks to a few bits per weight.")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo", help="train two small models on digits, quantize them, print a table and a picture"
    )
    demo.add_argument("--picture", type=Path, default=Path("jpfq-demo.png"), help="where to save the picture")
    demo.set_defaults(run=_demo)

    own = commands.add_parser(
        "quantize",
        help="quantize a model of your own",
        description="FACTORY is a function without arguments that returns (model, variables, batches) or (model, variables, "
        "batches, evaluate). variables: of a Linen module; the parameters of a plain function; None for NNX. "
        "evaluate(variables), or evaluate(model) for NNX, returns a number, larger is better.",
    )
    own.add_argument("factory", metavar="MODULE:FACTORY", help="for example mypackage.models:trained")
    own.add_argument("--bits", nargs="+", default=["4"], help="numbers of bits from 1 to 16, or 'ternary'; default 4")
    own.add_argument(
        "--method", nargs="+", choices=list(METHODS), default=list(SHOWN), help=f"default: {' '.join(SHOWN)}"
    )
    own.add_argument("--scale", choices=list(SCALES), help="how steps are chosen; default: each method's own way")
    own.add_argument("--skip", action="append", default=[], metavar="PATTERN", help="kernels to leave as they are")
    own.add_argument("--summary", action="store_true", help="print a table of all kernels for each result")
    own.add_argument("--picture", type=Path, help="where to save a picture, if the factory returns evaluate")
    own.set_defaults(run=_quantize)

    saved = commands.add_parser("inspect", help="print what a saved result holds")
    saved.add_argument("folder", type=Path, metavar="DIR", help="as quantized.save wrote it")
    saved.add_argument("--json", action="store_true", help="print it as JSON")
    saved.set_defaults(run=_inspect)
    return parser


def _demo(options):
    from .demo import GRIDS, subjects

    _check_picture(options.picture)
    print("Training a CNN and an MLP on handwritten digits ..", flush=True)
    _study(subjects(), lambda subject: compare(subject, GRIDS), options.picture)


def _quantize(options):
    subject = _subject(options.factory)
    if options.picture:
        _check_picture(options.picture)
        if subject.evaluate is None:
            raise ValueError("A picture needs scores: let the factory return evaluate as its fourth value.")
    grids = [_grid(bits) for bits in options.bits]
    skips = [Rule(pattern, skip=True) for pattern in options.skip]
    scale = SCALES.get(options.scale)
    trials = _study([subject], lambda subject: compare(subject, grids, scale, options.method, skips), options.picture)
    for trial in trials if options.summary else ():
        print(f"\n{trial.grid} {trial.method}\n{trial.summary}")


def _inspect(options):
    figures = inspect(options.folder)
    print(json.dumps(figures, indent=2) if options.json else inspected(figures))


def _study(subjects: Sequence[Subject], run: Callable, picture: Path | None) -> list[Trial]:
    """Prints the table of all trials and saves the picture."""
    floats = {subject.name: subject.score() for subject in subjects}
    trials = [trial for subject in subjects for trial in run(subject)]
    print(trial_table(trials, floats))
    if picture:
        score_against_bits(trials, floats, picture)
        print(f"\nPicture of accuracy against bits: {picture.resolve()}")
    return trials


def _subject(name: str) -> Subject:
    module, colon, function = name.partition(":")
    if not colon or not function:
        raise ValueError(f"Name the factory as MODULE:FACTORY, such as mypackage.models:trained; got {name!r}.")
    sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"Cannot import {name}: {error}.") from error
    made = factory()
    if not isinstance(made, tuple) or len(made) not in (3, 4):
        raise ValueError(
            f"{name} must return (model, variables, batches) or those and evaluate; got {type(made).__name__}."
        )
    model, variables, batches, *rest = made
    return Subject(type(model).__name__, model, variables, list(batches), rest[0] if rest else None)


def _grid(text: str) -> Grid:
    if text == "ternary":
        return Ternary()
    if not text.isdigit():
        raise ValueError(f"--bits takes numbers from 1 to 16, or 'ternary'; got {text!r}.")
    return grid_of_bits(int(text))


def _check_picture(path: Path):
    """Before the work, not after it."""
    if not path.parent.is_dir():
        raise ValueError(f"There is no folder {path.parent} for the picture.")
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"The picture is a .png, .pdf or .svg file; got {path.name!r}.")

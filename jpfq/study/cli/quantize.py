"""`jpfq demo` and `jpfq quantize`: every grid with every method, side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from ..compare import METHODS, SHOWN, Subject, Trial, attempt, trial_table
from ..plot import score_against_bits
from .answer import Answer, begun, ended, note
from .destinations import add_saving, check_model, check_picture, check_saving, keep, kept_lines
from .factory import HELP, add_factory, check_name, subject_of
from .settings import add_settings, check_settings, choose, grid_of, method_of, rules_of


def add(command) -> None:
    """The subcommands; `command` makes the parser of one."""
    demo = command("demo", run_demo, "train two small models on handwritten digits and quantize them", "jpfq demo")
    demo.add_argument("--picture", type=Path, default=Path("jpfq-demo.png"), help="where to save the picture")
    demo.add_argument("--json", action="store_true", help="print the figures as JSON")

    own = command(
        "quantize",
        run_quantize,
        "quantize a model of your own, and compare bits and methods",
        "jpfq quantize mymodel:trained --bits ternary 2 3 4",
        "jpfq quantize mymodel:trained --bits 4 --method best --save mymodel-w4",
        about=HELP,
    )
    own.usage = "jpfq quantize MODULE:FACTORY [options]"
    add_factory(own)
    own.add_argument("--bits", nargs="+", default=["4"], help="numbers of bits from 1 to 16, or 'ternary'; default 4")
    own.add_argument(
        "--method",
        nargs="+",
        default=SHOWN,
        help=f"of {', '.join(METHODS)}; default: {' '.join(SHOWN)}",
    )
    add_settings(own)
    own.add_argument("--seed", type=int, metavar="N", help="of random numbers")
    run = own.add_argument_group("how it runs")
    run.add_argument("--reference", metavar="WHAT", help="what layers stay near to: float, the default, or block")
    run.add_argument("--offload", action="store_true", help="leave waiting batches in the memory of the host")
    run.add_argument("--strict", action="store_true", help="refuse a model with kernels that cannot be quantized")
    run.add_argument("--checkpoint", type=Path, metavar="DIR", help="keep finished layers; the same command goes on")
    add_saving(own, "the result, where one setting is asked for")
    own.add_argument("--summary", action="store_true", help="tell of every kernel of each result")
    own.add_argument("--json", action="store_true", help="print the figures as JSON")


def run_demo(options) -> Answer:
    """Two models, four grids, three methods."""
    from ..demo import GRIDS, subjects

    check_picture(options.picture)
    note("Training a CNN and an MLP on handwritten digits ..")
    jobs: list = [(subject, grid, method, None) for subject in subjects() for grid in GRIDS for method in SHOWN]
    return _study(jobs, {}, options, summary=False)


def run_quantize(options) -> Answer:
    """One model under all settings that the options name."""
    check_name(options.factory)
    grids, methods = [grid_of(bits) for bits in options.bits], [method_of(name) for name in options.method]
    check_settings(options)
    if options.reference is not None:
        choose("--reference", options.reference, ("float", "block"))
    settings = [(grid, method, rules_of(options, grid, method)) for grid in grids for method in methods]
    _check_single(options, len(settings))
    check_saving(options)
    how: dict[str, Any] = {"offload": options.offload, "strict": options.strict}
    if options.seed is not None:
        how["key"] = jax.random.key(options.seed)
    if options.reference is not None:
        how["reference"] = options.reference
    if options.checkpoint is not None:
        how["checkpoint"] = options.checkpoint
    subject = subject_of(options.factory)
    check_model(options, subject)
    if options.picture and subject.evaluate is None:
        raise ValueError("A picture needs scores: let the factory return evaluate as its fourth value.")
    return _study([(subject, *setting) for setting in settings], how, options, options.summary)


def _check_single(options, count):
    """Raises where many settings would go into one place."""
    for name in ("save", "report", "checkpoint"):
        if getattr(options, name) is not None and count > 1:
            raise ValueError(
                f"--{name} takes one result, and {count} are asked for: name one of --bits and one --method, such as "
                "--bits 4 --method best."
            )


def _study(jobs: Sequence, how: dict[str, Any], options, summary: bool) -> Answer:
    """The table of all trials, and what is kept of them. A job is a subject, a grid, a method and its rules."""
    subjects: list[Subject] = list({id(subject): subject for subject, *_ in jobs}.values())
    floats = {subject.name: subject.score() for subject in subjects}
    trials: list[Trial] = []
    kept: dict[str, Any] = {}
    for number, (subject, grid, method, rules) in enumerate(jobs, 1):
        what = f"[{number}/{len(jobs)}] {subject.name}: {grid}, {method}"
        begun(what)
        trial, quantized = attempt(subject, grid, method, rules, **how)
        ended(what, trial.seconds)
        trials.append(trial)
        if len(jobs) == 1:
            kept |= keep(options, quantized, subject)
    if options.picture:
        score_against_bits(trials, floats, options.picture)
        kept["picture"] = str(options.picture.resolve())
    document = {"float_scores": floats, "trials": [trial.figures(kernels=summary) for trial in trials], **kept}
    tables = [f"{trial.grid} {trial.method}\n{trial.summary}" for trial in trials if summary]
    lines = kept_lines(kept)
    return Answer("\n\n".join([trial_table(trials, floats), *tables, *(["\n".join(lines)] if lines else [])]), document)

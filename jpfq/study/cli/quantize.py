"""`jpfq demo` and `jpfq quantize`: compare grids and methods on a model."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from ..compare import METHODS, SHOWN, Subject, Trial, attempt, trial_table
from ..plot import score_against_bits
from .answer import Answer, begun, ended, note
from .destinations import add_saving, check_model, check_picture, check_saving, write, written_lines
from .factory import HELP, add_factory
from .language import add_text, check_named, is_language, named_subject, with_perplexity
from .settings import (
    FORMATS,
    add_settings,
    check_settings,
    choose,
    grid_of,
    in_options,
    method_of,
    rules_of,
    rules_of_format,
)


def add(command) -> None:
    """Adds the subcommands; `command` creates the parser of one."""
    demo = command("demo", run_demo, "train two small models on handwritten digits and quantize them", "jpfq demo")
    demo.add_argument("--picture", type=Path, default=Path("jpfq-demo.png"), help="where to save the picture")
    demo.add_argument("--json", action="store_true", help="print the metrics as JSON")

    own = command(
        "quantize",
        run_quantize,
        "quantize a model of your own, and compare bits and methods",
        "jpfq quantize mymodel:trained --bits ternary 2 3 4",
        "jpfq quantize mymodel:trained --bits 4 --method best --save mymodel-w4",
        "jpfq quantize mymodel:trained --format nvfp4 mxfp4 int4 --group 32 --method best",
        "jpfq quantize SmolLM2-135M.gguf --bits 4 --group 64 --calibrate text.txt --save smollm2-w4",
        about=f"{HELP} In its place a GGUF file or a Hugging Face folder of a language model, with --calibrate.",
    )
    own.usage = "jpfq quantize MODULE:FACTORY [options]\n       jpfq quantize PATH --calibrate FILE [options]"
    add_factory(own)
    own.add_argument("--bits", nargs="+", help="numbers of bits from 1 to 16, or 'ternary'; default 4")
    own.add_argument("--format", nargs="+", default=[], metavar="NAME", help=f"number formats: {', '.join(FORMATS)}")
    own.add_argument(
        "--method",
        nargs="+",
        help=f"of {', '.join(METHODS)}; default: {' '.join(SHOWN)}, and best alone for a PATH",
    )
    add_text(own)
    add_settings(own)
    own.add_argument("--seed", type=int, metavar="N", help="of random numbers")
    run = own.add_argument_group("how it runs")
    run.add_argument("--reference", metavar="WHAT", help="the target of each layer: float, the default, or block")
    run.add_argument("--offload", action="store_true", help="move waiting batches to host memory")
    run.add_argument("--strict", action="store_true", help="refuse a model with kernels that cannot be quantized")
    run.add_argument("--checkpoint", type=Path, metavar="DIR", help="save finished layers; the same command resumes")
    add_saving(own, "the result, where one setting is asked for")
    own.add_argument("--summary", action="store_true", help="print a table of all kernels for each result")
    own.add_argument("--json", action="store_true", help="print the metrics as JSON")


def run_demo(options) -> Answer:
    """Two models, four grids, three methods."""
    from ..demo import GRIDS, subjects

    check_picture(options.picture)
    note("Training a CNN and an MLP on handwritten digits ..")
    jobs: list = [(subject, grid, method, None, None) for subject in subjects() for grid in GRIDS for method in SHOWN]
    return _study(jobs, {}, options, summary=False)


def run_quantize(options) -> Answer:
    """One model under all settings of the options."""
    check_named(options)
    usual = ("best",) if is_language(options) else SHOWN
    formats = [choose("--format", name, FORMATS) for name in options.format]
    grids = [grid_of(bits) for bits in options.bits or ([] if formats else ["4"])]
    methods = [method_of(name) for name in options.method or usual]
    check_settings(options)
    if options.reference is not None:
        choose("--reference", options.reference, ("float", "block"))
    settings: list[tuple] = [
        (grid, method, rules_of(options, grid, method), None) for grid in grids for method in methods
    ]
    for name, method in itertools.product(formats, methods):
        rules = rules_of_format(options, name, method)
        settings.append((rules[-1].recipe().grid, method, rules, name))
    _check_single(options, len(settings))
    check_saving(options)
    arguments: dict[str, Any] = {"offload": options.offload, "strict": options.strict}
    if options.seed is not None:
        arguments["key"] = jax.random.key(options.seed)
    if options.reference is not None:
        arguments["reference"] = options.reference
    if options.checkpoint is not None:
        arguments["checkpoint"] = options.checkpoint
    subject = named_subject(options)
    check_model(options, subject)
    if options.picture and subject.evaluate is None:
        raise ValueError("A plot needs scores: let the factory return evaluate as its fourth value.")
    answer = _study([(subject, *setting) for setting in settings], arguments, options, options.summary)
    return with_perplexity(options, subject, answer)


def _check_single(options, count):
    """Raises if several results would be written to one place."""
    for name in ("save", "export", "report", "checkpoint"):
        if getattr(options, name) is not None and count > 1:
            raise ValueError(
                f"--{name} takes one result, but there are {count}: give one value of --bits and one of --method, such as "
                "--bits 4 --method best."
            )


def _study(jobs: Sequence, settings: dict[str, Any], options, summary: bool) -> Answer:
    """Runs all trials and tabulates them. A job is a subject, a grid, a method, its rules, and the format they are of."""
    subjects: list[Subject] = list({id(subject): subject for subject, *_ in jobs}.values())
    floats = {subject.name: subject.score() for subject in subjects}
    trials: list[Trial] = []
    written: dict[str, Any] = {}
    for number, (subject, grid, method, rules, format) in enumerate(jobs, 1):
        what = f"[{number}/{len(jobs)}] {subject.name}: {format or grid}, {method}"
        begun(what)
        try:
            trial, quantized = attempt(subject, grid, method, rules, format, **settings)
        except ValueError as error:
            raise in_options(error) from error
        ended(what, trial.seconds)
        trials.append(trial)
        if len(jobs) == 1:
            written |= write(options, quantized, subject)
    if options.picture:
        score_against_bits(trials, floats, options.picture)
        written["picture"] = str(options.picture.resolve())
    document = {"float_scores": floats, "trials": [trial.as_record(kernels=summary) for trial in trials], **written}
    tables = [f"{trial.label} {trial.method}\n{trial.summary}" for trial in trials if summary]
    lines = written_lines(written)
    return Answer("\n\n".join([trial_table(trials, floats), *tables, *(["\n".join(lines)] if lines else [])]), document)

"""`jpfq sweep`: many settings of one model at once."""

import functools
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp

from ...matrix.explicit_mesh import context
from ...scalar import AbsMax
from ..compare import METHODS, Subject
from ..space import METRICS, Space
from ..sweep import sweep
from ..sweep_result import Sweep
from .answer import NO, YES, Answer, note
from .destinations import add_saving, check_model, check_saving, write, written_lines
from .factory import HELP, TRACING, add_factory, check_name, subject_of
from .settings import add_settings, check_settings, grid_of, method_of, rules_of


def add(command) -> None:
    """Adds the subcommand."""
    own = command(
        "sweep",
        run,
        "quantize a model under many settings at once",
        "jpfq sweep mymodel:trained --bits 2 3 4 --c 0.7 0.85 1.0",
        "jpfq sweep mymodel:trained --bits 3 4 --method GPFQ best --bits-per-weight 4.5 --save mymodel-best",
        about=f"{HELP} A sweep compiles evaluate, so it is made of jax.numpy and returns an array. The loss of a setting is "
        "minus its score, or the relative error of the outputs on the batches where the factory returns no evaluate. A star "
        "marks the settings that no other beats in both loss and bits per weight.",
        statuses="exit status: 1 where no setting is within --bits-per-weight.",
    )
    own.usage = "jpfq sweep MODULE:FACTORY [options]"
    add_factory(own)
    axes = own.add_argument_group("axes: all combinations of their values are tried")
    axes.add_argument("--bits", nargs="+", default=["2", "3", "4"], help="as for jpfq quantize; default 2 3 4")
    axes.add_argument("--c", nargs="+", type=float, help="steps put the level on top at c max |w|")
    axes.add_argument("--method", nargs="+", help=f"of {', '.join(METHODS)}; default best")
    axes.add_argument("--seed", nargs="+", type=int, help="of random numbers")
    add_settings(own)
    run_ = own.add_argument_group("how it runs")
    run_.add_argument("--by-error", action="store_true", help="the loss is the error of the outputs in any case")
    run_.add_argument("--lanes", type=int, metavar="N", help="so many settings at a time at most, to save memory")
    run_.add_argument("--offload", action="store_true", help="leave waiting batches in the memory of the host")
    run_.add_argument("--strict", action="store_true", help="refuse a model with kernels that cannot be quantized")
    add_saving(own, "the setting of least loss")
    own.add_argument(
        "--bits-per-weight", type=float, metavar="B", help="the least loss of those of so many bits at most"
    )
    own.add_argument("--json", action="store_true", help="print the records as JSON")


def run(options) -> Answer:
    """Runs the sweep; writes its best result if requested."""
    check_name(options.factory)
    check_settings(options)
    space = _space(options)
    if options.lanes is not None and options.lanes < 1:
        raise ValueError(f"--lanes takes a positive number of settings; got {options.lanes}.")
    wants = any(x is not None for x in (options.save, options.export, options.report))
    if options.bits_per_weight is not None and not wants:
        raise ValueError("--bits-per-weight selects the setting to save: add --save DIR or --report FILE.html.")
    check_saving(options)
    subject = subject_of(options.factory)
    check_model(options, subject)
    scored = subject.evaluate is not None and not options.by_error
    if scored:
        check_compiles(subject, options.factory)
    evaluate = functools.partial(_loss, subject) if scored else None
    limits = {"lanes": options.lanes, "offload": options.offload, "strict": options.strict}
    result = sweep(subject.model, subject.batches, space, evaluate=evaluate, **subject.arguments, **limits)
    return _answer(options, subject, result, scored, wants)


def check_compiles(subject: Subject, name: str) -> None:
    """Raises if `evaluate` cannot be compiled, before any work is done."""
    functional = subject.functional
    key, score = next(iter(subject.arguments), "model"), cast(Callable, subject.evaluate)
    try:
        with context(functional.leaves):
            jax.eval_shape(lambda leaves: score(functional.rebuild(leaves)[key]), functional.leaves)
    except TRACING as error:
        raise ValueError(
            f"A sweep compiles the score, but evaluate of {name} converts arrays to Python numbers or NumPy arrays, with "
            "float() or np.asarray() for example. Compute with jax.numpy and return the array, which the other commands "
            "accept too; or pass --by-error, to take the error of the outputs as the loss."
        ) from error


def _loss(subject, quantized):
    """Minus the score of a quantized network."""
    return -jnp.asarray(subject.evaluate(subject.state_of(quantized)), float)


def _space(options):
    """All settings. The rules of each are created once, so that errors come before any work is done."""
    if options.c is not None and options.scale not in (None, "absmax"):
        raise ValueError(f"--c is the factor of --scale absmax; it does not go with --scale {options.scale}.")
    axes = {
        "method": options.method and [method_of(name) for name in options.method],
        "bits": [int(bits) if bits.isdigit() else bits for bits in options.bits],
        "c": options.c,
        "seed": options.seed,
    }

    def rules(bits, method="best", c=None):
        return rules_of(options, grid_of(str(bits)), method, None if c is None else AbsMax(c))

    space = Space(rules, **{name: values for name, values in axes.items() if values is not None})
    for point in space.points:
        space.rules_of(point)
    return space


def _answer(options, subject: Subject, result: Sweep, scored: bool, wants: bool) -> Answer:
    loss = "minus the score of evaluate" if scored else "the relative error of the outputs on the batches"
    records, front, limit = result.records, result.front, options.bits_per_weight
    within = [i for i in front if limit is None or records[i]["bits_per_weight"] <= limit]
    written: dict[str, Any] = {}
    lines = [f"The loss is {loss}."]
    if wants and within:
        setting = {name: value for name, value in records[within[-1]].items() if name not in METRICS}
        written = {"best": within[-1], **write(options, result.best(limit), subject, result)}
        lines.append("Least loss: " + ", ".join(f"{name}={value}" for name, value in setting.items()) + ".")
    elif wants:
        note(f"jpfq: nothing is saved: no setting of finite loss takes {limit} bits per weight or fewer.")
    if options.picture:
        result.picture(options.picture)
        written["picture"] = str(options.picture.resolve())
    document = {"loss": "-score" if scored else "output_error", "records": records, "front": front, **written}
    text = "\n\n".join([str(result), "\n".join([*lines, *written_lines(written)])])
    return Answer(text, document, NO if wants and not within else YES)

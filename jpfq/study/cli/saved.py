"""`jpfq evaluate`, `inspect`, `report` and `certify`, for a saved result."""

from pathlib import Path
from typing import Any

from ...network.certify import MAX_BITS, certify
from ...network.quantized import Quantized
from ...network.table import table
from ...storage.save import load
from ..compare import Subject
from ..evaluate import evaluate
from ..inspect import as_text, inspect
from .answer import NO, YES, Answer
from .destinations import check_report, check_result
from .factory import HELP, add_factory, check_name, subject_of


def add(command) -> None:
    """Adds the subcommands."""
    own = command(
        "evaluate",
        run_evaluate,
        "score a saved result and its float model",
        "jpfq evaluate mymodel-w4 mymodel:trained",
        about=HELP,
    )
    _add_folder(own)
    add_factory(own)
    own.add_argument("--json", action="store_true", help="print the metrics as JSON")

    own = command("inspect", run_inspect, "print the contents of a saved result", "jpfq inspect mymodel-w4")
    _add_folder(own)
    own.add_argument("--json", action="store_true", help="print it as JSON")

    own = command(
        "report",
        run_report,
        "write an HTML report of a saved result",
        "jpfq report mymodel-w4 mymodel.html --title 'Four bits'",
    )
    _add_folder(own)
    own.add_argument("file", type=Path, metavar="FILE.html", help="one self-contained file")
    own.add_argument("--title", help="its heading")
    own.add_argument("--overwrite", action="store_true", help="replace an existing file")

    own = command(
        "certify",
        run_certify,
        "check whether integer sums can overflow",
        "jpfq certify mymodel-w4a8 mymodel:trained --bits 16 --tile 64",
        about="Computes the largest and the least sum of the stored codes over all possible inputs. The model determines "
        "which codes are summed. The result needs quantized activations, see jpfq quantize --activation-bits. " + HELP,
        statuses="exit status: 0 if no input overflows, 1 if some may.",
    )
    _add_folder(own)
    add_factory(own)
    own.add_argument("--bits", type=int, required=True, metavar="P", help="of the accumulator, including its sign")
    own.add_argument("--tile", type=int, metavar="T", help="the inputs per sum; default: all of a layer")
    own.add_argument("--json", action="store_true", help="print it as JSON")


def run_evaluate(options) -> Answer:
    """Scores and errors."""
    subject, quantized = _loaded(options)
    metrics = evaluate(subject, quantized)
    score = lambda x: "" if x is None else f"{x:.4g}"
    share = lambda x: "" if x is None else f"{x:.2%}" if x == x else "nan"
    rows = [("float", score(metrics["float_score"]), "")]
    rows.append(("weights quantized", score(metrics["score"]), share(metrics["weights_error"])))
    notes = []
    if metrics["inputs_rounded"]:
        rows.append(("activations too", "", share(metrics["output_error"])))
        if subject.evaluate is not None:
            notes.append("evaluate is given weights, so that its score does not see activations rounded.")
    if unmatched := max(metrics["weights_unmatched"], metrics["output_unmatched"]):
        notes.append(f"{unmatched:,} outputs are NaN or infinite in one of the two networks only: there is no error.")
    if subject.evaluate is None:
        notes.append("The factory returns no evaluate, so that there are no scores.")
    text = table(("network", "score", "error of the outputs"), rows)
    return Answer("\n\n".join([text, *(["\n".join(notes)] if notes else [])]), metrics)


def run_inspect(options) -> Answer:
    """Describes the contents of the folder."""
    check_result(options.folder)
    contents = inspect(options.folder)
    return Answer(as_text(contents), contents)


def run_report(options) -> Answer:
    """Writes the report."""
    check_result(options.folder)
    check_report(options.file, options.overwrite)
    quantized: Any = load(options.folder)
    quantized.report(options.file, title=options.title, overwrite=options.overwrite)
    return Answer(f"Report: {options.file.resolve()}", {"report": str(options.file.resolve())})


def run_certify(options) -> Answer:
    """The certificate, and whether it holds."""
    if not 2 <= options.bits <= MAX_BITS:
        raise ValueError(f"--bits is the width of an accumulator, from 2 to {MAX_BITS}; got {options.bits}.")
    if options.tile is not None and options.tile < 1:
        raise ValueError(f"--tile is a positive number of inputs; got {options.tile}.")
    _, quantized = _loaded(options)
    if not quantized.inputs:
        raise ValueError(
            f"{options.folder} has no quantized activations, so there are no integer sums: quantize with "
            "--activation-bits 8, for example."
        )
    certificate = certify(quantized, bits=options.bits, tile=options.tile)
    sites = [
        {"kernel": site.path, "inputs": list(site.inputs), "tile": site.tile}
        | {"most": int(site.most.max(initial=0)), "least": int(site.least.min(initial=0))}
        | {"bits": site.bits, "outer_bits": site.outer_bits, "overflowing": int((site.widths > options.bits).sum())}
        for site in certificate.sites
    ]
    document = {"holds": certificate.holds, "bits": options.bits, "needed": certificate.needed}
    document |= {"sites": sites, "left": list(certificate.left)}
    return Answer(str(certificate), document, YES if certificate.holds else NO)


def _add_folder(parser):
    parser.add_argument("folder", type=Path, metavar="DIR", help="a result, as --save or quantized.save wrote it")


def _loaded(options) -> tuple[Subject, Quantized]:
    """The factory's model, and the result with it."""
    check_result(options.folder)
    check_name(options.factory)
    subject = subject_of(options.factory)
    return subject, load(options.folder, subject.model, **subject.arguments)

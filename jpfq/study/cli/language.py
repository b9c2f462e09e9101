"""A language model from its own files in place of MODULE:FACTORY, with windows of a text as its data."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from ...network.servers import Exported
from ..compare import Subject
from .answer import Answer, begun
from .factory import check_name, subject_of

WINDOWS, LENGTH, BATCH, SCORED = 32, 256, 8, 40
_TEXT = ("calibrate", "score", "windows", "length", "score_windows")


@dataclasses.dataclass(frozen=True)
class Score:
    """Minus nats per token on windows of tokens: larger is better."""

    windows: list

    def __call__(self, model: Any) -> Any:
        from ...hub.checkpoint import nats

        return -nats(model, self.windows)

    def __str__(self):
        return f"{sum(map(len, self.windows))} windows of {self.windows[0].shape[1]} tokens"


def add_text(parser) -> None:
    """The options about text."""
    text = parser.add_argument_group("language models from a GGUF file or a Hugging Face folder")
    text.add_argument("--calibrate", type=Path, metavar="FILE", help="a text to calibrate on, in UTF-8")
    text.add_argument(
        "--score", type=Path, metavar="FILE", help="another to score on; default: what follows in that text"
    )
    text.add_argument("--windows", type=int, metavar="N", help=f"windows to calibrate on; default {WINDOWS}")
    text.add_argument("--length", type=int, metavar="N", help=f"tokens of a window; default {LENGTH}")
    text.add_argument("--score-windows", type=int, metavar="N", help=f"windows to score on; default {SCORED} at most")


def is_language(options) -> bool:
    """True if the model is named by a path, and not as MODULE:FACTORY."""
    name = options.factory
    return ":" not in name and not name.endswith(".py") and (name.endswith(".gguf") or Path(name).exists())


def check_named(options) -> None:
    """Raises where no model can be meant, or options about text do not fit. Before all else, as it takes no time."""
    given = [name for name in _TEXT if getattr(options, name) is not None]
    if not is_language(options):
        if given:
            raise ValueError(
                f"--{given[0].replace('_', '-')} is for a language model from a GGUF file or a Hugging Face folder, and "
                f"there is no file or folder {options.factory}."
            )
        return check_name(options.factory)
    if not Path(options.factory).exists():
        raise ValueError(f"There is no file {options.factory}.")
    if options.calibrate is None:
        raise ValueError(f"{options.factory} needs a text to calibrate on: --calibrate FILE.")
    for name in ("calibrate", "score"):
        path = getattr(options, name)
        if path is not None and not path.is_file():
            raise ValueError(f"--{name} names a text: there is no file {path}.")
    for name in ("windows", "length", "score_windows"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} takes a positive number; got {value}.")
    return None


def named_subject(options) -> Subject:
    """The model that the options name, with its data and its score: minus nats per token."""
    if not is_language(options):
        return subject_of(options.factory)
    from ...hub.checkpoint import load
    from ...hub.tokens import windows

    begun(f"Reading {options.factory} ..")
    checkpoint = load(options.factory)
    length, count = options.length or LENGTH, options.windows or WINDOWS
    tokens = checkpoint.encode(_text(options.calibrate))
    batches = windows(tokens, length, count, BATCH)
    rest = tokens[count * length :] if options.score is None else checkpoint.encode(_text(options.score))
    most = options.score_windows or min(SCORED, len(rest) // length)
    if most == 0:
        raise ValueError(
            f"{options.score or options.calibrate} has {len(rest):,} tokens to score on, less than a window of {length}: "
            "give --score FILE with more, or fewer or shorter windows."
        )
    score = Score(windows(rest, length, most, BATCH))
    return Subject(Path(options.factory).resolve().name, checkpoint.model, None, batches, score)


def exported(options, quantized: Any, kind: Any) -> Exported:
    """Exports a result as the options say, a language model with its own names, and those of the folder it came from."""
    if not is_language(options):
        return quantized.export(kind, options.export, overwrite=options.overwrite)
    from ...hub.checkpoint import export

    like = {"like": options.factory} if Path(options.factory).is_dir() else {}
    return export(quantized, options.export, kind, overwrite=options.overwrite, **like)


def with_perplexity(options, subject: Subject, answer: Answer) -> Answer:
    """The answer with the perplexity of the float network and of each trial at its end."""
    if not is_language(options):
        return answer
    document: dict[str, Any] = answer.document
    value = lambda score: math.exp(-score) if score == score else score
    named = [("float", document["float_scores"][subject.name])]
    named += [(f"{trial['format'] or trial['grid']} {trial['method']}", trial["score"]) for trial in document["trials"]]
    found = {name: value(score) for name, score in named}
    lines = [f"Perplexity on {subject.evaluate}; the scores above are minus nats per token:"]
    lines += [f"  {name}: {number:.2f}" for name, number in found.items()]
    if options.activation_bits is not None:
        lines.append("It is that of quantized weights: it does not see activations rounded.")
    if options.save is not None:
        lines.append(f"Load it: jpfq.load({str(options.save)!r}, jpfq.hub.load({options.factory!r}).model)")
    text = "\n\n".join([answer.text, "\n".join(lines)])
    return answer._replace(text=text, document=document | {"perplexity": found})


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}.") from error

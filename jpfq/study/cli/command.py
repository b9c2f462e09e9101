"""The command itself: its parser, its exit status, and one-line errors."""

import argparse
import contextlib
import importlib.metadata
import io
import os
import platform
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Sequence

from ...storage.caching import cache_compilations, is_enabled
from . import quantize, saved, sweep
from .answer import UNUSABLE, YES, Answer, as_json, log_to_stderr, note
from .factory import ForeignError
from .settings import nearest

BROKEN, INTERRUPTED, BROKEN_PIPE = 70, 130, 141
STATUSES = """exit status:
  0    done
  1    the answer is no: jpfq certify does not hold, jpfq sweep finds nothing within --bits-per-weight
  2    input that cannot be used, or an error in the code of the factory, its model or its score
  70   any other error
  130  interrupted (Ctrl-C)
  141  the output was closed
  143  stopped by SIGTERM"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status, which its help explains."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = None
    closed = _open_outputs()
    try:
        try:
            options = _parse(arguments)
            answer = _run(options)
            if answer is not None:
                print(as_json(answer.document) if _json(options) else answer.text)
            return BROKEN_PIPE if closed else YES if answer is None else answer.status
        finally:
            _flush()
    except BrokenPipeError:
        _drop_output()
        return BROKEN_PIPE
    except KeyboardInterrupt:
        folder = getattr(options, "checkpoint", None)
        note("jpfq: interrupted." + (f" The same command resumes from {folder}." if folder else ""))
        return INTERRUPTED
    except ForeignError as error:
        _explain(error.__cause__, f"{error} raised this error; the traceback shows its code")
        return UNUSABLE
    except (ValueError, OSError) as error:
        if "--debug" in arguments:
            traceback.print_exception(error)
        note(f"jpfq: {error}")
        return UNUSABLE
    except Exception as error:
        _explain(error, "this is an error in the code of the model, or in jpfq")
        return BROKEN


class _Parser(argparse.ArgumentParser):
    """A parser with one-line errors that suggest the intended argument."""

    def error(self, message):
        wrong = re.match(r"argument COMMAND: invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if wrong:
            choices = re.findall(r"\w+", wrong[2])
            message = f"there is no command {wrong[1]!r}.{nearest(wrong[1], choices)} Commands: {', '.join(choices)}"
        if "required" in message and "MODULE:FACTORY" in message:
            message += ". They go before options of many values, such as --bits"
        raise ValueError(f"{message}{'' if message.endswith('?') else '.'} See {self.prog} --help.")


def _parse(arguments):
    # each subcommand has these too, so that they may come before or after its name
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of every error")
    common.add_argument(
        "--no-cache",
        action="store_true",
        default=argparse.SUPPRESS,
        help="do not store compiled programs; the default is the user's cache folder, or the one JAX is set to",
    )
    settings = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False, "parents": [common]}
    parser = _Parser(
        prog="jpfq",
        description="Quantize trained JAX networks to a few bits per weight.",
        epilog=f"example:\n  jpfq quantize mymodel:trained --bits 2 3 4\n\n{STATUSES}",
        **settings,
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    known = {}

    def command(
        name: str, run: Callable[..., Answer | None], help: str, *examples: str, about: str = "", statuses: str = ""
    ) -> argparse.ArgumentParser:
        """The parser of a subcommand that prints the answer of `run`."""
        lines = ["example:" if len(examples) == 1 else "examples:", *(f"  {line}" for line in examples)]
        own = commands.add_parser(
            name,
            help=help,
            description=_wrapped(f"{help[0].upper()}{help[1:]}. {about}"),
            epilog="\n".join([*lines, *(["", statuses] if statuses else [])]),
            **settings,
        )
        own.set_defaults(run=run)
        known[name] = own
        return own

    quantize.add(command)
    sweep.add(command)
    saved.add(command)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        own = known[options.command]
        hint = nearest(unknown[0].partition("=")[0], re.findall(r"--[a-z][a-z-]*", own.format_help()))
        own.error(f"unrecognized arguments: {' '.join(unknown)}{hint and f'.{hint}'}")
    return options


def _run(options) -> Answer | None:
    """The answer. If it is JSON, prints of the user's code go to standard error."""
    if not getattr(options, "no_cache", False) and is_enabled():
        try:
            cache_compilations()
        except (OSError, ValueError) as error:
            note(f"jpfq: compiled programs are not stored: {error}")
    aside = contextlib.redirect_stdout(sys.stderr) if _json(options) else contextlib.nullcontext()
    with aside, log_to_stderr():
        return options.run(options)


def _json(options):
    return getattr(options, "json", False)


def _version():
    jpfq, jax, flax = map(importlib.metadata.version, ("jpfq", "jax", "flax"))
    return f"jpfq {jpfq} (jax {jax}, flax {flax}, Python {platform.python_version()})"


def _wrapped(text):
    return textwrap.fill(text.strip(), 100)


def _explain(error, what):
    """Prints the traceback without the calls of this command, and a line that names its origin."""
    at = error.__traceback__
    while at is not None and _ours(at.tb_frame.f_code.co_filename):
        at = at.tb_next
    traceback.print_exception(error.with_traceback(at or error.__traceback__))
    note(f"jpfq: {what}: {type(error).__name__}: {error}")


def _ours(file):
    return os.path.dirname(file) == os.path.dirname(__file__) or "importlib" in file


def _open_outputs() -> bool:
    """Makes all text printable, whatever the encoding of the terminal. Returns whether standard output is closed."""
    closed = sys.stdout is None
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, io.StringIO())
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    return closed


def _flush():
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _drop_output()
        raise OSError(f"The answer cannot be written to standard output: {error}.") from error


def _drop_output():
    """Redirects standard output, so that the interpreter exits without an error after the output was closed."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())

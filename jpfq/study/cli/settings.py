"""The options for rules: checked, and turned into rules, before any work is done."""

import dataclasses
import difflib
import inspect
from collections.abc import Iterable, Sequence
from typing import Any

from ...network import formats
from ...network.rules import Rule
from ...scalar import AbsMax, Accumulator, Grid, MinError, MinMSE, PerGroup, Scale, Stochastic, Ternary, grid_of_bits
from ..compare import METHODS

SCALES: dict[str, Scale] = {"minmse": MinMSE(), "absmax": AbsMax(), "minerror": MinError()}
FUNCTIONS = {name: x for name, x in vars(formats).items() if inspect.isfunction(x) and x.__module__ == formats.__name__}
TAKEN = {name: inspect.signature(x).parameters for name, x in FUNCTIONS.items() if not name.startswith("_")}
FORMATS = [name for name, taken in TAKEN.items() if "model" not in taken]
GROUPED = [name for name in FORMATS if "group" in TAKEN[name]]
ADVICE = {  # of errors, and what the command line has for it
    "take a divisor, or PerChannel() by a rule of its own": "take a divisor by --group, or another format",
    "Skip them by a rule before it, or pass unsupported='skip' to this one.": "Leave them out by --skip PATTERN.",
}
ALIASES = {"gptq": "OPTQ", "rtn": "MSQ", "recommended": "best"}  # other names of methods


def add_settings(parser) -> None:
    """Adds the options of a rule."""
    rule = parser.add_argument_group("quantization")
    rule.add_argument("--scale", metavar="SCALE", help=f"how steps are chosen: {', '.join(SCALES)}; default: by method")
    rule.add_argument("--group", type=int, metavar="N", help="a step for every N inputs of a neuron; default: for all")
    rule.add_argument("--rounding", metavar="ROUNDING", help="nearest, the default, or stochastic, which takes --seed")
    rule.add_argument("--activation-bits", type=int, metavar="B", help="quantize the inputs of layers too")
    rule.add_argument("--accumulator-bits", type=int, metavar="P", help="sums of integers never overflow P bits")
    rule.add_argument("--tile", type=int, metavar="T", help="over T inputs at a time; default: over all")
    rule.add_argument(
        "--skip", action="append", default=[], metavar="PATTERN", help="kernels to leave as they are; may be repeated"
    )
    rule.add_argument(
        "--rule",
        action="append",
        default=[],
        nargs=2,
        metavar=("PATTERN", "BITS"),
        help="kernels of other bits than the rest; may be repeated. Patterns are regular expressions on the whole path",
    )


def check_settings(options) -> None:
    """Raises if options contradict each other."""
    for name in getattr(options, "format", []):
        if options.scale is not None:
            raise ValueError(f"--format {name} has steps of its own: leave out --scale.")
        if options.group is not None and name not in GROUPED and not options.bits:
            raise ValueError(f"--format {name} has groups of its own: --group is for {', '.join(GROUPED)}.")
    for name, choices in (("scale", SCALES), ("rounding", ("nearest", "stochastic"))):
        if getattr(options, name) is not None:
            choose(f"--{name}", getattr(options, name), choices)
    for name, needed in (("tile", "accumulator_bits"), ("accumulator_bits", "activation_bits")):
        if getattr(options, name) is not None and getattr(options, needed) is None:
            raise ValueError(f"{_option(name)} needs {_option(needed)}.")
    stochastic, seeds = options.rounding == "stochastic", options.seed is not None
    if stochastic and not seeds:
        raise ValueError("--rounding stochastic draws random numbers: give a --seed, such as --seed 0.")
    if seeds and not stochastic:
        raise ValueError("--seed has no effect, as nothing draws random numbers: add --rounding stochastic.")


def rules_of(options, grid: Grid, method: str, scale: Scale | None = None) -> list[Rule]:
    """The rules for a grid, a method of `METHODS`, and the options. `scale` replaces that of the options."""
    settings: dict[str, Any] = METHODS[method] | _common(options)
    scale = scale or SCALES.get(options.scale) or settings.get("scale")
    if options.group is not None:
        scale = _grouped(scale or MinError(), options.group)
    if scale is not None:
        settings["scale"] = scale
    return [*_before(options, settings), Rule(".*", grid=grid, **settings)]


def rules_of_format(options, name: str, method: str) -> list[Rule]:
    """The rules for a function of `jpfq.formats`, a method of `METHODS`, and the options."""
    own = {} if method == "best" else {"plain": True, "method": METHODS[method]["method"]}
    group = {"group": options.group} if options.group is not None and name in GROUPED else {}
    rules = getattr(formats, name)(**group, **own, **_common(options))
    return [*_before(options, METHODS[method] | _common(options)), *rules]


def in_options(error: ValueError) -> ValueError:
    """An error whose advice is in terms of options."""
    text = str(error)
    for advice, option in ADVICE.items():
        text = text.replace(advice, option)
    return ValueError(text)


def _before(options, settings) -> list[Rule]:
    """The rules of --skip and --rule, which come before the rule for the rest."""
    skips = [Rule(pattern, skip=True) for pattern in options.skip]
    others = [Rule(pattern, grid=grid_of(bits, "--rule"), **settings) for pattern, bits in options.rule]
    return [*skips, *others]


def grid_of(text: str, option: str = "--bits") -> Grid:
    """The grid for a number of bits, or for 'ternary'."""
    if text == "ternary":
        return Ternary()
    if not text.isascii() or not text.isdigit():
        hint = " MODULE:FACTORY goes before the options." if ":" in text else ""
        raise ValueError(f"{option} takes numbers from 1 to 16, or 'ternary'; got {text!r}.{hint}")
    return grid_of_bits(int(text))


def method_of(text: str) -> str:
    """The name of a method, from a text in any case."""
    known = {name.lower(): name for name in METHODS}
    if text.lower() in known:
        return known[text.lower()]
    if text.lower() in ALIASES:
        raise ValueError(f"{text} is called {ALIASES[text.lower()]} here: --method {ALIASES[text.lower()]}.")
    return choose("--method", text, METHODS)


def choose(option: str, text: str, choices: Iterable[str]) -> str:
    """Returns the text if it is one of the choices; otherwise raises with the nearest choice."""
    choices = list(choices)
    if text not in choices:
        raise ValueError(f"{option} is {', '.join(choices)}; got {text!r}.{nearest(text, choices)}")
    return text


def nearest(text: str, choices: Sequence[str]) -> str:
    """A suggestion of the name that may have been meant."""
    names = {name.lower(): name for name in choices}
    near = difflib.get_close_matches(text.lower(), list(names), n=1)
    return f" Did you mean {names[near[0]]}?" if near else ""


def _common(options):
    settings: dict[str, Any] = {"rounding": Stochastic()} if options.rounding == "stochastic" else {}
    if options.activation_bits is not None:
        settings["activation_bits"] = options.activation_bits
    if options.accumulator_bits is not None:
        settings["accumulator"] = Accumulator(options.accumulator_bits, options.tile)
    return settings


def _grouped(scale, size):
    """The same scale with one step per group."""
    if isinstance(scale, MinError):
        return dataclasses.replace(scale, base=_grouped(scale.base, size))
    return dataclasses.replace(scale, per=PerGroup(size))


def _option(name):
    return f"--{name.replace('_', '-')}"

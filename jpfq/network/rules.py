"""Rules: which kernels are quantized how, by path; the first rule that matches a kernel decides."""

import dataclasses
import difflib
import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from jax.typing import DTypeLike

from ..calibrate.activation import Activations
from ..calibrate.curvature import Coupling
from ..matrix import Finish, Form, Hadamard, Method, Order, Prepare, Recipe, Shrinkage, recipe_of
from ..matrix.patches import Patches
from ..scalar import Asymmetric, Constraint, Grid, PerTensor, Rounding, Scale, register_dataclass
from ..scalar.grid import Number

_static = {"static": True}


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Rule:
    """The settings to quantize the kernels whose whole path matches a regular expression.

    Args:
        pattern: matched against the '/'-joined path from end to end: "head/.*", ".*kernel".
        bits: short for `grid=Integer(bits)`, or `Binary()` at one bit.
        grid: the alphabet; give this or `bits`.
        scale, rotation, order, prepare, method, rounding, step_dtype, form, block: as in `jpfq.solve`; what is left out
            takes the value recommended there.
        finish, shrinkage: likewise; None for none.
        plain: whether the method stands alone: what is left out is then left away, rather than recommended. Steps are
            `MinMSE()`, the order is natural, and nothing comes before or after: `Rule(".*", bits=4, method=jpfq.GPFQ(),
            plain=True)` is GPFQ as published, but for its steps (`jpfq.paper` has those, too).
        activation_bits: short for `activations=Activations(Asymmetric(activation_bits))`.
        activations: how the layer's input is quantized while the network runs; left out, it is not.
        accumulator: which integer sums must never overflow, such as `jpfq.Accumulator(16, tile=64)`; it takes quantized
            activations. Left out, sums are of any size.
        patches: which windows of a convolution it is calibrated on: `jpfq.patches.AtMost(128)` for each of its inputs,
            the default, `All()`, `NonOverlapping()` or `Random(share)`.
        correct_bias: whether the mean error of the layer's output goes into the bias that follows it, where it has one
            of its own (of a BatchNorm, too).
        coupling: how neurons make up for each other's errors, such as `jpfq.Coupling(of="logits")`; left out, each neuron
            is quantized by itself.
        skip: leave these kernels as they are.
        unsupported: what to do about matched kernels that cannot be quantized (tied, computed, inside a loop ..).
            "skip" lists them with their reason, "error" refuses. Left out, they are listed if the rule matches others
            that can be quantized, and refused if it matches none: such a rule names what it cannot have.

    Examples:
        >>> rules = [
        ...     jpfq.Rule("head/.*", skip=True),
        ...     jpfq.Rule(".*kernel", bits=4, scale=jpfq.scale.AbsMax(per=jpfq.scale.PerGroup(16))),
        ... ]
    """

    pattern: str = dataclasses.field(metadata=_static)
    bits: Number | None = dataclasses.field(default=None, kw_only=True)
    grid: Grid | None = dataclasses.field(default=None, kw_only=True)
    scale: Scale | None = dataclasses.field(default=None, kw_only=True)
    rotation: Hadamard | None = dataclasses.field(default=None, kw_only=True)
    order: Order | None = dataclasses.field(default=None, kw_only=True)
    prepare: Prepare | tuple[Prepare, ...] | None = dataclasses.field(default=None, kw_only=True)
    method: Method | None = dataclasses.field(default=None, kw_only=True)
    rounding: Rounding | None = dataclasses.field(default=None, kw_only=True)
    finish: Finish | Literal["recommended"] | None = dataclasses.field(default="recommended", kw_only=True)
    shrinkage: Shrinkage | Literal["recommended"] | None = dataclasses.field(default="recommended", kw_only=True)
    plain: bool = dataclasses.field(default=False, kw_only=True, metadata=_static)
    form: Form | None = dataclasses.field(default=None, kw_only=True, metadata=_static)
    block: int | None = dataclasses.field(default=None, kw_only=True, metadata=_static)
    activation_bits: Number | None = dataclasses.field(default=None, kw_only=True)
    activations: Activations | None = dataclasses.field(default=None, kw_only=True)
    accumulator: Constraint | None = dataclasses.field(default=None, kw_only=True)
    step_dtype: DTypeLike | None = dataclasses.field(default=None, kw_only=True, metadata=_static)
    patches: Patches | None = dataclasses.field(default=None, kw_only=True)
    correct_bias: bool = dataclasses.field(default=False, kw_only=True, metadata=_static)
    coupling: Coupling | None = dataclasses.field(default=None, kw_only=True)
    skip: bool = dataclasses.field(default=False, kw_only=True, metadata=_static)
    unsupported: Literal["skip", "error"] | None = dataclasses.field(default=None, kw_only=True, metadata=_static)

    def __post_init__(self):
        try:
            re.compile(self.pattern)
        except (re.error, TypeError) as error:
            raise ValueError(f"A rule's pattern is a regular expression; got {self.pattern!r}: {error}.") from error
        if self.unsupported not in (None, "skip", "error"):
            raise ValueError(f"unsupported is 'skip' or 'error'; got {self.unsupported!r}.")
        if self.skip:
            if self._settings() | self._around():
                names = sorted(self._settings() | self._around())
                raise ValueError(f"Rule({self.pattern!r}) skips its kernels, so {names} mean nothing in it.")
            return
        try:
            self.recipe()
            self.inputs()
        except ValueError as error:
            raise ValueError(f"Rule({self.pattern!r}): {error}") from error
        examples = (("activations", "Activations()"), ("patches", "patches.All()"), ("coupling", "Coupling()"))
        for name, example in examples:
            value = getattr(self, name)
            if isinstance(value, (type, str, int, float)):
                raise ValueError(f"Rule({self.pattern!r}): {name} is such as jpfq.{example}; got {value!r}.")

    def matches(self, path: str) -> bool:
        """True if the pattern covers the whole path."""
        return re.fullmatch(self.pattern, path) is not None

    def recipe(self) -> Recipe:
        """The settings of this rule with the defaults filled in."""
        settings = self._settings()
        if self.coupling is not None:
            settings["form"] = "gram" if settings.get("form", "auto") == "auto" else settings["form"]
        activations = self.inputs()
        if self.accumulator is not None and activations is not None:
            settings["inputs"] = activations.grid
        recipe = recipe_of(settings.pop("bits", None), settings.pop("grid", None), self.plain, **settings)
        if self.coupling is not None and (recipe.needs_rows or isinstance(recipe.scale.per, PerTensor)):
            needs = recipe.scale if isinstance(recipe.scale.per, PerTensor) else "what works on the calibration rows"
            raise ValueError(f"coupling takes one neuron after the other, from a Gram; it does not go with {needs}.")
        return recipe

    def inputs(self) -> Activations | None:
        """The settings by which the inputs of these kernels are quantized; None if they are not."""
        if self.activation_bits is None:
            return self.activations
        if self.activations is not None:
            raise ValueError("Give activation_bits=... or activations=..., one of them.")
        return Activations(Asymmetric(self.activation_bits))

    def _around(self):
        """The settings of the layer rather than of its matrix."""
        names = ("activation_bits", "activations", "patches", "coupling")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return given | {name: True for name in ("correct_bias", "plain") if getattr(self, name)}

    def _settings(self):
        names = ("bits", "grid", "scale", "rotation", "order", "prepare", "method", "rounding", "accumulator")
        names = (*names, "step_dtype", "form", "block")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        chosen = {name: getattr(self, name) for name in ("finish", "shrinkage")}  # None is a choice
        return given | {name: value for name, value in chosen.items() if value != "recommended"}


class Assignment(NamedTuple):
    """The decisions of the rules."""

    recipes: dict[str, Recipe]  # kernels to quantize
    rules: dict[str, Rule]  # by which
    skipped: dict[str, str]  # every other kernel, with the reason


def as_rules(rules) -> tuple[Rule, ...]:
    """The rules of a call: a number of bits, a rule, or a sequence of rules."""
    if isinstance(rules, int) and not isinstance(rules, bool):
        return (Rule(".*", bits=rules),)
    if isinstance(rules, Rule):
        return (rules,)
    if isinstance(rules, (list, tuple)) and rules and all(isinstance(rule, Rule) for rule in rules):
        return tuple(rules)
    raise ValueError(f"rules is a number of bits, a jpfq.Rule, or a non-empty list of them; got {rules!r}.")


def assign(
    rules: Sequence[Rule], quantizable: Sequence[str], reasons: dict[str, str], paths: Sequence[str]
) -> Assignment:
    """Gives every kernel its rule.

    Args:
        rules: in order of precedence.
        quantizable: paths of the kernels that can be quantized.
        reasons: for every other kernel, why not.
        paths: of all parameters.

    Raises:
        ValueError: if a rule matches nothing, or nothing that earlier rules leave, or only kernels that cannot be
            quantized (`Rule.unsupported` says otherwise); if there is nothing to quantize.
    """
    kernels = dict.fromkeys([*quantizable, *reasons])
    taken = {path: next((i for i, rule in enumerate(rules) if rule.matches(path)), None) for path in paths}
    for number, rule in enumerate(rules):
        _check_used(number, rule, rules, taken, kernels)
        mine = [path for path in kernels if taken[path] == number]
        refused = [path for path in mine if path in reasons]
        strict = rule.unsupported == "error" or (rule.unsupported is None and len(refused) == len(mine))
        if refused and strict and not rule.skip:
            listing = "\n".join(f"  {path}: {reasons[path]}" for path in refused[:8])
            raise ValueError(
                f"Rule {number} ({rule.pattern!r}) names kernels that cannot be quantized:\n{listing}\n"
                "Skip them by a rule before it, or pass unsupported='skip' to this one."
            )
    recipes, deciding, skipped = {}, {}, {}
    for path in kernels:
        number = taken[path]
        if number is None:
            skipped[path] = "no rule matches it"
        elif rules[number].skip:
            skipped[path] = f"rule {number} ({rules[number].pattern!r}) skips it"
        elif path in reasons:
            skipped[path] = reasons[path]
        else:
            deciding[path], recipes[path] = rules[number], rules[number].recipe()
    if not recipes:
        listing = "\n".join(f"  {path}: {reason}" for path, reason in skipped.items()) or "  it has no matrix products"
        raise ValueError(f"Nothing in this model is to be quantized:\n{listing}")
    return Assignment(recipes, deciding, skipped)


def _check_used(number, rule, rules, taken, kernels):
    matched = [path for path in taken if rule.matches(path)]
    if not matched:
        near = difflib.get_close_matches(rule.pattern, list(kernels) or list(taken), n=3, cutoff=0.3)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        some = ", ".join(list(kernels)[:8]) + (", .." if len(kernels) > 8 else "")
        raise ValueError(
            f"Rule {number} ({rule.pattern!r}) matches no parameter.{hint} Kernels: {some}. "
            "A pattern is matched against the whole path."
        )
    if not any(taken[path] == number for path in matched):
        first = taken[matched[0]]
        raise ValueError(
            f"Rule {number} ({rule.pattern!r}) decides nothing: rule {first} ({rules[first].pattern!r}) before it takes "
            f"{matched[0]!r} and all else it matches. Put it first, or remove it."
        )
    if not rule.skip and not any(path in kernels for path in matched):
        raise ValueError(
            f"Rule {number} ({rule.pattern!r}) matches no kernel, only {', '.join(map(repr, matched[:3]))}."
        )

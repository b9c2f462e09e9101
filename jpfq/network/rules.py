"""Rules: settings for kernels by path. The first rule that matches a kernel applies."""

import dataclasses
import difflib
import re
from collections.abc import Container, Sequence
from typing import Literal, NamedTuple

from jax.typing import DTypeLike

from ..calibrate.activation import Activations
from ..calibrate.curvature import Coupling
from ..matrix import Finish, Form, Hadamard, Method, Order, Prepare, Recipe, Shrinkage, recipe_of
from ..matrix.patches import Patches
from ..model.operands import CACHED, Operand
from ..scalar import Asymmetric, Constraint, Grid, Rounding, Scale, register_dataclass
from ..scalar.grid import Number

_static = {"static": True}
ANY = "\0"  # matched by patterns for everything, such as ".*"


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Rule:
    """The settings for quantizing the kernels whose path matches a regular expression.

    Args:
        pattern: a regular expression that must match the whole '/'-joined path: "head/.*", ".*kernel". A rule that takes
            embeddings and no other kernel, such as "embed.*", quantizes them by rows. Other rules, and ".*", leave them in
            float.
        bits: short for `grid=Integer(bits)`, or `Binary()` for one bit.
        grid: the alphabet; give this or `bits`.
        scale, rotation, order, prepare, method, rounding, step_dtype, form, block: the same as in `jpfq.solve`, with the
            same defaults.
        finish, shrinkage: likewise; None for none.
        plain: True for the method alone: settings that are not given are then neutral instead of recommended. Steps are
            `MinMSE()`, the order is natural, and there is nothing before or after the method. `Rule(".*", bits=4,
            method=jpfq.GPFQ(), plain=True)` is GPFQ as published except for its steps; `jpfq.paper` has those too.
        activation_bits: short for `activations=Activations(Asymmetric(activation_bits))`.
        activations: settings for quantizing the layer's input while the network runs; None leaves it in float.
        products: settings for both operands of products of data with data, such as queries, keys, probabilities and values;
            each has its steps along the axes that the product sums over. The pattern must match the operand's name, as
            `jpfq.plan` lists it: "blocks/0/attention/query". None leaves them in float.
        cache: settings for keys and values as a cache holds them, per head and token; a step is for what lies along the
            head. It takes the place of `products` there. A rule of `products` and `cache` alone leaves kernels to others.
        accumulator: integer sums that must never overflow, such as `jpfq.Accumulator(16, tile=64)`. Requires quantized
            activations. None does not bound sums.
        patches: the windows of a convolution for calibration: `jpfq.patches.AtMost(128)` for each of its inputs (the
            default), `All()`, `NonOverlapping()` or `Random(share)`.
        correct_bias: whether the mean error of the layer's output is subtracted from the bias that follows, if the layer
            has its own (that of a BatchNorm, for example).
        coupling: lets neurons compensate for each other's errors, for example `jpfq.Coupling(of="logits")`. None
            quantizes each neuron by itself.
        skip: True to leave these kernels in float.
        unsupported: the treatment of matched kernels that cannot be quantized (tied, computed, inside a loop ..). "skip"
            lists them with their reason, "error" raises. The default raises only if all matched kernels are unsupported.

    Examples:
        >>> cached = jpfq.Rule(".*", bits=4, cache=jpfq.Activations(jpfq.Asymmetric(4), per="row"))
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
    products: Activations | None = dataclasses.field(default=None, kw_only=True)
    cache: Activations | None = dataclasses.field(default=None, kw_only=True)
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
            raise ValueError(f"Rule({self.pattern!r}): unsupported is 'skip' or 'error'; got {self.unsupported!r}.")
        if self.skip:
            if self._settings() | self._around():
                names = sorted(self._settings() | self._around())
                raise ValueError(f"Rule({self.pattern!r}) skips its kernels, so {names} mean nothing in it.")
            return
        try:
            if self.quantizes_kernels:
                self.recipe()
            self.inputs()
        except ValueError as error:
            raise ValueError(f"Rule({self.pattern!r}): {error}") from error
        examples = (("activations", "Activations()"), ("patches", "patches.All()"), ("coupling", "Coupling()"))
        examples += (("products", "Activations()"), ("cache", "Activations()"))
        for name, example in examples:
            value = getattr(self, name)
            if isinstance(value, (type, str, int, float)):
                raise ValueError(
                    f"Rule({self.pattern!r}): {name} takes a setting such as jpfq.{example}; got {value!r}."
                )

    def matches(self, path: str) -> bool:
        """True if the pattern covers the whole path."""
        return re.fullmatch(self.pattern, path) is not None

    @property
    def quantizes_kernels(self) -> bool:
        """False for a rule about operands alone."""
        about_operands = self.products is not None or self.cache is not None
        return not about_operands or bool((self._settings() | self._around()).keys() - {"products", "cache"})

    def operand(self, operand: Operand) -> Operand:
        """An operand with the settings of this rule."""
        cached = self.cache is not None and operand.role in CACHED
        return dataclasses.replace(operand, activations=self.cache if cached else self.products, cached=cached)

    def recipe(self) -> Recipe:
        """The settings of this rule for one matrix, with the defaults filled in."""
        settings = self._settings()
        if self.coupling is not None:
            settings["form"] = "gram" if settings.get("form", "auto") == "auto" else settings["form"]
        activations = self.inputs()
        if self.accumulator is not None and activations is not None:
            activations.check_sums()
            settings["inputs"] = activations.grid
        recipe = recipe_of(settings.pop("bits", None), settings.pop("grid", None), self.plain, **settings)
        if self.coupling is not None and (recipe.needs_rows or recipe.scale.per.neurons != 1):
            conflict = "settings that need calibration rows" if recipe.scale.per.neurons == 1 else recipe.scale
            raise ValueError(
                f"coupling quantizes neurons one after the other, from a Gram, so it cannot be combined with {conflict}."
            )
        return recipe

    def of_embedding(self, path: str) -> Recipe:
        """The settings of this rule for an embedding, by rows.

        Raises:
            ValueError: it has settings for the inputs of a layer, which are integers here, or for calibration rows.
        """
        recipe = self.recipe()
        wrong = [
            name
            for name in ("activation_bits", "activations", "patches", "coupling")
            if getattr(self, name) is not None
        ]
        wrong += ["correct_bias"] * self.correct_bias + ["form='data' or such a preparation"] * recipe.needs_rows
        if wrong:
            raise ValueError(
                f"Rule({self.pattern!r}) matches {path}, an embedding, whose inputs are integers: {', '.join(wrong)} mean "
                "nothing for it. Give it a rule without them."
            )
        return recipe

    def inputs(self) -> Activations | None:
        """The settings for quantizing the inputs of these kernels; None if they are not quantized."""
        if self.activation_bits is None:
            return self.activations
        if self.activations is not None:
            raise ValueError("Give either activation_bits=... or activations=..., not both.")
        return Activations(Asymmetric(self.activation_bits))

    def _around(self):
        """The settings that concern the layer rather than its matrix."""
        names = ("activation_bits", "activations", "products", "cache", "patches", "coupling")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return given | {name: True for name in ("correct_bias", "plain") if getattr(self, name)}

    def _settings(self):
        names = ("bits", "grid", "scale", "rotation", "order", "prepare", "method", "rounding", "accumulator")
        names = (*names, "step_dtype", "form", "block")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        chosen = {name: getattr(self, name) for name in ("finish", "shrinkage")}  # None is a choice
        return given | {name: value for name, value in chosen.items() if value != "recommended"}


class Assignment(NamedTuple):
    """The kernels to quantize, with their rules, and those to skip. All by path."""

    recipes: dict[str, Recipe]  # of the kernels to quantize
    rules: dict[str, Rule]  # of the same kernels
    skipped: dict[str, str]  # the reason, for every other kernel
    refused: dict[str, str]  # those of them that a rule asks for, but that cannot be quantized
    embeddings: dict[str, Recipe]  # of the embeddings to quantize
    operands: tuple[Operand, ...] = ()  # to be rounded, with their settings


def as_rules(rules) -> tuple[Rule, ...]:
    """Rules as a tuple, from a number of bits, a rule, or a sequence of rules."""
    if isinstance(rules, int) and not isinstance(rules, bool):
        return (Rule(".*", bits=rules),)
    if isinstance(rules, Rule):
        return (rules,)
    if isinstance(rules, (list, tuple)) and rules and all(isinstance(rule, Rule) for rule in rules):
        return tuple(rules)
    raise ValueError(f"rules is a number of bits, a jpfq.Rule, or a non-empty list of them; got {rules!r}.")


def assign(
    rules: Sequence[Rule],
    matrices: dict[str, tuple[int, int]],
    reasons: dict[str, str],
    paths: Sequence[str],
    operands: Sequence[Operand] = (),
    embeddings: Container[str] = (),
) -> Assignment:
    """Assigns a rule to every kernel and operand.

    Args:
        rules: in order of precedence.
        matrices: by path of each kernel that can be quantized, the inputs and neurons of its matrices.
        reasons: the reason for every other kernel.
        paths: of all parameters.
        operands: of products of data with data.
        embeddings: some of the kernels with a reason. A rule that takes embeddings and no other kernel quantizes them,
            unless its pattern matches everything.

    Raises:
        ValueError: a rule matches nothing, or nothing beyond earlier rules, or only kernels that cannot be quantized
            (unless `Rule.unsupported` is "skip"); or there is nothing to quantize.
    """
    kernels = dict.fromkeys([*matrices, *reasons])
    of_kernels = [(i, rule) for i, rule in enumerate(rules) if rule.quantizes_kernels]
    taken = {path: next((i for i, rule in of_kernels if rule.matches(path)), None) for path in paths}
    reasons = {**reasons, **_misfits(rules, matrices, taken)}
    found = _rounded(rules, operands)
    named: dict[str, Recipe] = {}
    for index, rule in of_kernels:
        _check_used(index, rule, rules, taken, kernels)
        own = [path for path in kernels if taken[path] == index]
        if own and not rule.skip and not rule.matches(ANY) and all(path in embeddings for path in own):
            named.update((path, rule.of_embedding(path)) for path in own)
            continue
        refused = [path for path in own if path in reasons]
        strict = rule.unsupported == "error" or (rule.unsupported is None and len(refused) == len(own))
        if refused and strict and not rule.skip:
            listing = "\n".join(f"  {path}: {reasons[path]}" for path in refused[:8])
            raise ValueError(
                f"Rule {index} ({rule.pattern!r}) matches kernels that cannot be quantized:\n{listing}\n"
                "Skip them by a rule before it, or pass unsupported='skip' to this one."
            )
    recipes, applied, skipped = {}, {}, {}
    for path in kernels:
        index = taken[path]
        if index is None:
            skipped[path] = "no rule matches it"
        elif rules[index].skip:
            skipped[path] = f"rule {index} ({rules[index].pattern!r}) skips it"
        elif path in named:
            continue
        elif path in reasons:
            skipped[path] = reasons[path]
        else:
            applied[path], recipes[path] = rules[index], rules[index].recipe()
    if not (recipes or named or found):
        listing = "\n".join(f"  {path}: {reason}" for path, reason in skipped.items()) or "  it has no matrix products"
        raise ValueError(f"There is nothing to quantize in this model:\n{listing}")
    refused = {path: reason for path, reason in reasons.items() if skipped.get(path) == reason}
    return Assignment(recipes, applied, skipped, refused, named, found)


def _misfits(rules, matrices, taken) -> dict[str, str]:
    """The reasons of kernels whose rule lays groups over them that they cannot have."""
    ruled = {path: rules[taken[path]] for path in matrices if taken[path] is not None}
    found = {path: rule.recipe().misfit(*matrices[path]) for path, rule in ruled.items() if not rule.skip}
    return {path: reason for path, reason in found.items() if reason is not None}


def _rounded(rules, operands) -> tuple[Operand, ...]:
    """The operands to be rounded, each by the first rule that matches its name."""
    found, used = [], set()
    for operand in operands:
        index, rule = next(((i, rule) for i, rule in enumerate(rules) if rule.matches(operand.path)), (None, None))
        if rule is not None and (own := rule.operand(operand)).activations is not None:
            own.activations.check_layer(own.layout, own.path)
            found.append(own)
            used |= {(index, own.cached)}
    for index, rule in enumerate(rules):
        for name, cached in (("products", False), ("cache", True)):
            if getattr(rule, name) is not None and (index, cached) not in used:
                names = [operand.path for operand in operands if not cached or operand.role in CACHED]
                listing = f"{', '.join(names[:8])}{', ..' if len(names) > 8 else ''}" if names else "there are none"
                kind = "keys or values of an attention" if cached else "operands of products of data with data"
                raise ValueError(
                    f"Rule {index} ({rule.pattern!r}): {name} applies to no {kind} that earlier rules leave. Their names: "
                    f"{listing}. A pattern must match the whole name."
                )
    return tuple(found)


def _check_used(index, rule, rules, taken, kernels):
    """Raises if a rule has no effect."""
    matched = [path for path in taken if rule.matches(path)]
    if not matched:
        near = difflib.get_close_matches(rule.pattern, list(kernels) or list(taken), n=3, cutoff=0.3)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        some = ", ".join(list(kernels)[:8]) + (", .." if len(kernels) > 8 else "")
        raise ValueError(
            f"Rule {index} ({rule.pattern!r}) matches no parameter.{hint} Kernels: {some}. "
            "A pattern must match the whole path."
        )
    if not any(taken[path] == index for path in matched):
        first = taken[matched[0]]
        raise ValueError(
            f"Rule {index} ({rule.pattern!r}) has no effect: rule {first} ({rules[first].pattern!r}) before it takes "
            f"{matched[0]!r}, and earlier rules everything else that it matches. Put it first, or remove it."
        )
    if not rule.skip and not any(path in kernels for path in matched):
        raise ValueError(
            f"Rule {index} ({rule.pattern!r}) matches no kernel, only {', '.join(map(repr, matched[:3]))}. Kernels: "
            f"{', '.join(list(kernels)[:8])}."
        )

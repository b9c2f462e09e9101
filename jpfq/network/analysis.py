"""Analysis: applies the rules to a traced model, before any batch runs. Which sites are quantized, with which settings."""

import dataclasses
import zlib
from collections.abc import Container, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..calibrate.activation import Activations
from ..calibrate.batches import Shaped
from ..calibrate.bias import find_biases
from ..calibrate.curvature import curvatures
from ..calibrate.stops import matrix_uses
from ..matrix.arrays import are_finite
from ..matrix.layout import ConvLayout
from ..model.embeddings import Embedding
from ..model.functional import Functional
from ..model.operands import Operand, find_operands, moved, with_operand_taps
from ..model.program import Program
from ..model.sites import CASTS, Site, with_shared_together, with_taps
from ..model.traced import Traced, find_kernels
from .rules import Assignment, Rule, assign


class Analysis(NamedTuple):
    """A traced model with its rules applied."""

    program: Program
    sites: list[Site]  # to be quantized
    assignment: Assignment
    embeddings: list[Embedding]  # to be quantized
    source: Program  # as traced: the products of the embeddings are equations of it
    operands: Sequence[Operand] = ()  # to be rounded

    @property
    def points(self) -> list[Site | Operand]:
        """The sites, and after them the operands."""
        return [*self.sites, *self.operands]

    @property
    def replaced(self) -> frozenset:
        """The variables by which the program reads these embeddings."""
        return frozenset().union(*(embedding.operands for embedding in self.embeddings))


def analyse(functional: Functional, rules: Sequence[Rule], example: Any, strict: bool = False) -> Analysis:
    """Traces a model, finds its kernels and applies the rules. It needs shapes only, no values."""
    return apply_rules(functional, find_kernels(functional, example), rules, strict)


def find_all_kernels(functional: Functional, shaped: Sequence[Shaped]) -> list[Traced]:
    """Traces a model for each shape of batch.

    Raises:
        ValueError: the model runs on the first shape but not on another.
    """
    shapes = lambda group: ", ".join(str(x.shape) for x in group.leaves[0])
    first, *others = shaped
    traced = [find_kernels(functional, first.example)]
    for group in others:
        try:
            traced.append(find_kernels(functional, group.example))
        except Exception as error:
            raise ValueError(
                f"The model runs on the first batch, of shapes {shapes(first)}, but fails on one of shapes {shapes(group)}: "
                f"{error}"
            ) from error
    return traced


def analyse_all(
    functional: Functional, traced: Sequence[Traced], rules: Sequence[Rule], strict: bool
) -> list[Analysis]:
    """Applies the rules to a model traced for each shape of batch. All shapes must use the same kernels."""
    analyses = [apply_rules(functional, one, rules, strict) for one in traced]
    for other in analyses[1:]:
        alike = [
            (
                [_product(site) for site in analysis.sites],
                [_rows(embedding) for embedding in analysis.embeddings],
                [operand.path for operand in analysis.operands],
            )
            for analysis in (other, analyses[0])
        ]
        if alike[0] != alike[1]:
            raise ValueError(
                "The model uses other kernels for batches of another size: calibrate with batches of one size."
            )
    check_finite(functional, analyses[0].assignment)
    return analyses


def _product(site):
    """The properties of a site that all shapes of batches must share. The padding of a convolution may differ."""
    layout = site.layout
    layout = dataclasses.replace(layout, padding=()) if isinstance(layout, ConvLayout) else layout
    return site.path, layout


def _rows(embedding):
    return embedding.path, embedding.layout, [_product(site) for site in embedding.products]


def apply_rules(functional: Functional, traced: Traced, rules: Sequence[Rule], strict: bool = False) -> Analysis:
    """Assigns a rule to each kernel and its settings to each site."""
    program, sites, reasons, embeddings = traced
    trainable = [path for path, ok in zip(functional.paths, functional.trainable, strict=True) if ok]
    rounds = any(rule.products is not None or rule.cache is not None for rule in rules)
    operands = find_operands(program, sites) if rounds else []
    matrices = {site.path: site.layout.dims[1:] for site in sites}
    assignment = assign(rules, matrices, reasons, trainable, operands, {e.path for e in embeddings})
    if strict and assignment.refused:
        listing = "\n".join(f"  {path}: {reason}" for path, reason in assignment.refused.items())
        raise ValueError(
            f"strict=True, and these kernels cannot be quantized:\n{listing}\nSkip them by a rule with skip=True."
        )
    program, sites = with_shared_together(program, [site for site in sites if site.path in assignment.recipes])
    operands = moved(traced.program, program, assignment.operands)
    corrected = any(assignment.rules[site.path].correct_bias for site in sites)
    biases = find_biases(program, sites, list(functional.trainable)) if corrected else {}
    sites = [_with_rule(site, assignment.rules[site.path], biases.get(site.index)) for site in sites]
    program, sites = with_taps(program, sites)
    program, operands = with_operand_taps(program, operands) if operands else (program, operands)
    for path, recipe in assignment.recipes.items():
        if recipe.rotation is not None:
            _check_rotation(path, [site for site in sites if site.path == path], program)
    embeddings = [embedding for embedding in embeddings if embedding.path in assignment.embeddings]
    return Analysis(program, sites, assignment, embeddings, traced.program, operands)


def _with_rule(site, rule, bias):
    """A site with the settings of its rule."""
    activations = rule.inputs()
    if activations is not None:
        activations.check_layer(site.layout, site.path)
    bias = bias if rule.correct_bias else None
    return dataclasses.replace(site, activations=activations, patches=rule.patches, bias=bias)


def block_of(site: Site) -> Any:
    """The block of a site: its path up to the first part with a number, or its index in a stack of layers."""
    parts = site.path.split("/")
    end = next((i for i, part in enumerate(parts[:-1]) if any(c.isdigit() for c in part)), len(parts) - 1)
    indices = [int(eqn.invars[1].val) for eqn, _ in site.chain.steps if eqn.primitive.name == "dynamic_slice"]
    return tuple(indices) or tuple(parts[: end + 1])


def _check_rotation(path, sites, program):
    """Raises if a kernel cannot be rotated: dequantizing rotates it back as a whole, so it must be one matrix as stored."""
    shape = program.params[sites[0].leaf].aval.shape
    several = any(site.first != sites[0].first for site in sites)
    if several or any(eqn.primitive.name not in CASTS for eqn, _ in sites[0].chain.steps):
        raise ValueError(
            f"Hadamard cannot be folded into {path} {shape}: the model reshapes, transposes or slices this kernel before it "
            "multiplies, or uses it in several ways. Give it a rule without rotation."
        )


def activations_of(assignment: Assignment) -> dict[str, Activations | None]:
    """The settings for quantizing the inputs of each kernel, by its path, and those of operands by their name."""
    found = {path: rule.inputs() for path, rule in assignment.rules.items()}
    return found | {operand.path: operand.activations for operand in assignment.operands}


def check_finite(functional: Functional, assignment: Assignment) -> None:
    """Raises if a kernel to be quantized is not finite."""
    leaves = dict(zip(functional.paths, functional.leaves, strict=True))
    named = assignment.recipes | assignment.embeddings
    paths = [path for path in functional.paths if path in named]
    for path, finite in zip(paths, are_finite([leaves[path] for path in paths]), strict=True):
        if not finite:
            raise ValueError(
                f"The kernel {path} holds NaN or infinity. Repair it, or skip it by a rule with skip=True."
            )


def check_key(assignment: Assignment, key: jax.Array | None) -> None:
    """Raises if a part draws random numbers and there is no key."""
    for path, recipe in (assignment.recipes | assignment.embeddings).items():
        patches = assignment.rules[path].patches if path in assignment.rules else None
        for part in (recipe.rounding, patches):
            if part is not None and part.random and key is None:
                raise ValueError(f"{part} of {path} draws random numbers: pass key=jax.random.key(...).")


def couple(
    functional: Functional, analyses, shaped: Sequence[Shaped], groups, key: jax.Array | None, solved: Container = ()
) -> dict:
    """The coupling of each coupled site, by stop and position: its settings, and its curvature over all batches.

    Sites that are measured together are omitted once all of them are solved. If one of them is not, the same program is
    compiled for all, so that its curvature stays the same to the bit.
    """
    first = analyses[0]
    couplings = {i: first.assignment.rules[site.path].coupling for i, site in enumerate(first.sites)}
    couplings = {i: coupling for i, coupling in couplings.items() if coupling is not None}
    uses = matrix_uses([[first.points[i] for i in group] for group in groups])  # a shared matrix has one curvature
    indices = {groups[stop][i]: index for index, shared in uses.items() for stop, i in shared}
    needed = {coupling.measured for i, coupling in couplings.items() if indices[i] not in solved}
    couplings = {i: coupling for i, coupling in couplings.items() if coupling.measured in needed}
    if not couplings:
        return {}
    key = jax.random.fold_in(jax.random.key(0) if key is None else key, zlib.crc32(b"coupling"))
    total: dict = {}
    for shape, (a, group) in enumerate(zip(analyses, shaped, strict=True)):
        sites = {i: a.sites[i] for i in couplings}
        part = jax.random.fold_in(key, shape)
        found = curvatures(a.program, functional.leaves, group.leaves, group.weights, sites, couplings, part)
        total |= {i: F if i not in total else total[i] + F for i, F in found.items()}
    for i, F in total.items():
        if not 0 < float(jnp.trace(F.sum(0))) < float("inf"):
            raise ValueError(
                f"coupling: the derivatives of the float network's outputs by the output of {first.sites[i].path} are 0 or "
                "overflow. Return logits, not labels; calibrate in float32; or do not couple this kernel."
            )
    found: dict = {}
    for i, coupling in couplings.items():
        _, before = found.get(indices[i], (coupling, None))
        found[indices[i]] = coupling, total[i] if before is None else before + total[i]
    return found

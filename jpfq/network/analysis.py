"""A model as its rules have it: which kernels are quantized, and what each needs, before any batch is run."""

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
from ..model.functional import Functional
from ..model.kernels import Traced, find_kernels
from ..model.program import Program
from ..model.sites import CASTS, Site, with_shared_together, with_taps
from .rules import Assignment, Rule, assign


class Analysis(NamedTuple):
    """A traced model, and what the rules make of it."""

    program: Program
    sites: list[Site]  # to be quantized
    assignment: Assignment


def analyse(functional: Functional, rules: Sequence[Rule], example: Any, strict: bool = False) -> Analysis:
    """Traces a model, finds its kernels and gives each its rule. Values are not looked at: shapes will do."""
    return ruled(functional, find_kernels(functional, example), rules, strict)


def find_all_kernels(functional: Functional, shaped: Sequence[Shaped]) -> list[Traced]:
    """Traces a model on each shape of batch.

    Raises:
        ValueError: it runs on the first and not on another.
    """
    shapes = lambda group: ", ".join(str(x.shape) for x in group.leaves[0])
    first, *others = shaped
    traced = [find_kernels(functional, first.example)]
    for group in others:
        try:
            traced.append(find_kernels(functional, group.example))
        except Exception as error:
            raise ValueError(
                f"The model runs on the first batch, of shapes {shapes(first)}, but not on one of shapes {shapes(group)}: "
                f"{error}"
            ) from error
    return traced


def rule_all(
    functional: Functional, traced: "Sequence[Traced]", rules: Sequence[Rule], strict: bool
) -> "list[Analysis]":
    """Applies the rules to a model, for each shape of batch it is traced on; the same kernels must be quantized."""
    analyses = [ruled(functional, one, rules, strict) for one in traced]
    for other in analyses[1:]:
        if [_product(s) for s in other.sites] != [_product(s) for s in analyses[0].sites]:
            raise ValueError("The model multiplies other kernels for batches of another size: calibrate with one size.")
    check_finite(functional, analyses[0].assignment)
    return analyses


def _product(site):
    """The parts of a site that all shapes of batches must share; the padding of a convolution may depend on sizes."""
    layout = site.layout
    layout = dataclasses.replace(layout, padding=()) if isinstance(layout, ConvLayout) else layout
    return site.path, layout


def ruled(functional: Functional, traced: Traced, rules: Sequence[Rule], strict: bool = False) -> Analysis:
    """Gives each kernel its rule."""
    program, sites, reasons = traced
    trainable = [path for path, ok in zip(functional.paths, functional.trainable, strict=True) if ok]
    assignment = assign(rules, list(dict.fromkeys(site.path for site in sites)), reasons, trainable)
    refused = {path: reason for path, reason in reasons.items() if assignment.skipped.get(path) == reason}
    if strict and refused:
        listing = "\n".join(f"  {path}: {reason}" for path, reason in refused.items())
        raise ValueError(f"strict=True, and these kernels cannot be quantized:\n{listing}\nSkip them by a rule.")
    program, sites = with_shared_together(program, [site for site in sites if site.path in assignment.recipes])
    corrected = any(assignment.rules[site.path].correct_bias for site in sites)
    biases = find_biases(program, sites, list(functional.trainable)) if corrected else {}
    sites = [_as_ruled(site, assignment.rules[site.path], biases.get(site.index)) for site in sites]
    program, sites = with_taps(program, sites)
    for path, recipe in assignment.recipes.items():
        if recipe.rotation is not None:
            _check_rotation(path, [site for site in sites if site.path == path], program)
    return Analysis(program, sites, assignment)


def _as_ruled(site, rule, bias):
    """A site with what its rule says of the layer."""
    activations = rule.inputs()
    if activations is not None:
        activations.check_layer(site.layout, site.path)
    bias = bias if rule.correct_bias else None
    return dataclasses.replace(site, activations=activations, patches=rule.patches, bias=bias)


def block_of(site: Site) -> Any:
    """The block of a site: its path up to the first part with a number; in a stack of layers the place in the stack."""
    parts = site.path.split("/")
    end = next((i for i, part in enumerate(parts[:-1]) if any(c.isdigit() for c in part)), len(parts) - 1)
    places = [int(eqn.invars[1].val) for eqn, _ in site.chain.steps if eqn.primitive.name == "dynamic_slice"]
    return tuple(places) or tuple(parts[: end + 1])


def _check_rotation(path, sites, program):
    """Dequantizing turns a kernel back as a whole, so it must be one matrix as it stands."""
    shape = program.params[sites[0].leaf].aval.shape
    several = any(site.first != sites[0].first for site in sites)
    if several or any(eqn.primitive.name not in CASTS for eqn, _ in sites[0].chain.steps):
        raise ValueError(
            f"Hadamard cannot be folded into {path} {shape}: the model reshapes, transposes or slices this kernel before it "
            "multiplies, or uses it in more ways than one. Give it a rule without rotation."
        )


def activations_of(assignment: Assignment) -> dict[str, Activations | None]:
    """The settings by which the inputs of each kernel are quantized."""
    return {path: rule.inputs() for path, rule in assignment.rules.items()}


def check_finite(functional: Functional, assignment: Assignment) -> None:
    """Raises where a kernel to be quantized is not finite."""
    leaves = dict(zip(functional.paths, functional.leaves, strict=True))
    paths = [path for path in functional.paths if path in assignment.recipes]
    for path, finite in zip(paths, are_finite([leaves[path] for path in paths]), strict=True):
        if not finite:
            raise ValueError(f"The kernel {path} holds NaN or infinity.")


def check_key(assignment: Assignment, key: jax.Array | None) -> None:
    """Raises where random numbers are drawn and there is no key."""
    for path, recipe in assignment.recipes.items():
        patches = assignment.rules[path].patches
        for part in (recipe.rounding, patches):
            if part is not None and part.random and key is None:
                raise ValueError(f"{part} of {path} draws random numbers: pass key=jax.random.key(...).")


def couple(
    functional: Functional, analyses, shaped: Sequence[Shaped], groups, key: jax.Array | None, solved: Container = ()
) -> dict:
    """By stop and position, how the neurons of a site are coupled, and its curvature over all batches.

    Sites that are measured together are left out where all of them are solved; where one is not, what is compiled for them
    stays the same, and so its curvature, to the bit.
    """
    first = analyses[0]
    how = {i: first.assignment.rules[site.path].coupling for i, site in enumerate(first.sites)}
    how = {i: coupling for i, coupling in how.items() if coupling is not None}
    uses = matrix_uses([[first.sites[i] for i in group] for group in groups])  # a shared matrix has one curvature
    places = {groups[stop][i]: place for place, shared in uses.items() for stop, i in shared}
    needed = {coupling.measured for i, coupling in how.items() if places[i] not in solved}
    how = {i: coupling for i, coupling in how.items() if coupling.measured in needed}
    if not how:
        return {}
    key = jax.random.fold_in(jax.random.key(0) if key is None else key, zlib.crc32(b"coupling"))
    total: dict = {}
    for number, (a, group) in enumerate(zip(analyses, shaped, strict=True)):
        sites = {i: a.sites[i] for i in how}
        part = jax.random.fold_in(key, number)
        found = curvatures(a.program, functional.leaves, group.leaves, group.weights, sites, how, part)
        total |= {i: F if i not in total else total[i] + F for i, F in found.items()}
    for i, F in total.items():
        if not 0 < float(jnp.trace(F.sum(0))) < float("inf"):
            raise ValueError(
                f"coupling: by derivatives of the float network, its outputs do not depend on {first.sites[i].path}, or "
                "more than numbers can hold. Return logits, not labels; calibrate in float32; or couple other kernels only."
            )
    found: dict = {}
    for i, coupling in how.items():
        _, before = found.get(places[i], (coupling, None))
        found[places[i]] = coupling, total[i] if before is None else before + total[i]
    return found

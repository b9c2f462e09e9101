"""Operands: the two sides of each product of data with data, such as queries and keys, or probabilities and values.

Products of attention are recognised by their softmax. An operand that comes from another product through an exponential is
`probabilities`, and its partner is `value`. In the product that it comes from, `key` is the operand whose positions those
probabilities are about, and `query` the other one. All else is `left` and `right`.
"""

import collections
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import jax.numpy as jnp

from ..matrix.layout import DotLayout
from .compat import PRODUCTS, is_literal
from .functional import Functional, numbered
from .program import Program
from .sites import Site, Tap

T = TypeVar("T")  # a rounding
Role = Literal["query", "key", "probabilities", "value", "left", "right"]
CACHED = ("key", "value")
EXPONENTIALS = ("exp", "exp2")


@dataclasses.dataclass(frozen=True, eq=False)
class Operand:
    """One side of a product of data with data: a place in a model where data are quantized without a weight.

    Its name is that of the module around it, by the kernels that it is computed from, and its role.
    """

    path: str
    role: Role
    index: int  # of the product among the program's equations
    side: int  # 0 or 1
    data: Any  # variable, or a `Tap` of it
    contracted: tuple[int, ...]  # axes that the product sums over
    free: tuple[int, ...]  # axes of its own: neither contracted nor batched
    activations: Any = None  # `Activations`, its settings
    cached: bool = False  # whether rows run along the free axes of a value, as a cache holds it

    use = 0
    shares = ()
    patches = bias = None

    @property
    def first(self) -> int:
        """The index of its product."""
        return self.index

    @property
    def reads(self) -> tuple:
        """A key that no site and no other operand has."""
        return self.path, self.data, self.index, self.side

    @property
    def layout(self) -> DotLayout:
        """The layout whose rows share a step: along the contracted axes, or along the head of a cached value."""
        axes = self.free if self.cached and self.role == "value" else self.contracted
        shape = tuple(self.data.aval.shape[i] for i in axes)
        return DotLayout(shape, tuple(range(len(axes))), (), axes, (), False)


class _Origin(NamedTuple):
    """The sources of a value since the last products: products of data by index, kernels by path, and any exponential."""

    products: frozenset = frozenset()
    kernels: frozenset = frozenset()
    exponential: bool = False


def find_operands(program: Program, sites: Sequence[Site]) -> list[Operand]:
    """The operands of all products of data with data, in the order of execution; `sites` are those of all kernels."""
    origins, products = _origins(program, {site.index: site.path for site in sites})
    roles = _roles(program, origins, products)
    kernels: dict[int, frozenset] = {}
    found = []
    for index in products:
        eqn = program.equations[index]
        near = [origins[v] for v in eqn.invars]
        earlier = [kernels[i] for origin in near for i in origin.products]
        kernels[index] = frozenset().union(*(origin.kernels for origin in near), *earlier)
        module = _common(kernels[index])
        for side, role in enumerate(roles.get(index, ("left", "right"))):
            found.append(Operand(f"{module}{role}", role, index, side, eqn.invars[side], *_axes(eqn, side)))
    names = numbered([*program.paths, *(operand.path for operand in found)])[len(program.paths) :]
    return [dataclasses.replace(operand, path=name) for operand, name in zip(found, names, strict=True)]


def moved(before: Program, after: Program, operands: Sequence[Operand]) -> list[Operand]:
    """The operands of a program in the same one with its equations in another order."""
    if before.equations == after.equations:
        return list(operands)
    places = {eqn.outvars[0]: i for i, eqn in enumerate(after.equations) if eqn.outvars}
    place = lambda operand: places[before.equations[operand.index].outvars[0]]
    return [dataclasses.replace(operand, index=place(operand)) for operand in operands]


def with_operand_taps(program: Program, operands: Sequence[Operand]) -> tuple[Program, list[Operand]]:
    """The program with a tap at each operand."""
    equations, last_use, tapped = list(program.equations), dict(program.last_use), []
    for operand in operands:
        tap, eqn = Tap(operand.data), equations[operand.index]
        invars = [tap if side == operand.side else v for side, v in enumerate(eqn.invars)]
        equations[operand.index] = eqn.replace(invars=invars)
        last_use[tap] = operand.index
        tapped.append(dataclasses.replace(operand, data=tap))
    return dataclasses.replace(program, equations=tuple(equations), last_use=last_use), tapped


def rounded_operands(
    functional: Functional, program: Program, sites: Sequence[Site], inputs: Mapping[str, Sequence[T]]
) -> dict[tuple[int, int], T]:
    """The roundings of operands among those of `inputs`, by the index of a product and the side of it.

    Raises:
        ValueError: an operand is not in this program.
    """
    names = inputs.keys() - set(program.paths)
    if not names:
        return {}
    state = {path for path, ok in zip(functional.paths, functional.trainable, strict=True) if not ok}
    operands = {o.path: o for o in find_operands(program, [site for site in sites if site.path not in state])}
    if missing := sorted(names - operands.keys()):
        raise ValueError(
            f"For a batch of this shape the model has no operand {missing[0]!r}, which was calibrated; it has "
            f"{', '.join(operands) or 'none'}. Give batches for which it computes the same products."
        )
    return {(operands[name].index, operands[name].side): inputs[name][0] for name in names}


def _origins(program, kernels) -> tuple[dict[Any, _Origin], list[int]]:
    """The origin of each variable, and the products of data with data."""
    origins: dict[Any, _Origin] = collections.defaultdict(_Origin)
    products = []
    for index, eqn in enumerate(program.equations):
        if program.is_fixed(eqn):
            continue
        if index in kernels:
            origin = _Origin(kernels=frozenset([kernels[index]]))
        elif _multiplies_data(program, eqn):
            products.append(index)
            origin = _Origin(products=frozenset([index]))
        elif eqn.primitive.name in PRODUCTS:
            origin = _Origin()
        else:
            read = [origins[v] for v in eqn.invars if not is_literal(v) and v in origins]
            union = lambda name, read=read: frozenset().union(*(getattr(origin, name) for origin in read))
            through = eqn.primitive.name in EXPONENTIALS or any(origin.exponential for origin in read)
            origin = _Origin(union("products"), union("kernels"), through)
        origins.update((v, origin) for v in eqn.outvars)
    return origins, products


def _multiplies_data(program, eqn):
    if eqn.primitive.name != "dot_general" or not all(jnp.issubdtype(v.aval.dtype, jnp.floating) for v in eqn.invars):
        return False
    return all(not is_literal(v) and v not in program.fixed for v in eqn.invars) and bool(_axes(eqn, 0)[0])


def _roles(program, origins, products) -> dict[int, tuple[Role, Role]]:
    """The roles of both sides of the products of attention."""
    producers = {v: index for index, eqn in enumerate(program.equations) for v in eqn.outvars}
    roles: dict[int, tuple[Role, Role]] = {}
    for index in products:
        eqn = program.equations[index]
        sides = [side for side in (0, 1) if (o := origins[eqn.invars[side]]).exponential and o.products]
        if len(sides) != 1:
            continue
        (side,) = sides
        (axis, *more), (scores, *others) = _axes(eqn, side)[0], origins[eqn.invars[side]].products
        key = None if more or others else _side_of(program, origins, producers, eqn.invars[side], axis, scores)
        if key is not None:  # otherwise neither is known: a cache has both keys and values
            roles.setdefault(index, ("value", "probabilities") if side else ("probabilities", "value"))
            roles.setdefault(scores, ("query", "key") if key else ("key", "query"))
    return roles


def _side_of(program, origins, producers, v, axis, product) -> int | None:
    """The side of a product that an axis of a later value belongs to; None if that cannot be followed."""
    while producers[v] != product:
        eqn = program.equations[producers[v]]
        reads = [u for u in eqn.invars if not is_literal(u) and product in origins[u].products]
        same = [u for u in reads if u.aval.shape == v.aval.shape]
        name = eqn.primitive.name
        if name == "transpose":
            v, axis = reads[0], eqn.params["permutation"][axis]
        elif same:
            v = same[0]
        elif name in ("reshape", "broadcast_in_dim", "squeeze", "expand_dims") and len(reads) == 1:
            before, after = reads[0].aval.shape, v.aval.shape
            ahead = math.prod(after[:axis])
            places = [i for i, n in enumerate(before) if n == after[axis] and math.prod(before[:i]) == ahead]
            if name == "broadcast_in_dim":
                dims = eqn.params["broadcast_dimensions"]
                places = [i for i, place in enumerate(dims) if place == axis and before[i] == after[axis]]
            if len(places) != 1:  # merged, split or repeated; or of size 1, which may be any
                return None
            v, axis = reads[0], places[0]
        else:
            return None
    eqn = program.equations[product]
    batch, own = len(eqn.params["dimension_numbers"][1][0]), len(_axes(eqn, 0)[1])
    return None if axis < batch else int(axis >= batch + own)


def _axes(eqn, side) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The contracted axes of one side of a product, and its own."""
    contract, batch = eqn.params["dimension_numbers"]
    taken = {*contract[side], *batch[side]}
    return tuple(contract[side]), tuple(i for i in range(eqn.invars[side].aval.ndim) if i not in taken)


def _common(paths) -> str:
    """The module that all kernels of these paths are in, with a slash after it."""
    parts = [path.split("/")[:-1] for path in paths]
    shared = [names[0] for names in itertools.takewhile(lambda names: len(set(names)) == 1, zip(*parts))]
    return "".join(f"{name}/" for name in shared)

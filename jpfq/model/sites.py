"""Sites: the products of data with a weight, which is what can be quantized; and the reason for every weight without one.

The chain of a weight are the structural steps (casts, reshapes, slices of a stack) and constant factors by which the program
computes it from its parameter.
"""

import collections
import dataclasses
import functools
import heapq
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..matrix.arrays import at_least_float32
from ..matrix.host import numpy_or_jit
from ..matrix.layout import ConvLayout, DotLayout, Layout
from .canonical import canonical
from .compat import PRODUCTS, bind, inner_jaxprs, is_literal
from .program import Program, has_product

CASTS = {"convert_element_type", "reduce_precision"}
STRUCTURAL = CASTS | {
    "reshape", "transpose", "squeeze", "expand_dims", "slice", "dynamic_slice", "split", "rev", "broadcast_in_dim",
    "copy", "copy_p", "stop_gradient", "sharding_constraint", "device_put", "optimization_barrier",
}  # fmt: skip
NO_KERNEL = "not as the weight of a product"  # in the reason for a parameter that is added, multiplied and the like
FACTORS = {"mul", "div"}  # by one positive constant, such as the gain of an equalized learning rate


@dataclasses.dataclass(frozen=True, eq=False)
class Chain:
    """The structural steps from a parameter to the operand of a product. Equal chains read the same entries in one way."""

    steps: tuple = ()  # (equation, index of its output)

    def __call__(self, leaf: jax.Array) -> jax.Array:
        """The operand of the product, from the parameter."""
        for eqn, position in self.steps:
            leaf = self._step(eqn, leaf)[position]
        return leaf

    def scatter(self, operand: jax.Array, shape: tuple[int, ...], scaled: bool = False) -> jax.Array:
        """A parameter of the given shape that holds `operand` where the chain reads it, and 0 elsewhere. Does not cast.

        scaled: whether to divide by the constant factors of the chain (for values) or not (for codes).
        """
        if not self.steps:
            return operand
        (leaf,) = jax.linear_transpose(self.arrange, jax.ShapeDtypeStruct(shape, operand.dtype))(operand)
        return leaf / self.factor if scaled else leaf

    def arrange(self, leaf: jax.Array) -> jax.Array:
        """Applies the chain without casts and factors, for arrays that are not values, such as codes."""
        for eqn, position in self.steps:
            leaf = leaf if eqn.primitive.name in CASTS | FACTORS else self._step(eqn, leaf)[position]
        return leaf

    @property
    def factor(self) -> float:
        """The product of the chain's constant factors."""
        return math.prod(factor(eqn) or 1.0 for eqn, _ in self.steps)

    @staticmethod
    def _step(eqn, leaf):
        return bind(eqn, [v.val if is_literal(v) else leaf for v in eqn.invars])

    @functools.cached_property
    def _key(self):
        return tuple((canonical(e), tuple(str(v) for v in e.invars if is_literal(v)), i) for e, i in self.steps)

    def __eq__(self, other):
        return isinstance(other, Chain) and self._key == other._key

    def __hash__(self):
        return hash(self._key)


@dataclasses.dataclass(frozen=True, eq=False)
class Site:
    """A product of data with a weight: the place in a model where a kernel is used, and quantized."""

    path: str  # of the parameter
    leaf: int  # index of the parameter
    index: int  # of the product among the program's equations
    weight: Any  # variable of the weight operand
    data: Any  # variable of the data operand, or a `Tap` of it
    chain: Chain
    layout: Layout
    activations: Any = None  # `Activations` if the data are quantized
    patches: Any = None  # `Patches`, the selection of rows for calibration
    bias: Any = None  # `Bias` if the mean error is corrected
    use: int = 0  # index among the products with this parameter, in the order of the model
    shares: tuple[int, ...] = ()  # indices of all products with the same matrices, if there are several

    @property
    def first(self) -> int:
        """The index of the first product with these matrices; they are quantized before it."""
        return self.shares[0] if self.shares else self.index

    @property
    def matrix(self) -> tuple:
        """A key, equal for sites with the same matrices."""
        return self.leaf, self.chain, self.layout.matrices_key

    @property
    def reads(self) -> tuple:
        """A key, equal for sites with the same Gram: the data, and how they become rows."""
        return self.data, self.layout.rows_key, self.activations, self.patches

    def matrices(self, leaf: jax.Array) -> jax.Array:
        """The weight as matrices (B, in, out), in float32 or wider, from the parameter."""
        return _matrices(leaf, self.chain, self.layout)


@numpy_or_jit("chain", "layout", unless=lambda leaf, chain, layout: bool(chain.steps))
def _matrices(leaf, chain, layout):
    return at_least_float32(layout.matrices(chain(leaf)))


class Tap:
    """A new variable for the input of sites, which the quantized network rounds and the float one does not."""

    def __init__(self, source: Any):
        self.source, self.aval = source, source.aval


def with_taps(program: Program, sites: Sequence[Site]) -> tuple[Program, list[Site]]:
    """The program with a tap before each site whose activations are quantized. Sites with the same input share one."""
    taps: dict = {}
    equations, last_use, tapped = list(program.equations), dict(program.last_use), []
    for site in sites:
        if site.activations is not None:
            tap = taps.setdefault(site.reads, Tap(site.data))
            eqn = equations[site.index]
            equations[site.index] = eqn.replace(invars=[tap if v is site.data else v for v in eqn.invars])
            last_use[tap] = max(last_use.get(tap, 0), site.index)
            site = dataclasses.replace(site, data=tap)
        tapped.append(site)
    return dataclasses.replace(program, equations=tuple(equations), last_use=last_use), tapped


def find_sites(program: Program) -> tuple[list[Site], dict[str, str]]:
    """The sites of a program, and the reason for each parameter that cannot be quantized, by path.

    These are the parameters of rank 2 or more, and those that are used by a product in any way.
    """
    return Finder(program).finish()


class Lookup(NamedTuple):
    """An equation that reads entries of a parameter along one axis, at integers that are data: an embedding."""

    table: Any  # variable of the operand that is read from
    chain: Chain  # from the parameter to it
    axis: int  # of the operand


class Finder:
    """Follows every parameter in one pass over the equations of a program."""

    def __init__(self, program: Program):
        self.program = program
        self.lookups: dict[int, list[Lookup | None]] = collections.defaultdict(
            list
        )  # leaf -> its gathers; None: others
        self.origin: dict = {v: (leaf, Chain()) for leaf, v in enumerate(program.params)}
        self.computed: dict = {}  # fixed variable that is not a view -> the leaves it is computed from
        self.sites: list[Site] = []
        self.refused: dict[int, str] = {}  # leaf -> reason why a product with it is not a site
        self.uses: dict[int, set[str]] = collections.defaultdict(set)  # leaf -> other primitives that use it
        self.count = collections.Counter()  # leaf -> number of products that use it
        for index, eqn in enumerate(program.equations):
            self.visit(index, eqn)

    def visit(self, index, eqn):
        name = eqn.primitive.name
        views = [v for v in eqn.invars if not is_literal(v) and v in self.origin]
        if name in PRODUCTS:
            self.product(index, eqn, views)
        elif views and is_step(eqn):
            leaf, chain = self.origin[views[0]]
            for position, out in enumerate(eqn.outvars):
                self.origin[out] = leaf, Chain((*chain.steps, (eqn, position)))
            return
        else:
            for v in views:
                self.uses[self.origin[v][0]].add(_use(eqn))
                if name == "gather":
                    self.lookups[self.origin[v][0]].append(self.lookup(eqn, v))
        if self.program.is_fixed(eqn):
            leaves = set().union(*(self.leaves(v) for v in eqn.invars if not is_literal(v)))
            self.computed.update((v, leaves) for v in eqn.outvars)

    def leaves(self, v):
        return {self.origin[v][0]} if v in self.origin else self.computed.get(v, set())

    def lookup(self, eqn, v):
        """The lookup that a gather from a view of a parameter is; None for any other gather."""
        axis = looked_up(eqn)
        if axis is None or self.program.is_fixed(eqn) or v is not eqn.invars[0]:
            return None
        return Lookup(v, self.origin[v][1], axis)

    def product(self, index, eqn, views):
        sides = [s for s in (0, 1) if not is_literal(eqn.invars[s]) and eqn.invars[s] in self.program.fixed]
        if len(sides) != 1:  # no weight, or a product of weights, which counts as any other computation
            for v in views:
                self.uses[self.origin[v][0]].add("a product without data")
            return
        operand = eqn.invars[sides[0]]
        if operand not in self.origin:
            for leaf in self.leaves(operand):
                self.refused.setdefault(leaf, "a product uses a weight that is computed from it, not stored")
            return
        leaf, chain = self.origin[operand]
        layout = product_layout(eqn, sides[0])
        if isinstance(layout, str):
            self.refused.setdefault(leaf, layout)
            return
        path, data = self.program.paths[leaf], eqn.invars[1 - sides[0]]
        self.count[leaf] += 1
        self.sites.append(Site(path, leaf, index, operand, data, chain, layout, use=self.count[leaf] - 1))

    def finish(self):
        shared = collections.defaultdict(list)  # matrix -> indices of its products, for parameters with several
        for site in self.sites:
            if self.count[site.leaf] > 1:
                shared[site.matrix].append(site.index)
        groups = [tuple(indices) for indices in shared.values() if len(indices) > 1]
        self.compatible = compatible(self.program, groups) if groups else set()
        of = {index: indices for indices in groups for index in indices}
        by_leaf = collections.defaultdict(list)
        for site in self.sites:
            by_leaf[site.leaf].append(dataclasses.replace(site, shares=of.get(site.index, ())))
        reasons = {}
        for leaf, (path, variable) in enumerate(zip(self.program.paths, self.program.params, strict=True)):
            reason = self.reason(leaf, variable.aval, by_leaf.get(leaf, []))
            if reason:
                reasons[path] = reason
        sites = sorted((site for own in by_leaf.values() for site in own), key=lambda site: site.index)
        return [site for site in sites if site.path not in reasons], reasons

    def reason(self, leaf, aval, sites):
        """The reason why a parameter cannot be quantized; None if it can, or if it is not a kernel at all."""
        uses = sorted(self.uses[leaf])
        if leaf in self.refused:
            return self.refused[leaf]
        if not sites:
            if aval.ndim < 2:
                return None
            return f"used by {', '.join(uses)}, {NO_KERNEL}" if uses else "not used by the outputs"
        if uses:
            return f"tied: used by a product and by {', '.join(uses)}"
        if not jnp.issubdtype(aval.dtype, jnp.floating):
            return f"holds {aval.dtype}; weights must be real floating numbers"
        covered = sum(s.weight.aval.size for s in sites if s.index == s.first)
        if covered > aval.size:
            return f"shared: used by {len(sites)} products, which do not take it as the same matrices"
        if any(s.shares and s.shares not in self.compatible for s in sites):
            return f"shared: used by {len(sites)} products, of which one depends on the output of another"
        if covered < aval.size:
            return f"only {covered} of its {aval.size} entries are weights of a product"
        return None


def compatible(program: Program, groups: Sequence[tuple[int, ...]]) -> set[tuple[int, ...]]:
    """The groups whose equations can all be made neighbours, because no member depends on the output of another."""
    if schedule(program, groups) is not None:
        return set(groups)
    found: list = []
    for group in groups:
        found += [group] if schedule(program, [*found, group]) is not None else []
    return set(found)


def schedule(program: Program, groups: Sequence[tuple[int, ...]]) -> list[int] | None:
    """An order of the equations, close to the original, in which each group is contiguous; None if there is none."""
    members = {group[0]: group for group in groups}
    unit = {index: group[0] for group in groups for index in group}  # equations move alone, or as a group
    producers = {v: index for index, eqn in enumerate(program.equations) for v in eqn.outvars}
    before, after = collections.Counter(), collections.defaultdict(set)
    effect: int | None = None
    for index, eqn in enumerate(program.equations):
        sources = {producers[v] for v in eqn.invars if not is_literal(v) and v in producers}
        if eqn.effects:
            sources, effect = sources if effect is None else sources | {effect}, index
        own = unit.get(index, index)
        for source in {unit.get(i, i) for i in sources}:
            if own not in after[source]:  # a group that depends on itself is never ready
                after[source].add(own)
                before[own] += 1
    ready = [i for i in range(len(program.equations)) if unit.get(i, i) == i and not before[i]]
    order: list[int] = []
    while ready:  # a heap: the first ready equation comes next
        index = heapq.heappop(ready)
        order += members.get(index, (index,))
        for later in after[index]:
            before[later] -= 1
            if not before[later]:
                heapq.heappush(ready, later)
    return order if len(order) == len(program.equations) else None


def with_shared_together(program: Program, sites: Sequence[Site]) -> tuple[Program, list[Site]]:
    """The program with products that share matrices next to each other, so that all their inputs are computed before."""
    groups = list(dict.fromkeys(site.shares for site in sites if site.shares))
    if not groups:
        return program, list(sites)
    order = schedule(program, groups)
    assert order is not None, "find_sites found an order"
    place = {index: i for i, index in enumerate(order)}
    move = lambda site: dataclasses.replace(site, index=place[site.index], shares=tuple(place[i] for i in site.shares))
    return program.reordered(order), sorted(map(move, sites), key=lambda site: site.index)


def is_step(eqn) -> bool:
    """True if an equation is a structural step of one operand: it repeats nothing and selects nothing by data."""
    if eqn.primitive.name in FACTORS:
        return factor(eqn) is not None
    if eqn.primitive.name not in STRUCTURAL or not all(map(is_literal, eqn.invars[1:])):
        return False
    return sum(v.aval.size for v in eqn.outvars) <= eqn.invars[0].aval.size


def looked_up(eqn) -> int | None:
    """The axis of the operand of a gather along which it reads whole entries, one for each integer; None if it does not."""
    numbers, sizes, shape = eqn.params["dimension_numbers"], eqn.params["slice_sizes"], eqn.invars[0].aval.shape
    axes = [i for i, (size, n) in enumerate(zip(sizes, shape, strict=True)) if size != n]
    if len(axes) != 1 or sizes[axes[0]] != 1 or axes[0] not in numbers.start_index_map or numbers.operand_batching_dims:
        return None
    return axes[0]


def factor(eqn) -> float | None:
    """The positive constant by which an equation multiplies its other operand; None for any other equation."""
    scalars = [float(v.val) for v in eqn.invars if is_literal(v) and np.ndim(v.val) == 0]
    divides = eqn.primitive.name == "div"
    if eqn.primitive.name not in FACTORS or len(scalars) != 1 or (divides and is_literal(eqn.invars[0])):
        return None
    if not 0 < scalars[0] < math.inf:
        return None
    return 1 / scalars[0] if divides else scalars[0]


def _use(eqn):
    name = eqn.primitive.name
    if any(map(has_product, inner_jaxprs(eqn))):
        return f"a {name} loop with products inside" if name in ("scan", "while") else f"a {name} with products inside"
    return f"{name} at an index that depends on data" if name == "dynamic_slice" else name


def product_layout(eqn, side: int) -> Layout | str:
    """The layout of a product as matrices, or the reason why it has none. `side` is the index of the weight operand."""
    name, p, shape = eqn.primitive.name, eqn.params, eqn.invars[side].aval.shape
    if jnp.issubdtype(dtype := eqn.invars[1 - side].aval.dtype, jnp.complexfloating):
        return f"it multiplies {dtype} numbers"
    if name == "dot_general":
        contract, batch = p["dimension_numbers"]
        if not contract[side]:
            return "its product contracts no axis"
        # inputs in the order of the weight's axes, whatever the order in the product
        weight_contract, data_contract = zip(*sorted(zip(contract[side], contract[1 - side], strict=True)), strict=True)
        batches = tuple(batch[side]), tuple(batch[1 - side])
        return DotLayout(shape, weight_contract, batches[0], data_contract, batches[1], side == 0)
    if name != "conv_general_dilated":
        return f"{name} is not supported"
    if side == 0:
        return "a convolution whose kernel is data"
    if p["batch_group_count"] != 1:
        return "a convolution in batch groups"
    numbers = p["dimension_numbers"]
    return ConvLayout(
        shape,
        tuple(p["window_strides"]),
        tuple(map(tuple, p["padding"])),
        tuple(p["lhs_dilation"]),
        tuple(p["rhs_dilation"]),
        tuple(numbers.lhs_spec),
        tuple(numbers.rhs_spec),
        tuple(numbers.out_spec),
        p["feature_group_count"],
    )

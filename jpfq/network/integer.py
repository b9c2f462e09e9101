"""Integer execution: products of codes, summed in accumulators of P bits, with steps applied afterwards.

At a site with quantized inputs, the codes x of the inputs and k of the weights are integers. Over each tile of inputs, k x
is summed in int32, and a signed accumulator of P bits is emulated exactly:

    wrap       the sum modulo 2^P, which does not depend on the order of summation
    saturate   every partial sum clipped to [-2^(P-1), 2^(P-1) - 1], with inputs in the order of the kernel's rows

Tiles are added exactly: in int32, or scaled if groups have their own steps. The zero point z of the inputs is subtracted
last, as its sum z sum_i k_i is known beforehand. Everything between sites is the same as in `Quantized.apply`, with products
of operands without weights.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..calibrate.activation import ActivationQuantizer
from ..matrix import QTensor
from ..matrix.arrays import at_least_float32
from ..model.compat import bind
from ..model.functional import Functional
from ..model.operands import rounded_operands
from ..model.program import Program, evaluate, form, trace
from ..model.sites import Site, find_sites
from ..scalar import input_codes
from ..scalar.integer_sums import no_integers

Overflow = Literal["wrap", "saturate"]
CACHE = 16  # compiled networks; the least recently used is evicted


class Weights(NamedTuple):
    """The weights of a site: integer codes (B, in, out) whose zero is 0, and steps (B, in, out), or (B, 1, out) if equal."""

    codes: jax.Array
    step: jax.Array


class IntegerSite(NamedTuple):
    """A site with quantized inputs."""

    site: Site
    path: str
    quantizer: ActivationQuantizer
    weights: Weights

    @property
    def inputs(self) -> tuple[int, int]:
        """The smallest and the largest input code."""
        lo, hi, *_ = self.quantizer.settings.grid.alphabet()
        return int(lo), int(hi)


def integer_sites(
    functional: Functional, tensors: dict[str, QTensor], inputs: dict[str, list[ActivationQuantizer]], shapes: Any
) -> tuple[Program, list[IntegerSite], dict[tuple[int, int], ActivationQuantizer]]:
    """The program for a shape of batch, its sites with quantized inputs in the order of execution, and rounded operands."""
    program = trace(functional.fn, functional.paths, functional.leaves, shapes)
    kernels = find_sites(program)[0]
    sites = [site for site in kernels if site.path in inputs]
    for site in sites:
        settings = inputs[site.path][site.use].settings
        input_codes(settings.grid)  # raises for a table, whose codes are no integers to sum
        try:
            settings.check_sums()
        except ValueError as error:
            raise ValueError(f"{site.path}: {error}") from error
    of = lambda site: IntegerSite(site, site.path, inputs[site.path][site.use], _weights(site, tensors[site.path]))
    return program, list(map(of, sites)), rounded_operands(functional, program, kernels, inputs)


def _weights(site: Site, tensor: QTensor) -> Weights:
    zero, table = np.asarray(tensor.zero), tensor.grid.table
    unit = 1 if table is None else tensor.grid.unit
    if unit is None:
        raise ValueError(f"{site.path}: {no_integers(tensor.grid)}")
    if tensor.grid.alphabet().zero is None or (zero != np.round(zero)).any() or tensor.rotated is not None:
        why = "are rotated" if tensor.rotated else f"on {tensor.grid} have a zero point"
        raise ValueError(
            f"The weights of {site.path} {why}, so sums of their codes are not the layer's products: quantize them on a "
            "grid without a zero point, such as jpfq.Integer(4), and without a rotation."
        )
    spread = lambda x: np.kron(x, np.ones([a // b for a, b in zip(tensor.shape, x.shape, strict=True)], x.dtype))
    codes = np.asarray(tensor.codes, np.int32) - spread(zero.astype(np.int32))
    codes = codes if table is None else np.rint(np.asarray(table) / unit).astype(np.int32)[codes]
    matrices = lambda x: site.layout.matrices(site.chain.arrange(jnp.asarray(x)))
    step = matrices(spread(np.asarray(tensor.step, np.float32)) * np.float32(unit * site.chain.factor))
    return Weights(matrices(codes), step[:, :1] if bool(jnp.all(step == step[:, :1])) else step)


class Network:
    """A program, its sites that run in integers, and its rounded operands. Equal to any other that computes the same."""

    def __init__(self, program: Program, sites: Sequence[Site], operands: Sequence[tuple[int, int]]):
        self.program, self.sites, self.operands = program, tuple(sites), tuple(operands)
        self._key = form(program), tuple((site.index, site.layout) for site in self.sites), self.operands

    def __hash__(self):
        return hash(self._key)

    def __eq__(self, other):
        return isinstance(other, Network) and self._key == other._key


@functools.lru_cache(maxsize=CACHE)
def compiled(network: Network, tile: int | None, overflow: Overflow) -> Callable:
    """The network as a compiled function of (parameters, quantizers, those of operands, weights, P, leaves of a batch).

    It returns the leaves of the outputs. Results that differ only in numbers, such as those of a sweep, share it.
    """
    program, by_index = network.program, {site.index: (i, site) for i, site in enumerate(network.sites)}

    def run(leaves, quantizers, operands, weights, bits, batch):
        rounded = dict(zip(network.operands, operands, strict=True))

        def visit(index, eqn, values):
            if index not in by_index:
                return bind(eqn, [rounded[index, i](x) if (index, i) in rounded else x for i, x in enumerate(values)])
            i, site = by_index[index]
            (x,) = (x for v, x in zip(eqn.invars, values, strict=True) if v is site.data)
            y = _product(site, quantizers[i], weights[i], at_least_float32(x), bits, tile, overflow)
            return [y.astype(eqn.outvars[0].aval.dtype)]

        return evaluate(program, leaves, batch, visit)

    return jax.jit(run)


def _check(at: IntegerSite, tile):
    """Raises if the sums of a site cannot be computed in integers."""
    grid, n = at.quantizer.settings.grid, at.weights.codes.shape[1]
    zero = grid.alphabet().zero
    if zero is not None and zero != int(zero):
        raise ValueError(
            f"{at.path}: 0 is not a level of the grid {grid} of its inputs, so padding has no code. Use Asymmetric."
        )
    size = n if tile is None else min(tile, n)
    starts = np.asarray(at.weights.step)
    if starts.shape[1] > 1 and any((starts[:, t : t + size] != starts[:, t : t + 1]).any() for t in range(0, n, size)):
        raise ValueError(
            f"{at.path}: a sum over {size} inputs includes weights of different steps. Use a tile that divides the groups."
        )


def _product(site, quantizer, weights, x, bits, tile, overflow):
    """The product of the site, from float inputs."""
    layout, levels = site.layout, quantizer.at(x)
    of_rows = lambda y: (
        y.reshape(()) if y.size == 1 else layout.rows(jnp.broadcast_to(y, x.shape)).max(-1, keepdims=True)
    )
    step, zero = of_rows(levels.step), of_rows(levels.zero).astype(jnp.int32)
    about = (levels.encode(x) - levels.zero).astype(jnp.int32)  # padding is 0 here
    codes = layout.rows(about) + zero  # (B, *rows, in)
    B, n, out = weights.codes.shape
    size = n if tile is None else min(tile, n)
    more = -n % size
    rows = codes.shape[1:-1]
    cut = lambda y, axis: jnp.pad(y, [(0, more if i == axis else 0) for i in range(y.ndim)])
    tiles = jnp.moveaxis(cut(codes.reshape(B, -1, n), 2).reshape(B, -1, (n + more) // size, size), 2, 0)
    kernel = jnp.moveaxis(cut(weights.codes, 1).reshape(B, -1, size, out), 1, 0)
    scale = weights.step if weights.step.shape[1] == 1 else cut(weights.step, 1)[:, ::size]
    shared = scale.shape[1] == 1
    summed = _wrapped if overflow == "wrap" else _saturated

    def visit(total, current):
        x, k, s = current
        part = summed(x, k, bits)
        return total + (part if shared else s[:, None] * part.astype(s.dtype)), None

    empty = jnp.zeros((B, tiles.shape[2], out), jnp.int32 if shared else scale.dtype)
    steps = jnp.broadcast_to(jnp.moveaxis(scale, 1, 0), (len(tiles), B, out))
    total, _ = lax.scan(visit, empty, (tiles, kernel, steps))
    offset = weights.codes.sum(1) if shared else jnp.sum(steps * kernel.sum(2).astype(steps.dtype), 0)
    total = total.reshape(B, *rows, out)
    offset = jnp.expand_dims(offset, range(1, 1 + len(rows)))
    if shared:
        y = jnp.expand_dims(scale[:, 0], range(1, 1 + len(rows))) * (total - zero * offset).astype(step.dtype)
    else:
        y = total - zero.astype(step.dtype) * offset
    return layout.product(step * y, x.shape)


def _wrapped(x, k, bits):
    """Sums x (B, rows, T) k (B, T, out) modulo 2^P, centred at 0. That int32 itself wraps at 2^32 changes nothing."""
    total = lax.dot_general(x, k, (((2,), (1,)), ((0,), (0,))), preferred_element_type=jnp.int32)
    unused = 32 - bits
    return jnp.right_shift(jnp.left_shift(total, unused), unused)


def _saturated(x, k, bits):
    """The same sums, one input after the other, with every partial sum clipped to P bits."""
    hi = jnp.right_shift(jnp.int32(2**31 - 1), 32 - bits)
    lo = -hi - 1

    def visit(total, current):
        x, k = current  # (B, rows), (B, out)
        term = x[:, :, None] * k[:, None]
        new = total + term
        beyond = (total ^ new) & (term ^ new) < 0  # overflow of int32 itself
        new = jnp.where(beyond, jnp.where(term < 0, lo, hi), new)
        return jnp.clip(new, lo, hi), None

    start = jnp.zeros((*x.shape[:2], k.shape[2]), jnp.int32)
    return lax.scan(visit, start, (jnp.moveaxis(x, 2, 0), jnp.moveaxis(k, 1, 0)))[0]


@dataclasses.dataclass
class IntegerNetworks:
    """The integer networks of one quantized model: one for each shape of batch, tile and kind of overflow."""

    functional: Functional
    tensors: dict[str, QTensor]
    inputs: dict[str, list[ActivationQuantizer]]

    def __post_init__(self):
        self.cached: dict = {}

    def __call__(self, batch: Any, bits: Any, tile: int | None, overflow: Overflow) -> Any:
        """The outputs for a batch."""
        if overflow not in ("wrap", "saturate"):
            raise ValueError(f"overflow is 'wrap' or 'saturate'; got {overflow!r}.")
        if not self.inputs.keys() & self.tensors.keys():
            raise ValueError(
                "No inputs are quantized, so nothing runs in integers: quantize with activation_bits=8 in a rule."
            )
        leaves, structure = jax.tree.flatten(batch)
        shapes = [jax.typeof(jnp.asarray(x)) for x in leaves]
        key = structure, tuple((x.shape, x.dtype) for x in shapes), tile, overflow
        if key not in self.cached:
            found = integer_sites(self.functional, self.tensors, self.inputs, structure.unflatten(shapes))
            program, sites, operands = found
            for at in sites:
                _check(at, tile)
            run = compiled(Network(program, [at.site for at in sites], list(operands)), tile, overflow)
            quantizers = [at.quantizer for at in sites], list(operands.values()), [at.weights for at in sites]
            self.cached[key] = run, program.tree, quantizers
        run, tree, quantizers = self.cached[key]
        return tree.unflatten(run(self.functional.leaves, *quantizers, jnp.asarray(bits, jnp.int32), leaves))

"""Codes, steps and zero points of kernels as numbers that an optimizer changes, and the kernels that they give.

A position is a number in units of the step, and its code that of the nearest level. It starts at the float weight, as far as
this lies in the cell of the code, and stays within `reach` levels of it. While it trains, a kernel has soft levels: on the
share s of the way from one level to the next,

    (sigmoid(T (s - 1/2)) - sigmoid(-T / 2)) / (1 - 2 sigmoid(-T / 2))

of the way. That is s itself for a sharpness T of 0, and the nearest of the two as T grows (Gong et al., arXiv 1908.05033;
Nagel et al., arXiv 2004.10568). Steps are changed by factors exp(x). Zero points and types of steps are rounded, and
derivatives pass straight through that rounding (Bengio et al., arXiv 1308.3432).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..matrix import Info, QTensor
from ..matrix.explicit_mesh import anywhere
from ..matrix.layout import Layout
from ..matrix.qtensor import entropy
from ..model.program import Program
from ..model.sites import Chain, find_sites
from ..scalar import SumSpec, WorstCase
from ..scalar.step_types import StepStorage, is_held

UNIT = 16.0  # levels by which a change of 1 moves a position: so one rate suits positions, factors and biases
CELL = 0.45  # of the gap to the next level, that a position may start away from the level of its code


class Kernel(NamedTuple):
    """The numbers of one kernel: of its positions, as distances from the start's levels, of its steps and zero points.

    None stands for what does not change.
    """

    move: jax.Array | None
    step: jax.Array | None
    zero: jax.Array | None


class Bound(NamedTuple):
    """The integer sums of one product that are to fit an accumulator, and how its kernel becomes matrices."""

    chain: Chain
    layout: Layout
    sums: SumSpec

    def matrices(self, x: jax.Array) -> jax.Array:
        """Numbers of a kernel's entries, as (B, in, out)."""
        return self.layout.matrices(self.chain.arrange(x))

    def reach(self, tensor: QTensor) -> jax.Array:
        """The largest sum of each tile over all inputs, and less the least one (B, tiles, out, 2)."""
        codes = self.matrices(tensor.levels.integers(tensor.codes))
        over = lambda k: jnp.stack(self.sums.of_codes(k, jnp.arange(k.shape[0])), -1)
        return jax.vmap(over)(codes)

    def allowed(self, start: jax.Array, new: jax.Array, moved: jax.Array) -> jax.Array:
        """True where integers may change from `start` to `new` so that every sum still fits, in the shape of the kernel.

        Changes that add to no sum are always made, the others in the order of `moved`, the largest first, until the tile is
        full. If the sums of `start` fit, those with these changes do.
        """
        found = jax.vmap(self._allowed)(*map(self.matrices, (start, new, moved)))
        return self.chain.scatter(self.layout.operand(found.astype(moved.dtype)), start.shape) > 0

    def _allowed(self, start, new, moved):
        n, out = start.shape
        tiles = lambda x: self.sums.split(x, jnp.arange(n))  # (tiles, T, out)
        before, after = self.sums.spent(tiles(start)), self.sums.spent(tiles(new))
        more = [jnp.maximum(b - a, 0) for a, b in zip(before, after, strict=True)]
        free = (more[0] == 0) & (more[1] == 0)
        order = jnp.argsort(-tiles(moved), axis=1)
        fits = jnp.ones(order.shape, bool)
        for a, b, added in zip(before, after, more, strict=True):
            room = self.sums.capacity - jnp.where(free, b, a).sum(1, keepdims=True)
            fits &= jnp.cumsum(jnp.take_along_axis(added, order, 1), 1) <= room
        fits = jnp.take_along_axis(fits, jnp.argsort(order, axis=1), 1)
        return (free | fits).reshape(-1, out)[:n]


@dataclasses.dataclass(frozen=True, eq=False)
class Moves:
    """The changes that the kernels of a result may see, and their limits.

    parts: "codes", "steps", "zeros". reach: levels by which a code may differ from its start.
    keep_zeros: whether weights that are quantized to 0 stay 0.
    bounds: of the kernels whose integer sums are to fit an accumulator, by path.
    """

    parts: tuple[str, ...]
    reach: int
    keep_zeros: bool
    bounds: Mapping[str, Sequence[Bound]]

    @anywhere
    def start(self, tensors: Mapping[str, QTensor], kernels: Mapping[str, jax.Array]) -> dict[str, Kernel]:
        """The numbers to be trained, by path, which give the codes of `tensors`. `kernels` are the float network's."""
        zeros = lambda wanted, x, tensor: jnp.zeros_like(x, tensor.step.dtype) if wanted else None
        return {
            path: Kernel(
                _Positions(tensor, self.reach).of(kernels[path]) if "codes" in self.parts else None,
                zeros("steps" in self.parts and not is_held(tensor.step_dtype), tensor.step, tensor),
                zeros("zeros" in self.parts and tensor.grid.fits_zero, tensor.zero, tensor),
            )
            for path, tensor in tensors.items()
        }

    def within(self, kernels: Mapping[str, Kernel], tensors: Mapping[str, QTensor]) -> dict[str, Kernel]:
        """The same numbers with every position in its reach."""
        return {path: self._within(kernel, tensors[path]) for path, kernel in kernels.items()}

    def __call__(
        self, kernels: Mapping[str, Kernel], tensors: Mapping[str, QTensor], sharpness: jax.Array
    ) -> dict[str, jax.Array]:
        """The soft kernels, which are differentiable by their numbers."""
        return {path: self._made(path, kernel, tensors[path], sharpness)[1] for path, kernel in kernels.items()}

    def deployed(self, kernels: Mapping[str, Kernel], tensors: Mapping[str, QTensor]) -> dict[str, QTensor]:
        """The codes and the steps of the kernels."""
        return {path: self._made(path, kernel, tensors[path], None)[0] for path, kernel in kernels.items()}

    def _within(self, kernel, tensor):
        if kernel.move is None:
            return kernel
        at = _Positions(tensor, self.reach)
        return kernel._replace(move=jnp.clip(kernel.move, at.moves(at.least), at.moves(at.most)))

    def _made(self, path, kernel, tensor, sharpness):
        """The hard tensor, and the soft kernel, or the hard one without a sharpness."""
        step, zero, levels = tensor.step, tensor.zero, tensor.levels
        if kernel.step is not None:
            step = step * jnp.exp(kernel.step)
            step = _through(StepStorage(tensor.step_dtype)(step), step)
        if kernel.zero is not None:
            moved = zero + UNIT * kernel.zero
            zero = _through(jnp.clip(jnp.round(moved), levels.lo, levels.hi), moved)
        at = _Positions(tensor, self.reach)
        code, level = at.start, at.level(at.start)
        if kernel.move is not None:
            position = level + at.gap * UNIT * kernel.move
            code, moved = lax.stop_gradient(
                (jnp.clip(at.grid.encode(position), at.least, at.most), jnp.abs(kernel.move))
            )
            kept = self.keep_zeros and not levels.offset  # of which no level is 0
            free = level != levels.zero if kept else jnp.ones(level.shape, bool)
            code = jnp.where(free, code, at.start)
            for bound in self.bounds.get(path, ()):
                free &= bound.allowed(levels.integers(at.start), levels.integers(code), moved)
                code = jnp.where(free, code, at.start)
            level = at.level(code) if sharpness is None else jnp.where(free, at.soft(position, sharpness), level)
        made = dataclasses.replace(tensor, codes=code.astype(tensor.codes.dtype), step=step, zero=zero)
        return made, made.at(level)


class _Positions:
    """The levels of a kernel in units of its step, and the codes in reach of each of its own."""

    def __init__(self, tensor: QTensor, reach: int):
        self.tensor, levels = tensor, tensor.levels
        self.grid = levels.with_steps(jnp.ones_like(levels.step), jnp.zeros_like(levels.zero))
        self.level, self.start = self.grid.level, tensor.codes.astype(levels.step.dtype)
        self.least, self.most = self.near(-reach), self.near(reach)
        table = levels.table
        self.gap = jnp.ones((), levels.step.dtype) if table is None else (table[-1] - table[0]) / (table.shape[0] - 1)

    def near(self, k: int) -> jax.Array:
        """The codes that lie k from the start, or at the end of the grid."""
        return jnp.clip(self.start + k, self.grid.lo, self.grid.hi)

    def moves(self, code: jax.Array) -> jax.Array:
        """The distance of the level of a code from the start's, as it is trained."""
        return (self.level(code) - self.level(self.start)) / (self.gap * UNIT)

    def of(self, kernel: jax.Array) -> jax.Array:
        """The distance of the float weights, within the cells of their codes."""
        away = self.tensor.levels.position(self.tensor.turned(kernel)) - self.level(self.start)
        return jnp.clip(away / (self.gap * UNIT), CELL * self.moves(self.near(-1)), CELL * self.moves(self.near(1)))

    def soft(self, position: jax.Array, sharpness: jax.Array) -> jax.Array:
        """The soft level of a position in reach."""
        below, share = self.grid.between(position)
        first, T = self.level(below), sharpness.astype(share.dtype)
        gap = self.level(jnp.minimum(below + 1, self.grid.hi)) - first
        end = jax.nn.sigmoid(-T / 2)
        return first + gap * (jax.nn.sigmoid(T * (share - 0.5)) - end) / (1 - 2 * end)


def _through(rounded, x):
    """`rounded`, to the bit, with the derivatives of x."""
    return lax.stop_gradient(rounded) + (x - lax.stop_gradient(x))


def bounds_of(program: Program, info: Mapping[str, Info]) -> dict[str, list[Bound]]:
    """The bounded sums of each kernel that has an accumulator, one entry for each of its matrices."""
    found: dict[str, dict] = {path: {} for path, one in info.items() if one.reach is not None}
    for site in find_sites(program)[0]:
        if site.path in found:
            reach = info[site.path].reach
            assert reach is not None
            found[site.path].setdefault(site.matrix, Bound(site.chain, site.layout, reach.sums))
    return {path: list(bounds.values()) for path, bounds in found.items()}


@anywhere
def info_of(info: Info, tensor: QTensor, bounds: Sequence[Bound] = ()) -> Info:
    """The figures of a kernel whose codes and steps have changed: what was measured on calibration data is unknown, nan."""
    nan = jnp.full((), jnp.nan)
    unknown = ("square_error", "square_floor", "square_bound", "saturation")
    reach = info.reach
    if reach is not None:
        reach = WorstCase(reach.sums, jnp.concatenate([bound.reach(tensor) for bound in bounds]))
    return dataclasses.replace(
        info,
        **dict.fromkeys(unknown, nan),
        square_rounding=nan,
        sparsity=jnp.mean(tensor.levels.decode(tensor.codes.astype(tensor.step.dtype)) == 0),
        entropy=entropy(tensor.codes.reshape(-1, 1)),
        reach=reach,
    )

"""A quantized kernel as the matrix of a linear layer: outputs first, which is how files of other systems hold them."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..matrix import QTensor
from ..matrix.layout import DotLayout
from ..matrix.signed import signed
from ..model.functional import Functional
from ..model.program import trace
from ..model.sites import Site, find_sites


class Linear(NamedTuple):
    """kernel = step * (level - zero), every array (out, ..): codes (out, in), steps and zero points (out, groups)."""

    codes: np.ndarray
    step: np.ndarray
    zero: np.ndarray

    @property
    def group(self) -> int | None:
        """Inputs that share a step; None for all."""
        groups = self.step.shape[1]
        return None if groups == 1 else self.codes.shape[1] // groups

    def coarsest(self) -> "Linear":
        """The same with neighbouring groups joined where their steps are alike, in all outputs."""
        run = int(np.gcd(_run(self.step), _run(self.zero)))
        return self._replace(step=self.step[:, ::run], zero=self.zero[:, ::run])

    def blocks(self) -> tuple[tuple[int, int] | None, np.ndarray]:
        """The outputs and inputs that share a step, and the steps of such blocks; None where each output has its own."""
        run = _run(self.step.T)
        if self.group is None or run == 1:
            return None, self.step
        return (run, self.group), np.ascontiguousarray(self.step[::run])

    def in_groups(self, size: int) -> "Linear | None":
        """The same in groups of that many inputs; None where a group of them has several steps."""
        n, groups = self.codes.shape[1], self.step.shape[1]
        whole = self.coarsest()
        coarse = n // whole.step.shape[1]
        if n % size or coarse % size:
            return None
        own = n // groups
        spread = lambda x: np.repeat(x, own, 1)[:, ::size]
        return self._replace(step=spread(self.step), zero=spread(self.zero))


def operands_left(quantized: Any) -> dict[str, str]:
    """Rounded operands of products without weights, each with the reason why no file of weights holds it."""
    names = [name for name in quantized.inputs if name not in quantized.tensors]
    return dict.fromkeys(names, "a product without weights, which servers round in their own way")


def products(functional: Functional, batch: Any) -> dict[str, Site]:
    """The product that each kernel is used in, by path, for inputs like `batch`; the first of several."""
    shapes = jax.tree.map(lambda x: jax.typeof(jnp.asarray(x)), batch)
    found = find_sites(trace(functional.fn, functional.paths, functional.leaves, shapes))[0]
    return {site.path: site for site in reversed(found)}


def linear(tensor: QTensor, path: str, site: Site | None) -> Linear:
    """The matrix of a kernel, by the product it is used in.

    Where that is not known, a kernel of rank 2 is taken as (in, out), unless its steps say that outputs come first.

    Raises:
        ValueError: it is no matrix, and why.
    """
    if tensor.rotated is not None:
        raise ValueError("its inputs are rotated")
    arrange = arrangement(tensor, path, site)
    spread = lambda x: np.kron(x, np.ones([n // m for n, m in zip(tensor.shape, x.shape, strict=True)], x.dtype))
    step, zero = np.asarray(tensor.step), np.asarray(tensor.zero)
    runs = arrange(spread(np.arange(step.size, dtype=np.int32).reshape(step.shape)))
    run = _run(runs)
    part = lambda x: np.ascontiguousarray(arrange(spread(x))[:, ::run])
    if run == 1 and runs.shape[1] > 1 and len(tensor.shape) == 2:
        raise ValueError("each input has a step of its own")
    found = Linear(np.ascontiguousarray(arrange(np.asarray(tensor.codes))), part(step), part(zero))
    return found if len(tensor.shape) == 2 else found.coarsest()  # a group along several axes is in parts


def integers(tensor: QTensor, path: str, site: Site | None) -> tuple[Linear, int, bool]:
    """A kernel whose levels are integers: its matrix, with codes about 0, their bits, and whether all zero points are 0.

    Raises:
        ValueError: it is no such matrix, and why.
    """
    whole = signed(tensor)
    zero = jnp.zeros_like(whole.step, jnp.int32) if whole.zero is None else whole.zero
    found = linear(dataclasses.replace(tensor, codes=whole.codes, step=whole.step, zero=zero), path, site)
    return found, whole.bits, whole.zero is None


def values(tensor: QTensor, path: str, site: Site | None) -> np.ndarray:
    """The values of a kernel, as a matrix (out, in)."""
    return np.asarray(arrangement(tensor, path, site)(np.asarray(tensor.dequantize(), np.float32)))


def arrangement(tensor: QTensor, path: str, site: Site | None) -> Callable[[np.ndarray], np.ndarray]:
    """A function from an array in the shape of a kernel to a matrix (out, in).

    Raises:
        ValueError: the kernel is no matrix, and why.
    """
    return _by_steps(tensor, path) if site is None else _by_product(site)


def is_half(step: np.ndarray) -> bool:
    """True if steps are numbers of float16."""
    with np.errstate(over="ignore"):
        return np.array_equal(step.astype(np.float16).astype(step.dtype), step)


def _run(x) -> int:
    """The length of the equal runs along the last axis whose entries are alike."""
    changes = np.flatnonzero((np.diff(x, axis=1) != 0).any(0)) + 1
    return int(np.gcd.reduce([*changes, x.shape[1]]))


def _by_product(site):
    if not isinstance(site.layout, DotLayout):
        raise ValueError("it is the kernel of a convolution: only matrices are held")
    if site.layout.dims[0] > 1 or site.chain.factor != 1:
        raise ValueError(f"it is used as {site.layout.dims[0]} matrices, times {site.chain.factor}: only one is held")
    return lambda x: np.asarray(site.layout.matrices(site.chain.arrange(jnp.asarray(x)))[0]).T


def _by_steps(tensor, path):
    shape, steps = tensor.shape, tensor.step.shape
    if len(shape) != 2:
        raise ValueError(
            f"it is of rank {len(shape)}, and a product of matrices only if batch=.., an input, says so: give it to export"
        )
    named = path.rpartition("/")[2] == "kernel"
    if steps[1] == shape[1] > 1 or (steps[1] == 1 and named):
        return np.transpose
    if steps[0] == shape[0] > 1:
        return lambda x: x
    if named:  # blocks of both
        return np.transpose
    raise ValueError("its steps do not tell inputs from outputs: give export batch=.., an input")

"""Layouts: a product of the program as matrices. Weights become (B, in, out), inputs (B, *rows, in).

B counts independent matrices: batched axes (experts, vmapped layers) or the feature groups of a convolution. Axes of rows
are never merged, because a sharded axis must not be reshaped.
"""

import abc
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Layout(abc.ABC):
    """A rule that turns the weight and the data of one product into matrices. Hashable, hence static under jit."""

    shape: tuple[int, ...]  # of the weight operand

    @property
    @abc.abstractmethod
    def rows_key(self) -> Any:
        """The key that decides `rows`: layouts with equal keys turn one data operand into the same rows."""

    @property
    @abc.abstractmethod
    def matrices_key(self) -> Any:
        """The key that decides `matrices`: layouts with equal keys turn one weight operand into the same matrices."""

    @property
    @abc.abstractmethod
    def of_rows(self) -> "Layout":
        """The same layout for one neuron of each matrix: functions of rows alone are compiled for it."""

    @abc.abstractmethod
    def matrices(self, W: jax.Array) -> jax.Array:
        """The weight operand as (B, in, out)."""

    @abc.abstractmethod
    def operand(self, matrices: jax.Array) -> jax.Array:
        """The inverse of `matrices`."""

    @abc.abstractmethod
    def rows(self, x: jax.Array) -> jax.Array:
        """The data operand as (B, *rows, in)."""

    @abc.abstractmethod
    def row_weights(self, weights: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """Weights of the rows (B or 1, *rows) of a data operand of that shape: each as far as the least of its entries.

        `weights` are those of the operand's entries, of its rank and of size 1 along axes that they do not depend on.
        """

    def split(self, x: jax.Array, numbers: int) -> tuple[int, int] | None:
        """(axis of the data operand, how far along it at once) such that rows hold about so many elements; None for all.

        Only where rows repeat what is in the operand: those of a convolution, which need not exist all at once.
        """
        del x, numbers
        return None

    @abc.abstractmethod
    def row_axes(self, ndim: int) -> tuple[int, ...]:
        """The axes of the data operand that make up one row (one sample, of a convolution)."""

    @abc.abstractmethod
    def inputs_last(self, x: jax.Array) -> jax.Array:
        """The data operand as (.., inputs of a product); of a convolution, the channels that one place gives to a matrix."""

    @abc.abstractmethod
    def inputs_back(self, y: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The inverse of `inputs_last`, for a data operand of that shape."""

    @abc.abstractmethod
    def by_matrix(self, x: jax.Array) -> jax.Array:
        """The data operand as (B, elements): all that each matrix multiplies, in any order."""

    @abc.abstractmethod
    def over_matrices(self, values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """One number per matrix (B,), to be broadcast over a data operand of the given shape."""

    @abc.abstractmethod
    def at_outputs(self, values: jax.Array, ndim: int) -> jax.Array:
        """One number per neuron (B, out), to be broadcast over the product, which has `ndim` axes."""

    @abc.abstractmethod
    def product(self, y: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The program's product, from rows times matrices (B, *rows, out) and the shape of the data operand."""

    @property
    def dims(self) -> tuple[int, int, int]:
        """(B, in, out)."""
        return _dims(self)


@functools.lru_cache(maxsize=4096)
def _dims(layout):
    return jax.eval_shape(layout.matrices, jax.ShapeDtypeStruct(layout.shape, jnp.float32)).shape


@dataclasses.dataclass(frozen=True)
class DotLayout(Layout):
    """`dot_general`: which axes of each operand are contracted, and which are batched; whether the weight comes first."""

    shape: tuple[int, ...]
    contract: tuple[int, ...]
    batch: tuple[int, ...]
    data_contract: tuple[int, ...]
    data_batch: tuple[int, ...]
    first: bool

    @property
    def rows_key(self):
        return self.data_contract, self.data_batch

    @property
    def of_rows(self):
        kept = {*self.batch, *self.contract}
        return dataclasses.replace(
            self, shape=tuple(n if i in kept else 1 for i, n in enumerate(self.shape)), first=False
        )

    @property
    def matrices_key(self):
        return "dot", self.shape, self.contract, self.batch

    def _order(self):
        out = tuple(i for i in range(len(self.shape)) if i not in self.batch + self.contract)
        return self.batch + self.contract + out

    def matrices(self, W):
        size = lambda axes: math.prod(self.shape[i] for i in axes)
        return W.transpose(self._order()).reshape(size(self.batch), size(self.contract), -1)

    def operand(self, matrices):
        order = self._order()
        return matrices.reshape([self.shape[i] for i in order]).transpose(np.argsort(order))

    def rows(self, x):
        free = tuple(i for i in range(x.ndim) if i not in self.data_batch + self.data_contract)
        x = x.transpose(self.data_batch + free + self.data_contract)
        batch, inputs = len(self.data_batch), len(self.data_contract)
        head, rows, tail = x.shape[:batch], x.shape[batch : x.ndim - inputs], x.shape[x.ndim - inputs :]
        return x.reshape(math.prod(head), *(rows or (1,)), math.prod(tail))  # one input for a whole batch is one row

    def row_weights(self, weights, shape):
        free = [i for i in range(len(shape)) if i not in self.data_batch + self.data_contract]
        split = any(weights.shape[i] > 1 for i in self.data_batch)  # whether matrices have weights of their own
        full = [shape[i] if i in free or (split and i in self.data_batch) else 1 for i in range(len(shape))]
        weights = jnp.broadcast_to(weights.min(self.data_contract, keepdims=True), full)
        head = math.prod(full[i] for i in self.data_batch)
        weights = weights.transpose(*self.data_batch, *free, *self.data_contract)
        return weights.reshape(head, *([shape[i] for i in free] or (1,)))

    def row_axes(self, ndim):
        return self.data_contract

    def _inputs_order(self, ndim):
        return tuple(i for i in range(ndim) if i not in self.data_contract) + self.data_contract

    def inputs_last(self, x):
        x = x.transpose(self._inputs_order(x.ndim))
        kept = x.ndim - len(self.data_contract)
        return x.reshape(*x.shape[:kept], math.prod(x.shape[kept:]))

    def inputs_back(self, y, shape):
        order = self._inputs_order(len(shape))
        return y.reshape([shape[i] for i in order]).transpose(np.argsort(order))

    def by_matrix(self, x):
        rest = tuple(i for i in range(x.ndim) if i not in self.data_batch)
        return x.transpose(self.data_batch + rest).reshape(self.dims[0], -1)

    def over_matrices(self, values, shape):
        values = values.reshape([shape[i] for i in self.data_batch]).transpose(np.argsort(self.data_batch))
        return jnp.expand_dims(values, [i for i in range(len(shape)) if i not in self.data_batch])

    def at_outputs(self, values, ndim):
        batch, free = len(self.batch), self._order()[len(self.batch) + len(self.contract) :]
        values = values.reshape([self.shape[i] for i in (*self.batch, *free)])
        place = batch + len(free) if self.first else batch  # the data's own axes come after or before the weight's
        return jnp.expand_dims(values, range(place, place + ndim - values.ndim))

    def product(self, y, shape):
        rows = [size for i, size in enumerate(shape) if i not in self.data_batch + self.data_contract]
        batch = [self.shape[i] for i in self.batch]
        out = [self.shape[i] for i in self._order()[len(self.batch) + len(self.contract) :]]
        y = y.reshape(*batch, *rows, *out)
        if not self.first:
            return y
        heads = len(batch) + len(rows)
        return y.transpose(*range(len(batch)), *range(heads, y.ndim), *range(len(batch), heads))


@dataclasses.dataclass(frozen=True)
class ConvLayout(Layout):
    """`conv_general_dilated`: all patches, at the layer's own stride, padding and dilation.

    Inputs come in the order of a Flax kernel, (*window, channel), with one matrix per feature group.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    data_dilation: tuple[int, ...]
    dilation: tuple[int, ...]
    data_spec: tuple[int, ...]  # axes of (sample, channel, *space) in the data operand
    spec: tuple[int, ...]  # axes of (out, in, *window) in the weight operand
    out_spec: tuple[int, ...]  # axes of (sample, channel, *space) in the product
    groups: int

    @property
    def window(self) -> tuple[int, ...]:
        """The size of the kernel in space."""
        return tuple(self.shape[i] for i in self.spec[2:])

    @property
    def rows_key(self):
        return self.window, self.strides, self.padding, self.data_dilation, self.dilation, self.data_spec, self.groups

    @property
    def of_rows(self):
        shape = tuple(self.groups if i == self.spec[0] else n for i, n in enumerate(self.shape))
        return dataclasses.replace(self, shape=shape, out_spec=self.data_spec)

    @property
    def matrices_key(self):
        return "convolution", self.shape, self.spec, self.groups

    @property
    def _order(self):
        return (*self.spec[2:], self.spec[1], self.spec[0])

    def matrices(self, W):
        out = self.shape[self.spec[0]]
        W = W.transpose(self._order).reshape(-1, self.groups, out // self.groups)
        return W.transpose(1, 0, 2)

    def operand(self, matrices):
        return (
            matrices.transpose(1, 0, 2).reshape([self.shape[i] for i in self._order]).transpose(np.argsort(self._order))
        )

    def rows(self, x):
        x = self._widened(x)
        for axis, (size, stride, dilation) in enumerate(zip(self.window, self.strides, self.dilation, strict=True), 1):
            reach = x.shape[axis] - (size - 1) * dilation
            offsets = [lax.slice_in_dim(x, i * dilation, i * dilation + reach, stride, axis) for i in range(size)]
            x = jnp.stack(offsets, axis=-2)
        return self._grouped(x, 1 + len(self.window))

    @property
    def pooling(self) -> tuple:
        """The windows over (sample, *space, channel), as `pooled` takes them."""
        around = lambda inner, outer: (outer, *inner, outer)
        return (
            around(self.window, 1),
            around(self.strides, 1),
            around(self.padding, (0, 0)),
            around(self.data_dilation, 1),
            around(self.dilation, 1),
        )

    def row_weights(self, weights, shape):
        weights = weights.transpose(self.data_spec[0], *self.data_spec[2:], self.data_spec[1])
        weights = pooled(weights.min(-1, keepdims=True), *self.pooling)[..., 0]
        rows = jax.eval_shape(self.rows, jax.ShapeDtypeStruct(shape, weights.dtype)).shape[1:-1]
        return jnp.broadcast_to(jnp.where(jnp.isinf(weights), 1, weights), rows)[None]

    def picked(self, x: jax.Array, numbers: jax.Array) -> jax.Array:
        """The rows (B, numbers, in) of these indices, as if all axes of rows were one."""
        if self._pointwise:
            return self._grouped(self._widened(x).reshape(-1, x.shape[self.data_spec[1]])[numbers], 1)
        x = self._widened(x)
        reach = [(size - 1) * dilation + 1 for size, dilation in zip(self.window, self.dilation, strict=True)]
        counts = [
            (full - size) // stride + 1 for full, size, stride in zip(x.shape[1:-1], reach, self.strides, strict=True)
        ]
        sample, *place = jnp.unravel_index(numbers, (x.shape[0], *counts))
        starts = [sample, *(i * stride for i, stride in zip(place, self.strides, strict=True)), jnp.zeros_like(sample)]
        cut = lambda *start: lax.dynamic_slice(x, start, (1, *reach, x.shape[-1]))[0]
        windows = jax.vmap(cut)(*starts)
        windows = windows[(slice(None), *(slice(None, None, d) for d in self.dilation))]
        return self._grouped(windows, 1)

    @property
    def _pointwise(self):
        """True if every row is the channels of one place, and all places are rows."""
        ones = (*self.window, *self.strides, *self.data_dilation)
        return all(n == 1 for n in ones) and all(pad == (0, 0) for pad in self.padding)

    def split(self, x, numbers):
        n = math.prod(self.window) * x.shape[self.data_spec[1]]
        rows = jax.eval_shape(self.rows, jax.ShapeDtypeStruct(x.shape, jnp.float32))
        samples = x.shape[self.data_spec[0]]
        at_once = max(1, numbers * samples // max(1, rows.size)) if n > x.shape[self.data_spec[1]] else samples
        return None if at_once >= samples else (self.data_spec[0], at_once)

    def _widened(self, x):
        """The data operand as (sample, *space, channel), with padding and between its entries the zeros of a dilation."""
        x = x.transpose(self.data_spec[0], *self.data_spec[2:], self.data_spec[1])
        space = zip(self.padding, self.data_dilation, strict=True)
        widen = [(low, high, dilation - 1) for (low, high), dilation in space]
        return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *widen, (0, 0, 0)])

    def _grouped(self, x, heads):
        """(*heads, *window, channel) as (groups, *heads, in)."""
        head, channels = x.shape[:heads], x.shape[-1]
        x = x.reshape(*head, math.prod(self.window), self.groups, channels // self.groups)
        return jnp.moveaxis(x, -2, 0).reshape(self.groups, *head, -1)

    def row_axes(self, ndim):
        return tuple(i for i in range(ndim) if i != self.data_spec[0])

    def inputs_last(self, x):
        x = jnp.moveaxis(x, self.data_spec[1], -1)
        return x.reshape(*x.shape[:-1], self.groups, x.shape[-1] // self.groups)

    def inputs_back(self, y, shape):
        return jnp.moveaxis(y.reshape(*y.shape[:-2], shape[self.data_spec[1]]), -1, self.data_spec[1])

    def by_matrix(self, x):
        return jnp.moveaxis(x, self.data_spec[1], 0).reshape(self.groups, -1)

    def over_matrices(self, values, shape):
        channel = self.data_spec[1]
        values = jnp.repeat(values, shape[channel] // self.groups)
        return jnp.expand_dims(values, [i for i in range(len(shape)) if i != channel])

    def at_outputs(self, values, ndim):
        return jnp.expand_dims(values.reshape(-1), [i for i in range(ndim) if i != self.out_spec[1]])

    def product(self, y, shape):
        del shape
        y = jnp.moveaxis(y, 0, -2)
        y = y.reshape(*y.shape[:-2], -1)  # (sample, *space, channel)
        return y.transpose(np.argsort((self.out_spec[0], *self.out_spec[2:], self.out_spec[1])))


def pooled(x: jax.Array, window, strides, padding, base_dilation, window_dilation) -> jax.Array:
    """The least of each window, axis by axis as `lax.reduce_window` has them; infinite where a window sees padding alone.

    Along an axis of size 1 there is one value for all windows, which stays.
    """
    kept = lambda values, otherwise: [v if n > 1 else otherwise for v, n in zip(values, x.shape, strict=True)]
    widen = [(*pad, dilation - 1) for pad, dilation in zip(kept(padding, (0, 0)), kept(base_dilation, 1), strict=True)]
    x = lax.pad(x, jnp.asarray(jnp.inf, x.dtype), widen)
    return lax.reduce_window(
        x,
        jnp.asarray(jnp.inf, x.dtype),
        lax.min,
        kept(window, 1),
        kept(strides, 1),
        "VALID",
        None,
        kept(window_dilation, 1),
    )

"""Layouts: a product of the program as matrices. Weights become (B, in, out), inputs (B, *rows, in).

B counts independent matrices: batched axes (experts, vmapped layers) or the feature groups of a convolution. Axes of rows
are never merged, because a sharded axis must not be reshaped.
"""

import abc
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Layout(abc.ABC):
    """How the weight operand and the data operand of one product become matrices. Hashable, hence static under jit."""

    shape: tuple[int, ...]  # of the weight operand

    @property
    @abc.abstractmethod
    def rows_key(self) -> Any:
        """What decides `rows`: layouts with equal keys turn one data operand into the same rows."""

    @abc.abstractmethod
    def matrices(self, W: jax.Array) -> jax.Array:
        """The weight operand as (B, in, out)."""

    @abc.abstractmethod
    def operand(self, matrices: jax.Array) -> jax.Array:
        """The inverse of `matrices`."""

    @abc.abstractmethod
    def rows(self, x: jax.Array) -> jax.Array:
        """The data operand as (B, *rows, in)."""

    @property
    def dims(self) -> tuple[int, int, int]:
        """(B, in, out)."""
        return jax.eval_shape(self.matrices, jax.ShapeDtypeStruct(self.shape, jnp.float32)).shape


@dataclasses.dataclass(frozen=True)
class DotLayout(Layout):
    """`dot_general`: which axes of each operand are contracted, and which are batched."""

    shape: tuple[int, ...]
    contract: tuple[int, ...]
    batch: tuple[int, ...]
    data_contract: tuple[int, ...]
    data_batch: tuple[int, ...]

    @property
    def rows_key(self):
        return self.data_contract, self.data_batch

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
        return x.reshape(math.prod(head), *rows, math.prod(tail))


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
    groups: int

    @property
    def rows_key(self):
        window = tuple(self.shape[i] for i in self.spec[2:])
        return window, self.strides, self.padding, self.data_dilation, self.dilation, self.data_spec, self.groups

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
        x = x.transpose(self.data_spec[0], *self.data_spec[2:], self.data_spec[1])
        space = zip(self.padding, self.data_dilation, strict=True)
        widen = [(low, high, dilation - 1) for (low, high), dilation in space]
        x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *widen, (0, 0, 0)])
        window = [self.shape[i] for i in self.spec[2:]]
        for axis, (size, stride, dilation) in enumerate(zip(window, self.strides, self.dilation, strict=True), 1):
            reach = x.shape[axis] - (size - 1) * dilation
            offsets = [lax.slice_in_dim(x, i * dilation, i * dilation + reach, stride, axis) for i in range(size)]
            x = jnp.stack(offsets, axis=-2)
        # (sample, *space, *window, channel)
        head, channels = x.shape[: 1 + len(window)], x.shape[-1]
        x = x.reshape(*head, math.prod(window), self.groups, channels // self.groups)
        return jnp.moveaxis(x, -2, 0).reshape(self.groups, *head, -1)

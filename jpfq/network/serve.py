"""Serving: the quantized network with kernels packed in memory, which are dequantized inside `jit` when used."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax

from ..calibrate.activation import ActivationQuantizer
from ..matrix import Packed, QTensor, dequantize
from ..matrix.explicit_mesh import automatic, moved, runs_anywhere
from ..model.functional import Functional
from .apply import run


@dataclasses.dataclass(frozen=True)
class Served:
    """A quantized network whose kernels stay packed in memory. Call it with a batch.

    leaves: all arrays of the model, with `Packed` in place of quantized kernels.
    inputs: the same as in `Quantized`.

    Examples:
        >>> served = quantized.serve()
        >>> served(X).shape, served.nbytes < quantized.nbytes + 100
        ((64, 8), True)
    """

    leaves: tuple
    inputs: dict[str, list[ActivationQuantizer]]
    _functional: Functional  # without leaves

    @classmethod
    def of(
        cls, functional: Functional, tensors: dict[str, QTensor], inputs: dict[str, list[ActivationQuantizer]]
    ) -> "Served":
        """Packs the kernels of a result. Other leaves stay as they are."""
        named = zip(functional.paths, functional.leaves, functional.trainable, strict=True)
        leaves = tuple(Packed.of(tensors[path]) if ours and path in tensors else leaf for path, leaf, ours in named)
        return cls(leaves, inputs, dataclasses.replace(functional, leaves=()))

    def __getstate__(self):
        """The fields, without compiled functions."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @property
    def arrays(self) -> tuple:
        """All its arrays."""
        return tuple(jax.tree.leaves(self.leaves))

    @functools.cached_property
    def on_auto_axes(self) -> "Served":
        """The same with all arrays on Auto axes, which computing needs: see `jpfq.matrix.explicit_mesh`."""
        return self.moved(automatic)

    @property
    def home(self) -> Any:
        """The mesh of this network if it has Explicit axes; None otherwise."""
        return next(
            (x.sharding.mesh for x in jax.tree.leaves((self.leaves, self.inputs)) if automatic(x) is not x), None
        )

    def moved(self, f: Callable[[Any], Any]) -> "Served":
        """The same with `f` applied to every array, to move it."""
        fields = self.leaves, self.inputs
        new = moved(f, fields)
        return self if new is fields else dataclasses.replace(self, leaves=new[0], inputs=new[1])

    @property
    def params(self) -> Any:
        """The parameters in the structure of the model, with `Packed` kernels: a pytree to save, shard, or pass to a `jit`.

        `jpfq.dequantize` turns it into the parameters that the model takes.
        """
        return self._functional.rebuild(self.leaves)["params"]

    @property
    def nbytes(self) -> int:
        """Bytes of the packed kernels on the device."""
        return sum(leaf.nbytes for leaf in self.leaves if isinstance(leaf, Packed))

    @runs_anywhere
    def __call__(self, batch: Any) -> Any:
        """The outputs of the network with quantized weights and activations."""
        return self._run(self.leaves, self.inputs, batch)

    @functools.cached_property
    def _run(self):
        return jax.jit(lambda leaves, inputs, batch: run(self._functional, dequantize(leaves), inputs, batch))

"""Training code around a quantized network: parameters whose kernels are on their grids, and differentiable.

What `jax.grad`, `jit` and any optimiser of pytrees need for a few steps of fine-tuning, after quantizing or in place of it:

    codes fixed        train `quantized.tunable`: biases, norms and, for each quantized kernel, its steps
    straight through   train `quantized.params`: each kernel moves freely and is rounded in every forward pass

and in both cases the loss runs the model on `fake_quant(params, quantized)`.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from ..matrix import QTensor
from ..matrix.explicit_mesh import anywhere
from ..model.functional import flatten
from ..scalar import register_dataclass

if TYPE_CHECKING:
    from .quantized import Quantized


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Steps:
    """Stands in a tree of parameters for a kernel whose codes are fixed, and holds what there is to train of it.

    multiple: of each of its steps, in the shape of `QTensor.step`. It starts at 1, so that one learning rate serves kernels
    of every size and width.

    Examples:
        >>> trained = quantized.tunable
        >>> trained["head"]["kernel"].multiple.shape
        (1, 8)
    """

    multiple: jax.Array


def tunable(params: Any, tensors: Mapping[str, QTensor]) -> Any:
    """Parameters with a `Steps` in place of each quantized kernel: what there is to train while codes are fixed."""
    return _replaced(params, tensors, lambda _, tensor: Steps(jnp.ones_like(tensor.step)))


@anywhere
def fake_quant(params: Any, quantized: "Quantized | Mapping[str, QTensor]") -> Any:
    """Parameters for the forward pass of training: every quantized kernel at levels of its grid. Pure, and differentiable.

    A kernel given as `Steps`, as in `quantized.tunable`, has the codes it was quantized to, and passes derivatives to its
    steps. A kernel given as an array is rounded to the nearest level, and derivatives pass straight through the rounding,
    except for weights beyond the grid, which get none. Of `quantized.params` both make the quantized network; float weights
    become what plain rounding makes of them on these steps. Everything else is returned as it is.

    Args:
        params: parameters in the structure of `quantized.params`: the collection "params" of a Linen module, the
            `nnx.Param` state of an NNX model (`nnx.split(model, nnx.Param, ...)`), or those of a function.
        quantized: what `jpfq.quantize` returned; or its `tensors`, a pytree that may be an argument of a compiled function.

    Returns:
        Arrays in the structure of the parameters.

    Examples:
        >>> goal = model.apply(variables, X)  # of the float network; labels would do as well
        >>> made = lambda params: model.apply({"params": jpfq.fake_quant(params, quantized)}, X)
        >>> gradient = jax.grad(lambda params: ((made(params) - goal) ** 2).mean())(quantized.tunable)
        >>> gradient["head"]["kernel"].multiple.shape
        (1, 8)
    """
    tensors = quantized if isinstance(quantized, Mapping) else quantized.tensors
    return _replaced(params, tensors, _straight)


def on_grid(params: Any, tensors: Mapping[str, QTensor]) -> dict[str, QTensor]:
    """The kernels of parameters as `fake_quant` makes them, in codes and steps."""
    paths, leaves, _ = _flat(params, tensors)
    given = dict(zip(paths, leaves, strict=True))
    settle = lambda leaf, tensor: _scaled(leaf, tensor) if isinstance(leaf, Steps) else tensor.rounded(leaf)
    return {path: settle(given[path], tensor) for path, tensor in tensors.items()}


def _straight(leaf, tensor):
    """The kernel of a leaf at levels of its grid."""
    return _scaled(leaf, tensor).dequantize() if isinstance(leaf, Steps) else tensor.straight(leaf)


def _scaled(steps, tensor):
    return dataclasses.replace(tensor, step=tensor.step * steps.multiple.astype(tensor.step.dtype))


def _replaced(params, tensors, make):
    """Parameters with make(leaf, tensor) in place of each quantized kernel."""
    paths, leaves, tree = _flat(params, tensors)
    return tree.unflatten([make(x, tensors[p]) if p in tensors else x for p, x in zip(paths, leaves, strict=True)])


def _flat(params, tensors):
    """Paths, leaves and structure; raises where they do not fit the tensors."""
    paths, leaves, tree = flatten(params, lambda x: isinstance(x, Steps))
    given = dict(zip(paths, leaves, strict=True))
    missing = [path for path in tensors if path not in given]
    if missing:
        raise ValueError(
            f"The parameters have no leaf {missing[0]!r}, which is quantized. They are to have the structure of "
            f"quantized.params (of a Linen module the collection 'params' alone); got {', '.join(paths) or 'no leaves'}."
        )
    for path, leaf in given.items():
        tensor, fixed = tensors.get(path), isinstance(leaf, Steps)
        if tensor is None:
            if fixed:
                raise ValueError(f"{path} is given as Steps, but was not quantized: give its array.")
            continue
        found, wanted = jnp.shape(leaf.multiple if fixed else leaf), tensor.step.shape if fixed else tensor.shape
        if found != wanted:
            kind = "multiples of its steps" if fixed else "weights"
            raise ValueError(f"{path} takes {kind} of shape {wanted}; got {found}. See quantized.tunable.")
    return paths, leaves, tree

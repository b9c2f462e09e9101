"""Fine-tuning: differentiable parameters whose kernels are on their grids, for any training loop.

There are two ways, with `jax.grad`, `jit` and any optimiser of pytrees:

    codes fixed        train `quantized.tunable`: biases, norms and, for each quantized kernel, its steps
    straight through   train `quantized.params`: each kernel moves freely and is rounded in every forward pass

In both the loss runs the model on `fake_quant(params, quantized)`.
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from ..matrix import QTensor
from ..matrix.explicit_mesh import anywhere
from ..model.functional import Functional, flatten
from ..model.mesh import like
from ..scalar import register_dataclass

if TYPE_CHECKING:
    from .quantized import Quantized


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Steps:
    """Replaces a kernel with fixed codes in a tree of parameters: only its steps are trained.

    multiple: a factor for each step, in the shape of `QTensor.step`. It starts at 1, so that one learning rate suits
    kernels of all sizes and widths.

    Examples:
        >>> trained = quantized.tunable
        >>> trained["head"]["kernel"].multiple.shape
        (1, 8)
    """

    multiple: jax.Array


def tunable(params: Any, tensors: Mapping[str, QTensor]) -> Any:
    """Parameters with a `Steps` in place of each quantized kernel, to train with fixed codes."""
    return _replaced(params, tensors, lambda _, tensor: Steps(jnp.ones_like(tensor.step)))


@anywhere
def fake_quant(params: Any, quantized: "Quantized | Mapping[str, QTensor]") -> Any:
    """Parameters for the forward pass of training, with every quantized kernel at levels of its grid. Differentiable.

    A kernel given as `Steps`, as in `quantized.tunable`, has its quantized codes, and derivatives go to the steps. A kernel
    given as an array is rounded to the nearest level; derivatives pass straight through the rounding, and are 0 for weights
    beyond the grid. Untrained, both give the quantized network. Other parameters are returned unchanged.

    Args:
        params: parameters in the structure of `quantized.params`: the collection "params" of a Linen module, the
            `nnx.Param` state of an NNX model (`nnx.split(model, nnx.Param, ...)`), or those of a function.
        quantized: the result of `jpfq.quantize`; or its `tensors`, a pytree that compiled functions can take as an argument.

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
    """The kernels that `fake_quant` computes, as codes and steps."""
    paths, leaves, _ = _flat(params, tensors)
    given = dict(zip(paths, leaves, strict=True))
    quantize = lambda leaf, tensor: _scaled(leaf, tensor) if isinstance(leaf, Steps) else tensor.rounded(leaf)
    return {path: quantize(given[path], tensor) for path, tensor in tensors.items()}


def trained(functional: Functional, params: Any, tensors: Mapping[str, QTensor]) -> Functional:
    """A model with trained parameters, whose quantized kernels are at the levels of their grids.

    Raises:
        ValueError: the parameters are not those of the model.
    """
    paths, values, _ = flatten(fake_quant(params, tensors))
    wanted = {path for path, trainable in zip(functional.paths, functional.trainable, strict=True) if trainable}
    if set(paths) != wanted:
        raise ValueError(f"The trained parameters differ from the model's in {sorted(set(paths) ^ wanted)}.")
    new = dict(zip(paths, values, strict=True))
    old = zip(functional.paths, functional.leaves, functional.trainable, strict=True)
    leaves = tuple(like(new[path], leaf) if trainable else leaf for path, leaf, trainable in old)
    return dataclasses.replace(functional, leaves=leaves)


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
    """Paths, leaves and structure; raises if they do not match the tensors."""
    paths, leaves, tree = flatten(params, lambda x: isinstance(x, Steps))
    given = dict(zip(paths, leaves, strict=True))
    missing = [path for path in tensors if path not in given]
    if missing:
        raise ValueError(
            f"The parameters have no leaf {missing[0]!r}, which is quantized. Give them in the structure of "
            f"quantized.params (for a Linen module the collection 'params' alone); got {', '.join(paths) or 'no leaves'}."
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

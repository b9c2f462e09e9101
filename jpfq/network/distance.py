"""The distance of a quantized network's outputs from the float network's, as a loss to be differentiated."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..matrix.arrays import at_least_float32


def floating(outputs: Any) -> list[jax.Array]:
    """The floating outputs of a network; the others have no distance."""
    return [x for x in jax.tree.leaves(outputs) if jnp.issubdtype(jnp.result_type(x), jnp.floating)]


def distance_of(loss: str | Callable, outputs: Any) -> Callable[[Any, Any, Sequence | None], jax.Array]:
    """The function (float outputs, quantized outputs, weights of their entries or None) -> loss.

    Args:
        outputs: those of a batch, or their shapes; the loss is checked for them.

    Raises:
        ValueError: there are no floating outputs, no logits, or the loss is no number.
    """
    listed = ", ".join(f"{x.dtype}{list(x.shape)}" for x in jax.tree.leaves(outputs)) or "nothing"
    wanted = "Return numbers from the model, such as logits before argmax, or give a function as loss"
    if not isinstance(loss, str):
        made = jax.eval_shape(loss, outputs, outputs)
        if jnp.shape(made) != () or not jnp.issubdtype(jnp.result_type(made), jnp.floating):
            raise ValueError(
                f"loss returns {made} for the outputs {listed}; it is to return one floating number, to be minimised: "
                "take a mean over samples."
            )
        return lambda exact, found, weights: loss(exact, found)
    if not floating(outputs):
        raise ValueError(f"Learning compares floating outputs of the network; it returns {listed}. {wanted}.")
    if loss == "logits" and (wrong := [x for x in floating(outputs) if not x.ndim or x.shape[-1] < 2]):
        raise ValueError(
            f"loss='logits' takes categories on the last axis of each output, two at least; got {wrong[0].dtype}"
            f"{list(wrong[0].shape)} among {listed}. Take loss='outputs' for other outputs, or give a function."
        )
    return _logits if loss == "logits" else _outputs


def _logits(exact, found, weights):
    """The mean over rows of KL(softmax of the float network, softmax of the quantized one), summed over outputs."""
    total = jnp.zeros(())
    for (a, b), weight in _pairs(exact, found, weights):
        p, q = jax.nn.log_softmax(a), jax.nn.log_softmax(b)
        rows = jnp.sum(jnp.where(p > -jnp.inf, jnp.exp(p) * (p - q), 0), -1)
        total += _mean(rows, None if weight is None else weight.max(-1)).astype(total.dtype)
    return total


def _outputs(exact, found, weights):
    """The square error relative to the square of the float outputs, summed over outputs. Equal infinities agree."""
    total = jnp.zeros(())
    for (a, b), weight in _pairs(exact, found, weights):
        same = jnp.isinf(a) & (a == b)
        a, b = (jnp.where(same, 0, x) for x in (a, b))
        energy = _mean(a**2, weight)
        total += (_mean((a - b) ** 2, weight) / jnp.where(energy > 0, energy, 1)).astype(total.dtype)
    return total


def _pairs(exact, found, weights):
    pairs = [tuple(map(at_least_float32, pair)) for pair in zip(floating(exact), floating(found), strict=True)]
    return zip(pairs, weights or [None] * len(pairs), strict=True)


def _mean(x, weight):
    """The mean of entries by their weights, which have the rank of `x`."""
    if weight is None:
        return jnp.mean(x)
    weight = jnp.broadcast_to(weight.astype(x.dtype), x.shape)
    return jnp.sum(jnp.where(weight > 0, weight * x, 0)) / jnp.maximum(jnp.sum(weight), jnp.finfo(x.dtype).tiny)

"""The batches that a network is trained on, and the outputs of the float network for them, which are its targets."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ..calibrate.batches import read_batches
from ..calibrate.row_weights import of_outputs
from ..model.functional import Functional
from ..model.program import trace

KEPT = 2**28  # bytes of float outputs that are kept from one step to the next


class Batch(NamedTuple):
    """A batch by its number, and the weights of the entries of each floating output, or None."""

    number: int
    data: Any
    weights: Any


class Outputs:
    """The outputs of the float network, which are kept where those of all batches are few."""

    def __init__(self, network: Functional, batches: Sequence[Batch]):
        self.leaves, self.run = network.leaves, jax.jit(lambda leaves, data: network.fn(leaves, data))
        self.shapes = jax.eval_shape(self.run, network.leaves, batches[0].data)
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self.shapes))
        self.keeps, self.known = size * len(batches) <= KEPT, {}

    def __call__(self, batch: Batch) -> Any:
        if batch.number in self.known:
            return self.known[batch.number]
        found = self.run(self.leaves, batch.data)
        if self.keeps:
            self.known[batch.number] = found
        return found


def split(
    batches: Iterable, held_out: Any, network: Functional, seed: int, weighted: bool
) -> tuple[list[Batch], list[Batch]]:
    """The batches to train on, and those held out.

    Args:
        held_out: the share of the batches that is held out, or other batches.
        weighted: whether the loss takes the weights of `Weighted` batches.

    Raises:
        ValueError: there are too few batches, or weights that the loss does not take.
    """
    found = _read(batches, network, weighted)
    if not isinstance(held_out, (int, float)):
        held = _read(held_out, network, weighted)
        return found, [batch._replace(number=len(found) + batch.number) for batch in held]
    count = max(1, round(held_out * len(found)))
    if count >= len(found):
        raise ValueError(
            f"held_out={held_out} of {len(found)} batches leaves none to train on: cut the data into more and "
            "smaller batches, of 8 samples for example, or give held-out batches as held_out=[...]."
        )
    order = np.random.default_rng(seed).permutation(len(found))
    return [found[i] for i in order[count:]], [found[i] for i in order[:count]]


def _read(batches, network, weighted) -> list[Batch]:
    """Checked batches in their order, with the weights of the outputs."""
    found = []
    for group in read_batches(batches):
        tree = jax.tree.structure(group.example)
        weights: list = [None] * len(group.leaves)
        if any(given is not None for given in group.weights):
            if not weighted:
                raise ValueError(
                    "A function as loss does not see the weights of jpfq.Weighted batches: give batches without padding, "
                    "or loss='logits' or 'outputs'."
                )
            program = trace(network.fn, network.paths, network.leaves, group.example)
            weights = of_outputs(program, network.leaves, group.leaves, group.weights)
        numbers = [number for number, _ in group.finite]
        found += map(Batch, numbers, map(tree.unflatten, group.leaves), weights)
    return sorted(found, key=lambda batch: batch.number)

"""The weights that share a step."""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from .predicates import is_count
from .pytree import refuse_traced


def static(default):
    return dataclasses.field(default=default, metadata={"static": True})


class Per(abc.ABC):
    """The groups of weights of a matrix W (in, out) that share one step."""

    neurons: int | None = 1  # how many share a step; None for all
    refits: int | None = None  # inputs in a group whose steps are chosen on the way; None if all are chosen beforehand

    @abc.abstractmethod
    def split(self, W: jax.Array) -> jax.Array:
        """W as (groups, members, channels): a step is chosen over each row of members."""

    def misfit(self, n: int, out: int) -> str | None:
        """The reason why a kernel of n inputs and `out` neurons cannot have these groups; None if it can."""
        del n, out
        return None

    def run(self, n: int) -> int:
        """The number of consecutive inputs, of n, that share a step."""
        return n

    def check(self, recipe: Any) -> None:
        """Raises where these groups contradict another part of a recipe."""
        del recipe


@dataclasses.dataclass(frozen=True)
class PerTensor(Per):
    """One step for the whole matrix, as in the papers.

    Examples:
        >>> jpfq.scale.AbsMax(per=jpfq.scale.PerTensor())(W, jpfq.Integer(4)).step.shape
        (1, 1)
    """

    neurons = None

    def split(self, W):
        return W.reshape(1, -1, 1)


@dataclasses.dataclass(frozen=True)
class PerChannel(Per):
    """One step per neuron.

    Examples:
        >>> jpfq.scale.AbsMax(per=jpfq.scale.PerChannel())(W, jpfq.Integer(4)).step.shape
        (1, 8)
    """

    def split(self, W):
        return W[None]


@dataclasses.dataclass(frozen=True)
class PerGroup(Per):
    """One step per neuron and run of `size` input coordinates.

    The steps are chosen before the recursion; with `refit`, each group's when the recursion reaches it, from what its
    weights have become by then (the default of OPTQ's code; it needs order=Natural()).

    Examples:
        >>> jpfq.scale.AbsMax(per=jpfq.scale.PerGroup(16))(W, jpfq.Integer(4)).step.shape
        (2, 8)
    """

    size: int
    refit: bool = False

    def __post_init__(self):
        refuse_traced("PerGroup", "size", self.size)
        if not is_count(self.size):
            raise ValueError(f"PerGroup takes a positive number of input coordinates; got {self.size!r}.")

    @property
    def refits(self) -> int | None:  # type: ignore[override]
        return self.size if self.refit else None

    def run(self, n):
        return self.size

    def check(self, recipe):
        if not self.refit:
            return
        if recipe.scale.searches:
            raise ValueError(
                f"{recipe.scale} searches for steps beforehand, which PerGroup(refit=True) chooses on the way."
            )
        if not recipe.order.natural:
            raise ValueError("PerGroup(refit=True) takes groups as the recursion meets them: it needs order=Natural().")

    def misfit(self, n, out):
        if n % self.size == 0:
            return None
        return f"PerGroup({self.size}) does not divide its {n} inputs; take a divisor, or PerChannel() by a rule of its own"

    def split(self, W):
        if reason := self.misfit(*W.shape):
            raise ValueError(f"A kernel cannot have these steps: {reason}.")
        return W.reshape(-1, self.size, W.shape[1])


@dataclasses.dataclass(frozen=True)
class PerBlock(Per):
    """One step per block of `size` input coordinates and `neurons` neurons: 128 by 128 in FP8 checkpoints.

    A search or a finisher moves the step of each neuron by itself, so there is none with it.

    Examples:
        >>> jpfq.scale.AbsMax(per=jpfq.scale.PerBlock(16, 4))(W, jpfq.E4M3()).step.shape
        (2, 2)
    """

    size: int
    neurons: int  # type: ignore[assignment]

    def __post_init__(self):
        for name in ("size", "neurons"):
            value = getattr(self, name)
            refuse_traced("PerBlock", name, value)
            if not is_count(value):
                raise ValueError(f"PerBlock takes positive numbers of inputs and of neurons; got {name}={value!r}.")

    def run(self, n):
        return self.size

    def check(self, recipe):
        if not recipe.scale.in_blocks or not recipe.moves_step:
            return
        searches = recipe.scale.searches
        mover, remedy = (recipe.scale, "scale=jpfq.scale.AbsMax") if searches else (recipe.finish, "finish=Descend()")
        raise ValueError(
            f"{mover} moves the step of each neuron, and {self} has one for a block of them: take {remedy}."
        )

    def misfit(self, n, out):
        if n % self.size == 0 and out % self.neurons == 0:
            return None
        block, kernel = f"PerBlock({self.size}, {self.neurons})", f"{n} inputs by {out} neurons"
        return f"{block} does not divide its {kernel}; take divisors, or PerChannel() by a rule of its own"

    def split(self, W):
        if reason := self.misfit(*W.shape):
            raise ValueError(f"A kernel cannot have these steps: {reason}.")
        blocks = W.reshape(-1, self.size, W.shape[1] // self.neurons, self.neurons)
        return jnp.swapaxes(blocks, 2, 3).reshape(blocks.shape[0], -1, blocks.shape[2])

"""A solved site, and what a run asks of one."""

from typing import NamedTuple

import jax

from ..matrix import Recipe, Solution
from ..matrix.layout import Layout
from .activation import ActivationQuantizer, Activations


class SiteResult(NamedTuple):
    """The outcome of quantizing one site, as far as later sites and the result depend on it."""

    solution: Solution
    error: jax.Array | None  # mean error of each neuron (B, out), which its bias takes; None where that stays as it is
    rounded: ActivationQuantizer | None  # how the input is rounded; None if it is not


class SiteRequest(NamedTuple):
    """The demands of a run on a site, which a record must fit."""

    dims: tuple[int, int, int]  # matrices, inputs, neurons
    recipe: Recipe
    corrects: bool  # whether a bias takes the mean error
    activations: Activations | None
    layout: Layout  # that the input is rounded by

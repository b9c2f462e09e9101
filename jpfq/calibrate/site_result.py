"""The result of quantizing one site, and the request that it must match to be reused."""

from typing import NamedTuple

import jax

from ..matrix import Recipe, Solution
from ..matrix.layout import Layout
from .activation import ActivationQuantizer, Activations


class SiteResult(NamedTuple):
    """The result of quantizing one site: all that later sites and the final result depend on."""

    solution: Solution
    error: (
        jax.Array | None
    )  # mean error of each neuron (B, out), to subtract from its bias; None if no bias is corrected
    rounded: ActivationQuantizer | None  # the quantizer of the input; None if the input is not quantized


class SiteRequest(NamedTuple):
    """The settings of a site in this run. A stored result is used only if it matches them."""

    dims: tuple[int, int, int]  # matrices, inputs, neurons
    recipe: Recipe
    corrects: bool  # whether its bias is corrected
    activations: Activations | None
    layout: Layout  # of the input that is rounded

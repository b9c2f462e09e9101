"""`certify`: the worst-case value of every integer sum, from the stored codes alone.

It does not depend on how the codes were chosen: for each kernel it takes the codes k of the weights and the range [mu, nu]
of the codes x of the inputs, in int64. The sum of k x over a tile is largest for x = nu where k > 0 and x = mu where k < 0,
and smallest the other way round. Padding of a convolution has the code of 0, which lies in the range. Because any input may
be 0, no partial sum, in whatever order, exceeds these values.
"""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from ..matrix import QTensor
from ..matrix.explicit_mesh import runs_anywhere
from ..scalar import WorstCase
from ..scalar.predicates import is_count
from .integer import integer_sites
from .table import table

if TYPE_CHECKING:
    from .quantized import Quantized

MAX_BITS = 63


@dataclasses.dataclass(frozen=True)
class SiteCertificate:
    """One use of a kernel: its codes k (B, in, out), and the largest and least sums of its tiles (B, tiles, out)."""

    path: str
    k: np.ndarray
    inputs: tuple[int, int]
    tile: int
    most: np.ndarray
    least: np.ndarray

    @property
    def widths(self) -> np.ndarray:
        """The accumulator bits that each sum needs (B, tiles, out)."""
        return _width(np.maximum(self.most, -self.least))

    @property
    def bits(self) -> int:
        """The accumulator bits that suffice for all tiles."""
        return int(self.widths.max(initial=1))

    @property
    def outer_widths(self) -> np.ndarray:
        """The accumulator bits that each sum over all tiles needs (B, out)."""
        return _width(np.maximum(self.most.sum(1), -self.least.sum(1)))

    @property
    def outer_bits(self) -> int:
        """The accumulator bits that suffice for all sums over all tiles."""
        return int(self.outer_widths.max(initial=1))

    def worst_input(self, matrix: int, neuron: int) -> np.ndarray:
        """Input codes (in,) for which every tile of a neuron attains its sum of largest magnitude."""
        k, (mu, nu) = self.k[matrix, :, neuron], self.inputs
        below = -self.least[matrix, :, neuron] > self.most[matrix, :, neuron]
        sign = np.where(np.repeat(below, self.tile)[: len(k)], -1, 1)
        return np.where(sign * k > 0, nu, np.where(sign * k < 0, mu, 0))


@dataclasses.dataclass(frozen=True)
class Certificate:
    """The worst-case sums of a quantized network, site by site. Print it.

    sites: one for each use of a kernel with quantized inputs.
    left: paths of quantized kernels without quantized inputs, for which there are no integer sums.
    bits: the accumulator bits that were given, or None.

    Examples:
        >>> rule = jpfq.Rule(".*", bits=4, activation_bits=8, accumulator=jpfq.Accumulator(16, tile=16))
        >>> integer = jpfq.quantize(model, batches, rule, variables=variables)
        >>> certificate = jpfq.certify(integer, bits=16, tile=16)
        >>> certificate.holds, certificate.needed <= 16, certificate.failing
        (True, True, [])
    """

    sites: list[SiteCertificate]
    left: tuple[str, ...]
    bits: int | None

    @property
    def needed(self) -> int:
        """The accumulator bits that hold every tile's sum, whatever the inputs."""
        return max(site.bits for site in self.sites)

    @property
    def holds(self) -> bool:
        """True if no sum can overflow the given bits."""
        return self.bits is not None and self.needed <= self.bits and not self.left

    @property
    def failing(self) -> list[tuple[str, int, int, int]]:
        """(path, matrix, tile, neuron) of every sum that can overflow the given bits."""
        return [
            (site.path, int(matrix), int(tile), int(neuron))
            for site in self.sites
            for matrix, tile, neuron in np.argwhere(site.widths > (MAX_BITS if self.bits is None else self.bits))
        ]

    def __str__(self) -> str:
        rows = []
        for site in self.sites:
            over = "" if self.bits is None else f"{int((site.widths > self.bits).sum()):,} of {site.widths.size:,}"
            worst = max(int(site.most.max(initial=0)), -int(site.least.min(initial=0)))
            inputs = f"{site.inputs[0]} .. {site.inputs[1]}"
            rows.append((site.path, inputs, str(site.tile), f"{worst:,}", str(site.bits), str(site.outer_bits), over))
        head = ("kernel", "input codes", "tile", "largest sum", "bits", "outer bits", "sums that can overflow")
        text = [table(head, rows)]
        if self.left:
            text.append(f"Inputs of {', '.join(self.left)} are not quantized: nothing is certified of these kernels.")
        if self.bits is not None:
            verdict = "no input overflows" if self.holds else "some input may overflow"
            text.append(f"{self.needed} bits hold every sum; asked for {self.bits}: {verdict}.")
        return "\n\n".join(text)


@runs_anywhere
def certify(quantized: "Quantized", *, bits: int | None = None, tile: int | None = None) -> Certificate:
    """The exact worst case of every integer sum of a quantized network, over all possible inputs.

    Args:
        quantized: a result with quantized activations.
        bits: P, the accumulator bits to check; None only reports the bits that are needed.
        tile: T, the number of inputs per sum; None for all inputs.

    Returns:
        A `Certificate`: for each site, tile and neuron the largest and the least sum, the bits they need, and the inputs
        that attain them.

    Raises:
        ValueError: no activations are quantized, weights have a zero point, or the result was loaded without its model.

    Examples:
        >>> rule = jpfq.Rule(".*", bits=4, activation_bits=8, accumulator=jpfq.Accumulator(16, tile=16))
        >>> integer = jpfq.quantize(model, batches, rule, variables=variables)
        >>> jpfq.certify(integer, bits=16, tile=16).holds
        True
    """
    if bits is not None and (not is_count(bits, 2) or bits > MAX_BITS):
        raise ValueError(f"bits is an integer from 2 to {MAX_BITS}, or None; got {bits!r}.")
    if tile is not None and not is_count(tile):
        raise ValueError(f"tile is a positive number of inputs, or None for all; got {tile!r}.")
    if not quantized.inputs.keys() & quantized.tensors.keys():
        raise ValueError(
            "No inputs are quantized, so there are no integer sums: quantize with activation_bits=8 in a rule."
        )
    if quantized._shapes is None:
        raise ValueError(
            "This saved result does not have the shapes of a batch, so its products are not known: certify the result that "
            "jpfq.quantize returns."
        )
    _, sites, _ = integer_sites(quantized._functional, quantized.tensors, quantized.inputs, quantized._shapes)
    found = [_certified(at.path, np.asarray(at.weights.codes, np.int64), at.inputs, tile) for at in sites]
    return Certificate(found, tuple(path for path in quantized.tensors if path not in quantized.inputs), bits)


def _certified(path, k, inputs, tile):
    mu, nu = inputs
    n = k.shape[1]
    size = n if tile is None else min(tile, n)
    starts = np.arange(0, n, size)
    over = lambda x: np.add.reduceat(x, starts, axis=1)
    most, least = over(np.maximum(mu * k, nu * k)), over(np.minimum(mu * k, nu * k))
    return SiteCertificate(path, k, inputs, size, most, least)


def _width(largest):
    """Bits of the smallest signed accumulator, symmetric about 0, that holds +-largest."""
    count = np.ones(largest.shape, int)
    for b in range(MAX_BITS):
        count += largest >= 2**b
    return count


def any_codes_bits(tensor: QTensor, reach: WorstCase) -> tuple[int, int]:
    """The number of inputs in a tile, and the accumulator bits that suffice for any codes on the kernel's grid."""
    B, _, out, _ = reach.ends.shape
    n = tensor.codes.size // (B * out)
    return reach.sums.size(n), reach.types_bits(tensor.grid, n)

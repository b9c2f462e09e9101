"""`certify`: how far integer sums can go, from the stored codes alone.

Independent of how the codes were made: for each kernel the weights' codes and the range of its inputs' codes, in int64. With
inputs x in [mu, nu] a tile's sum of k x is largest at x = nu where k > 0 and mu where k < 0, least the other way round.
Padding of a convolution has the code of 0, which is one of them; and as any input may be 0, no sum on the way, in whatever
order, goes further.
"""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from ..matrix import QTensor
from ..matrix.explicit_mesh import runs_anywhere
from ..scalar import WorstCase
from .integer import integer_sites
from .table import table

if TYPE_CHECKING:
    from .quantized import Quantized

MAX_BITS = 63


@dataclasses.dataclass(frozen=True)
class SiteCertificate:
    """One use of a kernel: integer codes k (B, in, out), and the sums of its tiles (B, tiles, out) over all inputs."""

    path: str
    k: np.ndarray
    inputs: tuple[int, int]
    tile: int
    most: np.ndarray
    least: np.ndarray

    @property
    def widths(self) -> np.ndarray:
        """The width that each sum needs (B, tiles, out)."""
        return _width(np.maximum(self.most, -self.least))

    @property
    def bits(self) -> int:
        """The width that all tiles need."""
        return int(self.widths.max(initial=1))

    @property
    def outer_widths(self) -> np.ndarray:
        """The width that the sum over all tiles needs (B, out)."""
        return _width(np.maximum(self.most.sum(1), -self.least.sum(1)))

    @property
    def outer_bits(self) -> int:
        """The width that the sums over all tiles need."""
        return int(self.outer_widths.max(initial=1))

    def worst_input(self, matrix: int, neuron: int) -> np.ndarray:
        """Input codes (in,) for which every tile of a neuron has the sum of largest magnitude that it can have."""
        k, (mu, nu) = self.k[matrix, :, neuron], self.inputs
        below = -self.least[matrix, :, neuron] > self.most[matrix, :, neuron]
        sign = np.where(np.repeat(below, self.tile)[: len(k)], -1, 1)
        return np.where(sign * k > 0, nu, np.where(sign * k < 0, mu, 0))


@dataclasses.dataclass(frozen=True)
class Certificate:
    """The sums of a quantized network, site by site. Print it.

    sites: one for each use of a kernel with quantized inputs. bits: the width that was asked about, or None.
    left: quantized kernels whose inputs are not, for which nothing can be said.

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
        """The width that holds every tile's sum, whatever the inputs."""
        return max(site.bits for site in self.sites)

    @property
    def holds(self) -> bool:
        """True if no sum can overflow the width that was asked about."""
        return self.bits is not None and self.needed <= self.bits and not self.left

    @property
    def failing(self) -> list[tuple[str, int, int, int]]:
        """(path, matrix, tile, neuron) of every sum that can overflow it."""
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
    """The exact worst case of every integer sum of a quantized network, over all inputs there can be.

    Args:
        quantized: with quantized activations.
        bits: P, the width asked about; None only reports what is needed.
        tile: T, how many inputs are summed; None for all of them.

    Returns:
        A `Certificate`: per site, tile and neuron the largest and the least sum and the width they need, and the inputs that
        attain them.

    Raises:
        ValueError: for a model without quantized activations, weights with a zero point, a result loaded without its model.

    Examples:
        >>> rule = jpfq.Rule(".*", bits=4, activation_bits=8, accumulator=jpfq.Accumulator(16, tile=16))
        >>> integer = jpfq.quantize(model, batches, rule, variables=variables)
        >>> jpfq.certify(integer, bits=16, tile=16).holds
        True
    """
    if bits is not None and (isinstance(bits, bool) or not isinstance(bits, int) or not 1 < bits <= MAX_BITS):
        raise ValueError(f"bits is an integer from 2 to {MAX_BITS}, or None; got {bits!r}.")
    if tile is not None and (isinstance(tile, bool) or not isinstance(tile, int) or tile < 1):
        raise ValueError(f"tile is a positive number of inputs, or None for all; got {tile!r}.")
    if not quantized.inputs:
        raise ValueError(
            "No kernel has quantized inputs, so sums of integers there are none: give a rule activation_bits=8."
        )
    if quantized._shapes is None:
        raise ValueError(
            "What was saved of this result does not say of which shapes a batch is, so its products are not known: certify "
            "what jpfq.quantize returns."
        )
    _, sites = integer_sites(quantized._functional, quantized.tensors, quantized.inputs, quantized._shapes)
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


def _width(reach):
    """Bits of the smallest signed accumulator, symmetric about 0, that holds +-reach."""
    count = np.ones(reach.shape, int)
    for b in range(MAX_BITS):
        count += reach >= 2**b
    return count


def any_codes_bits(tensor: QTensor, reach: WorstCase) -> tuple[int, int]:
    """Inputs in a tile of a kernel's sums, and the width that they take of any codes on its grid."""
    B, _, out, _ = reach.ends.shape
    n = tensor.codes.size // (B * out)
    return reach.sums.size(n), reach.types_bits(tensor.grid, n)

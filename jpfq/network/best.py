"""The recommended rules."""

from ..scalar import Grid
from ..scalar.grid import Number
from .rules import Rule


def best(bits: Number | None = None, *, grid: Grid | None = None, pattern: str = ".*") -> list[Rule]:
    """The recommended rules, which a bare number of bits means too. Chosen by measurement: bench/methods.py.

    Largest inputs first; the Gram shrunk towards independent inputs, by what its number of rows can tell; for each neuron
    the multiple of its largest weight that leaves the least output error; Qronos in its least squares form; then four passes
    of coordinate descent with the steps free. Each part is a setting of its own, and what a rule names replaces it.

    Args:
        bits: width of the codes, 4 if neither this nor `grid` is given.
        grid: the alphabet, such as `jpfq.Ternary()`, in place of `bits`.
        pattern: of the kernels that are meant.

    Returns:
        A list of one rule.

    Examples:
        >>> rules = [jpfq.Rule("head/.*", bits=8), *jpfq.best(3)]
    """
    return [Rule(pattern, bits=4 if bits is None and grid is None else bits, grid=grid)]

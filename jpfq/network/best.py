"""The recommended rules. What a rule leaves out takes the recommended value, from matrix/recipe.py."""

from ..scalar import Grid
from ..scalar.grid import Number
from .rules import Rule


def best(bits: Number | None = None, *, grid: Grid | None = None, pattern: str = ".*") -> list[Rule]:
    """The recommended rules, which a bare number of bits stands for. Chosen by measurement: bench/methods.py.

    They visit the largest inputs first; shrink the Gram towards independent inputs, the more the fewer rows it has; choose
    for each neuron the multiple of its largest weight with the least output error; quantize by Qronos in its least squares
    form; and finish with four passes of coordinate descent that also adjust the steps. A rule may set each of these parts.

    Args:
        bits: width of the codes, 4 if neither this nor `grid` is given.
        grid: the alphabet, such as `jpfq.Ternary()`, in place of `bits`.
        pattern: regular expression for the paths of the kernels.

    Returns:
        A list of one rule.

    Examples:
        >>> rules = [jpfq.Rule("head/.*", bits=8), *jpfq.best(3)]
    """
    return [Rule(pattern, bits=4 if bits is None and grid is None else bits, grid=grid)]

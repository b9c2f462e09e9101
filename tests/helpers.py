"""What all tests share: the tolerance of each dtype, assertions about codes, problems with fixed seeds."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

import jpfq
from jpfq.matrix import Recursion, substitute
from jpfq.scalar import Rounding, register_dataclass
from tests.reference import gpfq as reference

# What `solve` does about a method when nothing more than the method is meant.
PLAIN = {"shrinkage": None, "scale": jpfq.scale.MinMSE(), "order": jpfq.order.Natural(), "finish": None}

# How far two ways of computing one number of order 1 may lie apart: a few hundred roundings.
TOLERANCE = {"float64": 1e-12, "float32": 3e-5, "bfloat16": 3e-2}

# How far, in steps, an argument of the recursion may be off in each dtype, at the sizes of these tests.
TIE = {"float64": 0.0, "float32": 1e-4}


def tolerance(x) -> float:
    """The tolerance of an array's dtype."""
    return TOLERANCE[jnp.asarray(x).dtype.name]


def assert_close(found, expected, scale=None):
    """`found` is `expected` within the tolerance of its dtype, relative to the largest entry (or `scale`)."""
    expected = np.asarray(expected, np.float64)
    scale = (np.abs(expected).max(initial=0) or 1) if scale is None else scale
    limit = tolerance(found) * scale
    found = np.asarray(found, np.float64)
    assert found.shape == expected.shape, f"shapes {found.shape} and {expected.shape}"
    worst = np.abs(found - expected).max(initial=0)
    assert worst <= limit, f"off by {worst:.3g}, more than {limit:.3g}"


def assert_codes_equal(codes, reference):
    """All codes are the same integers."""
    codes, reference = np.asarray(codes), np.asarray(reference)
    assert codes.shape == reference.shape, f"shapes {codes.shape} and {reference.shape}"
    wrong = np.argwhere(codes != reference)
    assert not len(wrong), f"{len(wrong)} of {codes.size} codes differ, first at {wrong[0]}"


def assert_codes_equal_but_for_ties(codes, reference, position, *, order=None, share=0.001):
    """Codes (in, out) equal the reference, except where its float64 argument all but lay at a tie.

    After a tie went the other way the later codes of that neuron may differ too, hence each neuron is compared up to its
    first difference in the order of the recursion. There the code must differ by one and the reference's argument, in
    units of the grid (`position` = a / step + zero), must be within TIE of a half-integer. The share of neurons' first
    differences among all codes must be tiny.
    """
    codes, reference, position = (np.asarray(x, np.float64) for x in (codes, reference, position))
    order = np.arange(codes.shape[0]) if order is None else np.asarray(order)
    flips = 0
    for o in range(codes.shape[1]):
        apart = [t for t in order if codes[t, o] != reference[t, o]]
        if apart:
            t, flips = apart[0], flips + 1
            distance = abs(position[t, o] - np.floor(position[t, o]) - 0.5)
            assert abs(codes[t, o] - reference[t, o]) == 1, f"code ({t}, {o}) is off by more than one level"
            assert distance <= TIE["float32"], f"code ({t}, {o}) differs, {distance:.3g} steps from a tie"
    assert flips <= share * codes.size, f"{flips} neurons of {codes.shape[1]} met a tie"


def assert_on_grid(tensor):
    """Codes of a QTensor are integers of its grid, and it stands for step * (level - zero)."""
    lo, hi, *_ = tensor.grid.alphabet()
    codes = np.asarray(tensor.codes, np.float64)
    assert codes.min() >= lo
    assert codes.max() <= hi
    assert jnp.issubdtype(tensor.codes.dtype, jnp.integer)
    repeats = [full // here for full, here in zip(codes.shape, tensor.step.shape, strict=True)]
    step, zero = (np.kron(np.asarray(x, np.float64), np.ones(repeats)) for x in (tensor.step, tensor.zero))
    levels = codes if tensor.grid.table is None else np.asarray(tensor.grid.table)[np.asarray(tensor.codes)]
    assert_close(tensor.dequantize(), step * (levels - zero))


@register_dataclass
@dataclasses.dataclass(frozen=True)
class Dither(Rounding):
    """A rounding that draws: nearest after a uniform shift by up to half a step."""

    random = True

    def __call__(self, carry, a, context):
        shift = context.levels.step * (jax.random.uniform(context.key, dtype=a.dtype) - 0.5)
        return carry, context.levels.encode(a + shift)

    def error(self, levels):
        return levels.step


def problem(seed=0, *, m=64, n=40, out=6, dead=(), drift=0.1):
    """X, Xq, W in float64 with correlated inputs; the coordinates `dead` are 0 in Xq. Xq is X at drift 0."""
    rng = np.random.default_rng(seed)
    mix = np.eye(n) + 0.4 * rng.standard_normal((n, n)) / np.sqrt(n)
    X = rng.standard_normal((m, n)) @ mix + 0.2
    X *= np.linspace(0.5, 2, n)[rng.permutation(n)]
    Xq = X + drift * rng.standard_normal((m, n)) if drift else X.copy()
    Xq[:, list(dead)] = 0
    if not drift:
        X = Xq
    return X, Xq, rng.standard_normal((n, out))


def problem32(seed=30, *, n=40, out=6, **settings):
    """Weights and the Gram of a problem, in float32."""
    X, Xq, W = (jnp.asarray(x, jnp.float32) for x in problem(seed, n=n, out=out, **settings))
    return W, jpfq.Gram.from_data(X, Xq)


def recursed(system, levels, order=None, rounding=None, key=None, block=None):
    """The path of a system; methods of one shape share a program."""
    order = jnp.arange(system.base.shape[0]) if order is None else order
    return _recursed(system._replace(cost=None), levels, order, rounding or jpfq.rounding.Nearest(), key, block)


@functools.partial(jax.jit, static_argnames="block")
def _recursed(system, levels, order, rounding, key, block):
    recursion = Recursion(levels, order, system.base.shape[1], rounding, key)
    return substitute(system.base, system.L, recursion, block=block, about=system.about)


def level_lists(levels, shape):
    """The level list of every weight (in, out, count), for the references."""
    table = levels.table
    codes = list(range(int(levels.lo), int(levels.hi) + 1)) if table is None else np.asarray(table).tolist()
    step, zero = np.asarray(levels.step), np.asarray(levels.zero)
    return reference.level_lists(shape, step, codes, zero / step if levels.offset else zero)

"""Presets of the published methods with their own alphabets, scales and orders. `jpfq.best` has the recommended rules.

Each function takes the parameters of the paper and returns a list of rules, so that others can be placed before it:

    jpfq.quantize(model, batches, [jpfq.Rule("head/.*", skip=True), *jpfq.paper.optq(bits=3)], variables=variables)

Convolutions are unfolded over all input channels at their own stride. GPFQ20 (one channel at a time) and GPFQ22 (a random
subset of non-overlapping patches) did that differently.
"""

import re
from collections.abc import Mapping

from ..matrix import (
    GPFQ,
    MSQ,
    OPTQ,
    UNI,
    Align,
    Descending,
    MagR,
    MalySaab,
    MeanDiagonal,
    Method,
    Natural,
    Qronos,
    TopEigenvalue,
)
from ..matrix.patches import All
from ..scalar import (
    AbsMax,
    Accumulator,
    Asymmetric,
    Binary,
    EPInit,
    Equispaced,
    Grid,
    HardThreshold,
    Integer,
    Median,
    Nearest,
    PerChannel,
    PerGroup,
    Prune,
    Quantile,
    SoftThreshold,
    Stochastic,
    Symmetric,
    Ternary,
    datatype_bits,
)
from ..scalar.grid import Number
from .rules import Rule


def rtn(bits: Number = 4, *, pattern: str = ".*") -> list[Rule]:
    """Plain rounding to nearest, with the largest weight of each neuron on the top level: the baseline of every method.

    Args:
        bits: width of the codes.
        pattern: regular expression for the paths of the kernels.

    Examples:
        >>> rules = jpfq.paper.rtn(bits=4)
    """
    return _rules(pattern, grid=Integer(bits), scale=AbsMax(), method=MSQ(), order=Natural())


def gpfq20(levels: Number = 3, C: Number = 2.0, *, pattern: str = ".*") -> list[Rule]:
    """GPFQ (Lybrand, Saab 2020): `levels` equispaced levels of radius C median|W|, one radius per layer.

    Args:
        levels: the number of levels.
        C: multiple of the median, which the paper searches from 1 to 10.
        pattern: regular expression for the paths of the kernels.

    Examples:
        >>> rules = jpfq.paper.gpfq20(levels=3, C=3.0)
    """
    return _rules(pattern, grid=Equispaced(levels), scale=Median(C), method=GPFQ(), order=Natural())


def gpfq22(
    bits: Number = 4,
    C: Number = 1.16,
    p: Number = 1.0,
    *,
    soft: Number | None = None,
    hard: Number | None = None,
    pattern: str = ".*",
) -> list[Rule]:
    """GPFQ (Zhang, Zhou, Saab 2022): 2^b + 1 levels, radius C times the mean over neurons of the p-quantile of |w|.

    `soft` or `hard` is the threshold of its sparse variants, in units of the weights. The hard one uses uniform levels here,
    so that its codes can be stored.

    Args:
        bits: b.
        C, p: of the radius.
        soft, hard: thresholds, of which at most one may be given.
        pattern: regular expression for the paths of the kernels.

    Examples:
        >>> rules = jpfq.paper.gpfq22(bits=3, C=1.16)
        >>> rules[0].grid
        Symmetric(K=4)
    """
    if soft is not None and hard is not None:
        raise ValueError(f"gpfq22 takes soft or hard, not both; got {soft!r} and {hard!r}.")
    rounding = Nearest() if soft is None else SoftThreshold(soft)
    rounding = rounding if hard is None else HardThreshold(hard)
    settings = {"scale": Quantile(p, C), "method": GPFQ(), "order": Natural(), "rounding": rounding}
    return _rules(pattern, grid=Symmetric(2 ** (bits - 1)), **settings)


def spfq(bits: Number = 4, C: Number = 1.16, r: int = 1, p: Number = 1.0, *, pattern: str = ".*") -> list[Rule]:
    """SPFQ (Zhang, Saab 2023): alignment of order r, then path following with stochastic rounding. Needs a key.

    Args:
        bits: b, of 2^b + 1 levels.
        C, p: of the radius, C times the mean over neurons of the p-quantile of |w|.
        r: order of the alignment.
        pattern: regular expression for the paths of the kernels.

    Examples:
        >>> rules = jpfq.paper.spfq(bits=3)  # it is random: jpfq.quantize(.., rules, key=key)
    """
    settings = {"scale": Quantile(p, C), "order": Natural(), "rounding": Stochastic()}
    method = {"method": GPFQ()} if r == 1 else {"prepare": Align(r), "method": UNI()}  # alignment of order 1 is GPFQ
    return _rules(pattern, grid=Symmetric(2 ** (bits - 1)), **settings, **method)


def uni(
    bits: Number = 4, C: Number = 1.16, scaling: Number = 1.0, prune: Number = 0, *, pattern: str = ".*"
) -> list[Rule]:
    """The unified stochastic framework (H. Zhang, Saab 2024): quantization, pruning, both, or one bit. Needs a key.

    `scaling` divides the feedback. Weights below `prune` steps are first pruned at random. bits=1 is its 1-bit operator.

    Args:
        bits: b, of 2^b + 1 levels, or 1.
        C: of the radius, C times the mean over neurons of max |w|.
        scaling: the framework's C, at least 1.
        prune: threshold in steps; 0 prunes nothing.
        pattern: regular expression for the paths of the kernels.

    Examples:
        >>> rules = jpfq.paper.uni(bits=4, prune=2)
    """
    grid: Grid = Binary() if bits == 1 else Symmetric(2 ** (bits - 1))
    rounding = Prune(prune, unit="step") if prune else Stochastic()
    settings = {"scale": Quantile(1.0, C), "order": Natural(), "prepare": Align(1), "rounding": rounding}
    return _rules(pattern, grid=grid, method=UNI(scaling), **settings)


def maly_saab(*, pattern: str = ".*") -> list[Rule]:
    """Maly, Saab (2022): one bit, +-max|w| of each neuron, by a walk in the null space of the data (fewer rows than inputs).

    Args:
        pattern: regular expression for the paths of the kernels.

    Examples:
        >>> rules = jpfq.paper.maly_saab(pattern="hidden/.*")
    """
    return _rules(pattern, grid=Binary(), scale=AbsMax(), prepare=MalySaab(), method=MSQ(), order=Natural())


def optq(
    bits: Number = 4,
    group: int | None = None,
    *,
    symmetric: bool = False,
    damping: Number = 0.01,
    act_order: bool = False,
    pattern: str = ".*",
) -> list[Rule]:
    """OPTQ, also called GPTQ (Frantar et al. 2022): min-max grids per neuron, or per `group` inputs refit on the way.

    With `act_order` the largest inputs go first, and groups take their steps beforehand.

    Args:
        bits: width of the codes.
        group: inputs that share a step; None for all inputs of a neuron.
        symmetric: whether the grid is centred at 0, without a zero point.
        damping: as a share of the mean of diag(H).
        act_order: see above.
        pattern: regular expression for the paths of the kernels.

    Examples:
        >>> rules = jpfq.paper.optq(bits=3, group=16)
    """
    per = PerChannel() if group is None else PerGroup(group, refit=not act_order)
    top = 2 ** (bits - 1)
    grid, scale = (
        (Integer(bits), AbsMax((top - 1) / (top - 0.5), per)) if symmetric else (Asymmetric(bits), AbsMax(per=per))
    )
    order = Descending() if act_order else Natural()
    return _rules(pattern, grid=grid, scale=scale, method=OPTQ(MeanDiagonal(damping)), order=order)


def qronos(
    bits: Number = 4, beta: Number = 1.0, magr: Number | None = None, *, damping: Number = 1e-6, pattern: str = ".*"
) -> list[Rule]:
    """Qronos (Zhang, Zhang, Colbert, Saab 2025): asymmetric grids over beta [min, max] per neuron, largest inputs first.

    The paper's 2-bit runs have beta=.8 and magr=.01 (and rotate the inputs: add rotation=jpfq.Hadamard() to the rule).

    Args:
        bits: width of the codes.
        beta: the share of [min, max] that the grid covers.
        magr: alpha of `MagR`; None to omit it.
        damping: as a share of the largest eigenvalue of H; take 1e-3 if activations are quantized.
        pattern: regular expression for the paths of the kernels.

    Examples:
        >>> rules = jpfq.paper.qronos(bits=2, beta=0.8, magr=0.01)
    """
    prepare = {} if magr is None else {"prepare": MagR(magr)}
    method = Qronos(exact=True, damping=TopEigenvalue(damping))
    return _rules(pattern, grid=Asymmetric(bits), scale=AbsMax(beta), method=method, order=Descending(), **prepare)


def axe(
    bits: Number = 4,
    activation_bits: Number = 8,
    P: Number = 16,
    tile: int | None = 128,
    *,
    method: Method | None = None,
    pattern: str = ".*",
) -> list[Rule]:
    """AXE (Colbert, Franco, Grob, Zhang, Saab 2024): GPFQ, or another method, whose sums over tiles fit P bits.

    The largest weight of each neuron is on the top level, and the largest inputs go first. Recommended instead is a rule
    with bits, activation_bits and accumulator alone, whose choice of steps takes the accumulator into account.

    Args:
        bits: width of the weights.
        activation_bits: width of the inputs.
        P: bits of the accumulator.
        tile: the number of inputs that it sums; None for all.
        method: of the weights; None for `GPFQ()`.
        pattern: regular expression for the paths of the kernels.

    Examples:
        >>> rules = jpfq.paper.axe(bits=4, P=16, tile=16, method=jpfq.OPTQ())
    """
    grid = Integer(bits, narrow=True)
    settings = {"activation_bits": activation_bits, "accumulator": Accumulator(P, tile), "method": method or GPFQ()}
    return _rules(pattern, grid=grid, scale=AbsMax(), order=Descending(), **settings)


def ep_init(
    bits: Number = 4, activation_bits: Number = 8, P: Number = 16, tile: int | None = 128, *, pattern: str = ".*"
) -> list[Rule]:
    """Weights of each neuron projected on the l1 ball that fits the accumulator, then rounded towards zero (A2Q+).

    Args:
        bits: width of the weights.
        activation_bits: width of the inputs.
        P: bits of the accumulator.
        tile: the number of inputs that it sums; None for all.
        pattern: regular expression for the paths of the kernels.

    Examples:
        >>> rules = jpfq.paper.ep_init(P=14, tile=16)
    """
    settings = {"activation_bits": activation_bits, "accumulator": EPInit(P, tile), "method": MSQ(), "order": Natural()}
    return _rules(pattern, grid=Integer(bits, narrow=True), scale=AbsMax(), **settings)


def fewer_bits(
    sizes: Mapping[str, int], P: int, tile: int | None = None, bits: int = 4, activation_bits: int = 8, **settings
) -> list[Rule]:
    """A baseline for accumulators: widths of weights and activations whose products fit it, whatever the codes.

    Of all pairs of widths that fit, each kernel takes the one with the most bits in total, and then for the weights.

    Args:
        sizes: the number of inputs of each kernel by path, from a `jpfq.Plan`: {line.path: line.dims[1] for line in lines}.
        P, tile: bits of the accumulator, and the number of inputs that it sums (None for all).
        bits, activation_bits: the largest widths.
        **settings: other settings of the rules.

    Examples:
        >>> rules = jpfq.paper.fewer_bits({"hidden/kernel": 32, "head/kernel": 32}, P=14)
        >>> rules[0].grid.levels, rules[0].activation_bits
        (3, 8)
    """
    rules = []
    for path, n in sizes.items():
        size = n if tile is None else min(n, tile)
        grids = {b: Ternary() if b == 2 else Integer(b, narrow=True) for b in range(2, bits + 1)}
        pairs = [(b, a) for b in grids for a in range(1, activation_bits + 1)]
        fitting = [(b, a) for b, a in pairs if datatype_bits(size, grids[b], Asymmetric(a)) <= P]
        if not fitting:
            raise ValueError(
                f"{path}: even {size} products of ternary weights with one-bit inputs need more than {P} bits. Take more "
                "accumulator bits or a smaller tile."
            )
        b, a = max(fitting, key=lambda pair: (sum(pair), pair))
        rules.append(Rule(re.escape(path), grid=grids[b], activation_bits=a, **settings))
    return rules


def _rules(pattern, **settings) -> list[Rule]:
    return [Rule(pattern, finish=None, shrinkage=None, patches=All(), **settings)]

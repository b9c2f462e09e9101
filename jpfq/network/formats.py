"""Number formats that files and servers have, as rules for `quantize`: the grid, the groups, and what steps are stored in.

Each function returns a list of one rule (`codebook` and `two_ranges` of one for each kernel), with recommended settings
around the format: searched steps, Qronos, descent. Whatever `Rule` takes may be given besides, and replaces them:

    jpfq.quantize(model, batches, jpfq.formats.nvfp4(), variables=variables)
    jpfq.quantize(model, batches, jpfq.formats.nvfp4(plain=True, method=jpfq.MSQ()), variables=variables)  # rounded

Groups run along the inputs of a kernel, as it is multiplied. One whose inputs they do not divide is left in float.

`activations=True` rounds the inputs of layers in the same format, with steps taken while the network runs: in blocks of the
same size, or per row where a neuron has one step. Steps have the format's type where it is of 8 bits or GGUF's, and are
float32 otherwise. For `q4_0` and `q4_1` the inputs are those of `q8_0`; for `q4_k` and `q6_k` they are integers of 8 bits in
blocks of 256. llama.cpp rounds them so.

    jpfq.quantize(model, batches, jpfq.formats.mxfp4(activations=True), variables=variables)
"""

import dataclasses
import re
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from ..calibrate.activation import Activations
from ..scalar import (
    E2M1,
    E2M3,
    E3M2,
    E4M3,
    E5M2,
    NF4,
    AbsMax,
    Asymmetric,
    Grid,
    Integer,
    Levels,
    MinError,
    Offset,
    Per,
    PerBlock,
    PerChannel,
    PerGroup,
    TwoRanges,
)
from ..scalar.step_types import E4M3 as E4M3_STEP
from ..scalar.step_types import E8M0 as E8M0_STEP
from ..scalar.step_types import INT8, UINT6
from .fitted_grids import fit_grids
from .rules import Rule

BLOCKS_OF_256 = Activations(Integer(8), group=256)  # Q8_K of llama.cpp


def int4(group: int | None = None, *, pattern: str = ".*", **settings: Any) -> list[Rule]:
    """Integers of 4 bits, bfloat16 steps: W4A16, as compressed-tensors files have it.

    Args:
        group: inputs that share a step; None for all of a neuron.
        pattern: of the kernels that are meant.
        **settings: of the rule.

    Examples:
        >>> small = jpfq.quantize(model, batches, jpfq.formats.int4(group=16), variables=variables)
        >>> small.tensors["hidden/kernel"].bits_per_weight  # 4, and 16 for every 16 weights
        5.0
    """
    return _rule(pattern, Integer(4), group, jnp.bfloat16, settings)


def awq(group: int | None = 128, *, pattern: str = ".*", **settings: Any) -> list[Rule]:
    """AWQ files: unsigned integers of 4 bits with zero points, float16 steps.

    Args:
        group: inputs that share a step and a zero point, the same in all rules; None for all of a neuron.
        pattern: of the kernels that are meant.
        **settings: of the rule.

    Examples:
        >>> small = jpfq.quantize(model, batches, jpfq.formats.awq(group=16), variables=variables)
        >>> small.tensors["hidden/kernel"].bits_per_weight  # 4, and 16 + 4 for every 16 weights
        5.25
    """
    return _rule(pattern, Asymmetric(4), group, jnp.float16, settings)


def int8(group: int | None = None, *, pattern: str = ".*", **settings: Any) -> list[Rule]:
    """Integers of 8 bits, bfloat16 steps.

    Args:
        group: inputs that share a step; None for all of a neuron.
        pattern: of the kernels that are meant.
        **settings: of the rule.

    Examples:
        >>> rules = jpfq.formats.int8(activation_bits=8)
    """
    return _rule(pattern, Integer(8), group, jnp.bfloat16, settings)


def mxfp4(*, pattern: str = ".*", **settings: Any) -> list[Rule]:
    """MXFP4: E2M1 in groups of 32, steps that are powers of two (OCP microscaling).

    Args:
        pattern: of the kernels that are meant.
        **settings: of the rule.

    Examples:
        >>> small = jpfq.quantize(model, batches, jpfq.formats.mxfp4(), variables=variables)
        >>> small.tensors["hidden/kernel"].bits_per_weight  # 4, and 8 for every 32 weights
        4.25
    """
    return _rule(pattern, E2M1(), 32, E8M0_STEP, settings)


def mxfp6(grid: Grid | None = None, *, pattern: str = ".*", **settings: Any) -> list[Rule]:
    """MXFP6: E2M3, or E3M2, in groups of 32, steps that are powers of two.

    Args:
        grid: `jpfq.E2M3()`, the default, or `jpfq.E3M2()`.
        pattern: of the kernels that are meant.
        **settings: of the rule.

    Examples:
        >>> rules = jpfq.formats.mxfp6(jpfq.E3M2())
    """
    return _rule(pattern, _among(grid, E2M3(), E3M2()), 32, E8M0_STEP, settings)


def mxfp8(grid: Grid | None = None, *, pattern: str = ".*", **settings: Any) -> list[Rule]:
    """MXFP8: E4M3, or E5M2, in groups of 32, steps that are powers of two.

    Args:
        grid: `jpfq.E4M3()`, the default, or `jpfq.E5M2()`.
        pattern: of the kernels that are meant.
        **settings: of the rule.

    Examples:
        >>> rules = jpfq.formats.mxfp8()
    """
    return _rule(pattern, _among(grid, E4M3(), E5M2()), 32, E8M0_STEP, settings)


def mxint8(*, pattern: str = ".*", **settings: Any) -> list[Rule]:
    """MXINT8: integers of 8 bits in groups of 32, steps that are powers of two.

    Args:
        pattern: of the kernels that are meant.
        **settings: of the rule.

    Examples:
        >>> rules = jpfq.formats.mxint8()
    """
    return _rule(pattern, Integer(8), 32, E8M0_STEP, settings)


def nvfp4(*, pattern: str = ".*", **settings: Any) -> list[Rule]:
    """NVFP4: E2M1 in groups of 16, steps in E4M3 under one float32 for the kernel.

    Args:
        pattern: of the kernels that are meant.
        **settings: of the rule.

    Examples:
        >>> small = jpfq.quantize(model, batches, jpfq.formats.nvfp4(), variables=variables)
        >>> small.tensors["hidden/kernel"].bits_per_weight  # 4, 8 for every 16 weights, and 32 in all
        4.53125
    """
    return _rule(pattern, E2M1(), 16, E4M3_STEP, settings)


def fp8(
    group: int | None = None, *, block: tuple[int, int] | None = None, pattern: str = ".*", **settings: Any
) -> list[Rule]:
    """FP8 weights: E4M3, float32 steps.

    Args:
        group: inputs that share a step; None for all of a neuron.
        block: inputs and neurons that share a step, such as (128, 128) in the checkpoints of DeepSeek; in place of `group`.
        pattern: of the kernels that are meant.
        **settings: of the rule.

    Examples:
        >>> rules = jpfq.formats.fp8()
        >>> blocks = jpfq.quantize(model, batches, jpfq.formats.fp8(block=(16, 8)), variables=variables)
        >>> blocks.tensors["hidden/kernel"].step.shape
        (2, 4)
    """
    if block is None:
        return _rule(pattern, E4M3(), group, jnp.float32, settings)
    if group is not None:
        raise ValueError(f"Give group=.. or block=.., not both; got {group!r} and {block!r}.")
    if not isinstance(block, tuple) or len(block) != 2:
        raise ValueError(
            f"block takes the inputs and the neurons that share a step, such as (128, 128); got {block!r}."
        )
    scale = AbsMax(per=PerBlock(*block))
    return _rule(pattern, E4M3(), block[0], jnp.float32, {"scale": scale} | settings)


def nf4(group: int = 64, *, pattern: str = ".*", **settings: Any) -> list[Rule]:
    """NF4: the sixteen quantiles of QLoRA, float32 steps.

    Args:
        group: inputs that share a step.
        pattern: of the kernels that are meant.
        **settings: of the rule.

    Examples:
        >>> rules = jpfq.formats.nf4(group=32)
    """
    return _rule(pattern, NF4(), group, jnp.float32, settings)


def q4_0(*, pattern: str = ".*", **settings: Any) -> list[Rule]:
    """Q4_0 of GGUF files (llama.cpp): integers of 4 bits in groups of 32, float16 steps.

    Args:
        pattern: of the kernels that are meant.
        **settings: of the rule.

    Examples:
        >>> rules = jpfq.formats.q4_0()
    """
    return _rule(pattern, Integer(4), 32, jnp.float16, settings, Integer(8))


def q8_0(*, pattern: str = ".*", **settings: Any) -> list[Rule]:
    """Q8_0 of GGUF files: integers of 8 bits in groups of 32, float16 steps.

    Args:
        pattern: of the kernels that are meant.
        **settings: of the rule.

    Examples:
        >>> rules = jpfq.formats.q8_0()
    """
    return _rule(pattern, Integer(8), 32, jnp.float16, settings)


def q4_1(*, pattern: str = ".*", **settings: Any) -> list[Rule]:
    """Q4_1 of GGUF files: unsigned integers of 4 bits with an offset, in groups of 32, steps and offsets in float16.

    Args:
        pattern: of the kernels that are meant.
        **settings: of the rule.

    Examples:
        >>> small = jpfq.quantize(model, batches, jpfq.formats.q4_1(), variables=variables)
        >>> small.tensors["hidden/kernel"].bits_per_weight  # 4, and 16 + 16 for every 32 weights
        5.0
    """
    return _rule(pattern, Offset(4), 32, jnp.float16, settings, Integer(8))


def q4_k(*, pattern: str = ".*", **settings: Any) -> list[Rule]:
    """Q4_K of GGUF files: as Q4_1, with steps and offsets of 6 bits times a float16 each for 8 groups of a neuron.

    Kernels whose inputs are no multiple of 256 are left in float, beside others of which they are.

    Args:
        pattern: of the kernels that are meant.
        **settings: of the rule.

    Examples:
        >>> W, X = jax.random.normal(key, (256, 8)), jax.random.normal(key, (512, 256))
        >>> product = lambda params, x: x @ params["kernel"]
        >>> small = jpfq.quantize(product, [X], jpfq.formats.q4_k(), params={"kernel": W})
        >>> small.tensors["kernel"].bits_per_weight  # 4, 6 + 6 for every 32 weights, and 16 + 16 for 256
        4.5
    """
    return _rule(pattern, Offset(4), 32, UINT6.name, settings, BLOCKS_OF_256)


def q6_k(*, pattern: str = ".*", **settings: Any) -> list[Rule]:
    """Q6_K of GGUF files: integers of 6 bits in groups of 16, steps of 8 bits times a float16 for 16 groups of a neuron.

    Kernels whose inputs are no multiple of 256 are left in float, beside others of which they are.

    Args:
        pattern: of the kernels that are meant.
        **settings: of the rule.

    Examples:
        >>> rules = [*jpfq.formats.q6_k(pattern="head/.*"), *jpfq.formats.q4_k()]
    """
    return _rule(pattern, Integer(6), 16, INT8.name, settings, BLOCKS_OF_256)


def codebook(
    levels: int,
    model: Any,
    batch: Any,
    *,
    variables: Any = None,
    params: Any = None,
    kwargs: dict | None = None,
    group: int | None = None,
    pattern: str = ".*",
    **settings: Any,
) -> list[Rule]:
    """Codebooks: a rule for each kernel, with levels fitted to its weights by `jpfq.Levels.fit`, and float32 steps.

    Args:
        levels: their number, 16 for 4 bits.
        model, variables, params, kwargs: as in `jpfq.quantize`.
        batch: an input of the model, or its shapes.
        group: inputs that share a step; None for all of a neuron.
        pattern: of the kernels that are meant.
        **settings: of the rules.

    Examples:
        >>> rules = jpfq.formats.codebook(8, model, batches[0], variables=variables)
        >>> small = jpfq.quantize(model, batches, rules, variables=variables)
        >>> small.tensors["hidden/kernel"].grid.levels
        8
    """
    state = {"variables": variables, "params": params, "kwargs": kwargs}
    grids = fit_grids(lambda found: Levels.fit(found, levels), model, batch, state, group, pattern)
    return _per_kernel(grids, group, settings)


def two_ranges(
    bits: int,
    model: Any,
    batch: Any,
    *,
    variables: Any = None,
    params: Any = None,
    kwargs: dict | None = None,
    group: int | None = None,
    pattern: str = ".*",
    **settings: Any,
) -> list[Rule]:
    """Coarse and fine weights: a rule for each kernel, with two ranges chosen by `jpfq.TwoRanges.fit`, and float32 steps.

    For kernels with a few large weights, such as those of merged branches. `QTensor.split` makes two kernels of each.

    Args:
        bits: of a code, from 2 to 8.
        model, variables, params, kwargs: as in `jpfq.quantize`.
        batch: an input of the model, or its shapes.
        group: inputs that share a step; None for all of a neuron.
        pattern: of the kernels that are meant.
        **settings: of the rules.

    Examples:
        >>> rules = jpfq.formats.two_ranges(4, model, batches[0], variables=variables)
        >>> small = jpfq.quantize(model, batches, rules, variables=variables)
        >>> fine, coarse = small.tensors["hidden/kernel"].split()
        >>> bool((fine.dequantize() + coarse.dequantize() == small.params["hidden"]["kernel"]).all())
        True
    """
    state = {"variables": variables, "params": params, "kwargs": kwargs}
    grids = fit_grids(lambda found: TwoRanges.fit(found, bits), model, batch, state, group, pattern)
    return _per_kernel(grids, group, settings)


def _per_kernel(grids: dict[str, Grid], group: int | None, settings: dict[str, Any]) -> list[Rule]:
    """A rule for each kernel, with the grid that is fitted to its weights."""
    settings = {"unsupported": "skip"} | settings
    return [rule for path, grid in grids.items() for rule in _rule(re.escape(path), grid, group, jnp.float32, settings)]


def _rule(
    pattern: str,
    grid: Grid,
    group: int | None,
    step_dtype: DTypeLike,
    settings: dict[str, Any],
    inputs: Grid | Activations | None = None,
) -> list[Rule]:
    """The rule of a format. `inputs` is the grid of its quantized inputs where that is another, or all their settings."""
    if isinstance(settings.get("activations"), bool):
        found = inputs
        if not isinstance(found, Activations):
            own = None if step_dtype == jnp.bfloat16 else step_dtype
            found = Activations(found or grid, per="row" if group is None else "group", group=group)
            found = dataclasses.replace(found, step_dtype=own)
        settings = settings | {"activations": found if settings["activations"] else None}
    per: Per = PerChannel() if group is None else PerGroup(group)
    base = AbsMax(per=per)
    # Searches reach beyond the largest weight where a step may have been rounded down to a power of two.
    searched = MinError(base, least=0.4, most=1.6) if step_dtype == E8M0_STEP else MinError(base)
    scale = base if settings.get("plain") else searched
    return [Rule(pattern, **{"grid": grid, "scale": scale, "step_dtype": step_dtype} | settings)]


def _among(grid: Grid | None, *choices: Grid) -> Grid:
    if grid is not None and grid not in choices:
        raise ValueError(f"This format has the grids {' and '.join(map(str, choices))}; got {grid!r}.")
    return choices[0] if grid is None else grid

"""Number formats that files and servers have, as rules for `quantize`: the grid, the groups, and what steps are stored in.

Each function returns a list of one rule, recommended settings around the format: searched steps, Qronos, descent. Whatever
`Rule` takes may be given besides, and replaces them:

    jpfq.quantize(model, batches, jpfq.formats.nvfp4(), variables=variables)
    jpfq.quantize(model, batches, jpfq.formats.nvfp4(plain=True, method=jpfq.MSQ()), variables=variables)  # rounded

Groups run along the inputs of a kernel, as it is multiplied, and divide them.

`activations=True` rounds the inputs of layers in the same format, with steps taken while the network runs: in blocks of the
same size, or per row where a neuron has one step. Steps have the format's type where it is of 8 bits or GGUF's, and are
float32 otherwise. For `q4_0` the inputs are those of `q8_0`, as llama.cpp rounds them.

    jpfq.quantize(model, batches, jpfq.formats.mxfp4(activations=True), variables=variables)
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from ..calibrate.activation import Activations
from ..scalar import E2M1, E2M3, E3M2, E4M3, E5M2, NF4, AbsMax, Grid, Integer, MinError, Per, PerChannel, PerGroup
from ..scalar.step_types import E4M3 as E4M3_STEP
from ..scalar.step_types import E8M0 as E8M0_STEP
from .rules import Rule


def int4(group: int | None = None, *, pattern: str = ".*", **settings: Any) -> list[Rule]:
    """Integers of 4 bits, bfloat16 steps: W4A16, as compressed-tensors, AWQ and GPTQ files have it.

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


def fp8(group: int | None = None, *, pattern: str = ".*", **settings: Any) -> list[Rule]:
    """FP8 weights: E4M3, float32 steps.

    Args:
        group: inputs that share a step; None for all of a neuron.
        pattern: of the kernels that are meant.
        **settings: of the rule.

    Examples:
        >>> rules = jpfq.formats.fp8()
    """
    return _rule(pattern, E4M3(), group, jnp.float32, settings)


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


def _rule(
    pattern: str,
    grid: Grid,
    group: int | None,
    step_dtype: DTypeLike,
    settings: dict[str, Any],
    inputs: Grid | None = None,
) -> list[Rule]:
    """The rule of a format. `inputs` is the grid of its quantized inputs where that is another."""
    if isinstance(settings.get("activations"), bool):
        own = None if step_dtype == jnp.bfloat16 else step_dtype
        found = Activations(grid if inputs is None else inputs, per="row" if group is None else "group", group=group)
        found = dataclasses.replace(found, step_dtype=own) if settings["activations"] else None
        settings = settings | {"activations": found}
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

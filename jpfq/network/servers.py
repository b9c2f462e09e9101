"""Who loads a quantized layer: facts about servers, and what they say of a layer.

Read in November 2026 in the repositories of

    vLLM on TPU    tpu-inference 0.32.0, layers/vllm/quantization: `get_scheme` of compressed_tensors, its schemes (W4A8
                   takes symmetric integers and no static inputs), and awq.py (dequantizes)
    vLLM on GPU    vllm-project/vllm, layers/quantization: W4A8 takes groups of 128, the Marlin kernels 32, 64 and 128;
                   that int8 and FP8 weights have a step per neuron was not read there
    sglang-jax     sgl-project/sglang-jax: int8 and FP8, nothing of 4 bits
    qwix           google/qwix 0.1.8: `dot_general` and `PtqProvider`
    llama.cpp      GGUF's Q4_0 and Q8_0

Versions to come may take more. What is not in the table is said not to load.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ..scalar import E2M1, E2M3, E4M3, E5M2, NF4, Asymmetric, Grid, Integer, Offset
from ..scalar.step_types import E4M3 as E4M3_STEP
from ..scalar.step_types import E8M0 as E8M0_STEP
from .table import table

FLOATS, ANY = "floats", None
BY_TOKEN, ONE_STEP = "{} by token", "{} by one step"
INT8 = {BY_TOKEN.format("int8"), ONE_STEP.format("int8")}
FP8 = {BY_TOKEN.format("fp8"), ONE_STEP.format("fp8")}
ZEROS = " with zero points"
DEQUANTIZED = "16-bit products of dequantized weights"
CHANNEL = (None,)
OTHERS = {E2M1: "E2M1 in other blocks", E2M3: "E2M3 in other blocks", E5M2: "E5M2"}


class Form(NamedTuple):
    """A quantized layer in the terms of servers. group: inputs that share a step, None for all of a neuron."""

    weights: str
    inputs: str
    group: int | None
    shape: tuple[int, int]  # inputs, neurons
    half: bool = False  # steps are of float16
    conv: bool = False
    refused: str = ""  # why it is no layer of any file


class Fact(NamedTuple):
    """A server takes layers of these weights, inputs and groups, in the format that a call writes."""

    server: str
    call: str
    weights: set[str]
    inputs: set[str]
    groups: tuple[int | None, ...] | None  # None stands for any
    product: str


class Verdict(NamedTuple):
    """True if a server loads a layer; and the call that writes it and the product it meets there, or why not."""

    loads: bool
    text: str


QUANTS = {  # of GGUF alone: the grid, its bits, the type of the steps and how many inputs share one
    "Q4_1": (Offset, 4, "float16", 32),
    "Q4_K": (Offset, 4, "uint6_float16", 32),
    "Q6_K": (Integer, 6, "int8_float16", 16),
}
CT, AWQ, GGUF, QWIX = 'export("compressed-tensors")', 'export("awq")', 'export("gguf")', "to_qwix"
INT4, INTS = {"int4", "int4" + ZEROS}, {"int4", "int8", "int4" + ZEROS, "int8" + ZEROS}
FP = {"mxfp4", "mxfp6", "mxfp8", "nvfp4", "nf4"}
FACTS = (
    Fact("vLLM on TPU", CT, {"int4"}, {BY_TOKEN.format("fp8")}, ANY, "FP8 products"),
    Fact("vLLM on TPU", CT, {"int8"}, {BY_TOKEN.format("int8")}, CHANNEL, "int8 products"),
    Fact("vLLM on TPU", CT, {"fp8"}, FP8, CHANNEL, "FP8 products"),
    Fact("vLLM on TPU", CT, {"nvfp4"}, {FLOATS, BY_TOKEN.format("fp8")}, ANY, "products of regrouped weights"),
    Fact("vLLM on TPU", AWQ, INT4, {FLOATS}, ANY, "bfloat16 products of dequantized weights"),
    Fact("vLLM on GPU", CT, INTS, {FLOATS}, (None, 32, 64, 128), DEQUANTIZED),
    Fact("vLLM on GPU", CT, {"int4"}, {BY_TOKEN.format("fp8")}, (128,), "FP8 products"),
    Fact("vLLM on GPU", CT, {"int8"}, INT8, CHANNEL, "int8 products"),
    Fact("vLLM on GPU", CT, {"fp8"}, FP8, CHANNEL, "FP8 products"),
    Fact("vLLM on GPU", CT, {"fp8"}, {FLOATS}, CHANNEL, DEQUANTIZED),
    Fact("vLLM on GPU", CT, {"nvfp4", "mxfp4"}, {FLOATS}, ANY, DEQUANTIZED),
    Fact("vLLM on GPU", AWQ, INT4, {FLOATS}, (32, 64, 128), DEQUANTIZED),
    Fact("sglang-jax", CT, {"int8", "fp8"}, {FLOATS, *INT8, *FP8}, CHANNEL, "types it has; its reading was not tried"),
    Fact("qwix", QWIX, {*INTS, "fp8", *FP, *OTHERS.values(), "Q6_K"}, {FLOATS}, ANY, "products of dequantized weights"),
    Fact("qwix", QWIX, {"int4", "int8"}, {BY_TOKEN.format("int8")}, CHANNEL, "int8 products"),
    Fact("qwix", QWIX, {"int4", "int8"}, {ONE_STEP.format("int8")}, ANY, "int8 products"),
    Fact("llama.cpp", GGUF, {"int4", "int8", *QUANTS}, {FLOATS}, ANY, "products with inputs in blocks of 8 bits"),
)


@dataclasses.dataclass(frozen=True)
class Servers:
    """The servers that load each layer. Print it.

    layers: by path of a kernel and name of a server, whether it loads, and how or why not.

    Examples:
        >>> rules = jpfq.formats.int4()
        >>> plan = jpfq.plan(model, batches[0], rules, variables=variables)
        >>> plan.servers().layers["head/kernel"]["vLLM on TPU"].text
        'export("compressed-tensors"): int4 takes inputs in fp8 by token, and these are floats: dynamic_inputs=...'
        >>> plan.servers(dynamic_inputs="fp8").layers["head/kernel"]["vLLM on TPU"]
        Verdict(loads=True, text='export("compressed-tensors"): FP8 products')
    """

    layers: Mapping[str, Mapping[str, Verdict]]

    def __str__(self) -> str:
        alike: dict[tuple, list[str]] = {}  # kernels of which the same is said
        for path, verdicts in self.layers.items():
            alike.setdefault(tuple(verdicts.items()), []).append(path)
        rows = [
            (
                f"{paths[0]} and {len(paths) - 1} more" if len(paths) > 1 else paths[0],
                server,
                "yes" if loads else "no",
                text,
            )
            for said, paths in alike.items()
            for server, (loads, text) in said
        ]
        return table(("kernel", "server", "loads", "as, or why not"), rows)


class Exported(dict[str, str]):
    """The return value of `Quantized.export`: a dict of the kernels written dequantized, by path, with the reason. Print it.

    servers: by name of each server that reads such files, whether it will load this one, and how or why not.

    Examples:
        >>> found = quantized.export("compressed-tensors", "model-w4a8", dynamic_inputs="fp8")
        >>> found, found.servers["vLLM on TPU"]
        ({}, Verdict(loads=True, text='FP8 products'))
    """

    servers: Mapping[str, Verdict]

    def __init__(self, left: Mapping[str, str], servers: Mapping[str, Verdict]):
        super().__init__(left)
        self.servers = servers

    def __str__(self) -> str:
        rows = [(server, "yes" if loads else "no", text) for server, (loads, text) in self.servers.items()]
        parts = [table(("server", "loads it", "as, or why not"), rows)] if rows else []
        if self:
            parts.append(table(("kernel in floats", "reason"), list(self.items())))
        return "\n\n".join(parts)


def loads_file(
    kind: str, forms: Mapping[str, Form], left: Mapping[str, str], dynamic_inputs: str | None = None
) -> dict[str, Verdict]:
    """The verdict of each server that reads files of a kind on one, but for the kernels `left` in floats, which it loads."""
    call = f'export("{kind}")'
    given = {path: _served(form, dynamic_inputs) for path, form in forms.items() if path not in left}
    found = {}
    for server in dict.fromkeys(fact.server for fact in FACTS if fact.call == call):
        said = {path: verdict(server, form, call) for path, form in given.items()}
        against = [f"{path}: {text}" for path, (loads, text) in said.items() if not loads]
        products = dict.fromkeys(text for loads, text in said.values() if loads)
        more = f" (and {len(against) - 1} more)" if len(against) > 1 else ""
        found[server] = Verdict(not against, against[0] + more if against else "; ".join(products) or "all in floats")
    return found


def servers(forms: Mapping[str, Form], dynamic_inputs: str | None = None) -> Servers:
    """The verdicts of all servers on layers, by path. `dynamic_inputs`: as for `Quantized.export`."""
    names = list(dict.fromkeys(fact.server for fact in FACTS))
    given = {path: _served(form, dynamic_inputs) for path, form in forms.items()}
    return Servers({path: {name: verdict(name, form) for name in names} for path, form in given.items()})


def verdict(server: str, form: Form, only: str | None = None) -> Verdict:
    """The verdict of a server on a layer; with `only`, on one that this call wrote."""
    if form.refused:
        return Verdict(False, form.refused)
    calls = {fact.call for fact in FACTS} if only is None else {only}
    facts = [fact for fact in FACTS if fact.server == server and form.weights in fact.weights and fact.call in calls]
    if not facts:
        return Verdict(False, f"it has no {form.weights}")
    reasons = {}
    for call in dict.fromkeys(fact.call for fact in facts):
        own = [fact for fact in facts if fact.call == call]
        fit = [fact for fact in own if form.inputs in fact.inputs and not (form.conv and call != QWIX)]
        found = {_reason(fact, form): fact for fact in reversed(fit)} or {_other_inputs(own, form): None}
        if fact := found.get(""):
            return Verdict(True, f"{call}: {fact.product}" if only is None else fact.product)
        reasons[call] = list(found)[-1]
    if len(reasons) == 1:
        return Verdict(False, *reasons.values())
    return Verdict(False, "; ".join(f"{call}: {reason}" for call, reason in reasons.items()))


def form_of(
    grid: Grid, step_dtype: Any, group: int | None, shape: tuple[int, int], activations: Any, **more: Any
) -> Form:
    """The form of a layer (inputs, neurons) on a grid, whose inputs are rounded as `activations` say."""
    group = None if group is None or group >= shape[0] else group
    half = step_dtype == np.float16
    return Form(_weights(grid, step_dtype, group or shape[0]), _inputs(activations), group, shape, half, **more)


def _served(form: Form, dynamic: str | None) -> Form:
    return form if dynamic is None or form.inputs != FLOATS else form._replace(inputs=BY_TOKEN.format(dynamic))


def _other_inputs(facts: list[Fact], form: Form) -> str:
    """Why a server does not take a layer that it would take with other inputs."""
    if form.conv and facts[0].call != QWIX:
        return "it is a convolution"
    takes = sorted({inputs for fact in facts for inputs in fact.inputs})
    dynamic = [name for name in ("fp8", "int8") if form.inputs == FLOATS and BY_TOKEN.format(name) in takes]
    hint = f": dynamic_inputs={dynamic[0]!r}" if dynamic else ""
    return f"{form.weights} takes inputs in {' or '.join(takes)}, and these are {form.inputs}{hint}"


def _reason(fact: Fact, form: Form) -> str:
    """Why a server does not take a layer whose weights and inputs it takes; "" where it does."""
    if form.conv and form.inputs == FLOATS:
        return "it is a convolution, which qwix takes with inputs of 8 bits"
    split = fact.call == AWQ and form.group is None  # which the format does
    if fact.groups is not None and form.group not in fact.groups and not split:
        sizes = " or ".join("all inputs" if size is None else str(size) for size in fact.groups)
        return f"{form.weights} takes groups of {sizes}, and these are of {form.group or 'all inputs'}"
    return _not_written(fact.call, form)


def _not_written(call: str, form: Form) -> str:
    """Why a format does not hold a layer."""
    if call == GGUF and form.weights in QUANTS:
        return ""
    if call in (AWQ, GGUF) and not form.half:
        return "its steps are not of float16: step_dtype='float16'"
    if call == AWQ and (form.shape[1] % 8 or (form.group or form.shape[0]) % 32):
        return "AWQ takes multiples of 8 neurons, in groups of multiples of 32 inputs"
    if call == GGUF and (form.group or form.shape[0]) % 32:
        return "GGUF takes groups of multiples of 32 inputs"
    return ""


def _weights(grid: Grid, step_dtype: Any, run: int) -> str:
    """The type of weights, `run` of which share a step."""
    blocks = {(E2M1, E8M0_STEP, 32): "mxfp4", (E2M3, E8M0_STEP, 32): "mxfp6", (E4M3, E8M0_STEP, 32): "mxfp8"}
    blocks[E2M1, E4M3_STEP, 16] = "nvfp4"
    if name := blocks.get((type(grid), step_dtype, run)):
        return name
    own = (type(grid), grid.storage_bits, str(step_dtype), run)
    if name := next((name for name, form in QUANTS.items() if form == own), None):
        return name
    if grid.offset:
        return f"{grid} in groups of {run}"
    if isinstance(grid, (E4M3, NF4)):
        return "fp8" if isinstance(grid, E4M3) else "nf4"
    if isinstance(grid, (E2M1, E2M3, E5M2)):
        return OTHERS[type(grid)]
    bits, zeros = _bits(grid)
    return f"int{4 if bits <= 4 else 8}{zeros}" if bits <= 8 else str(grid)


def _bits(grid: Grid) -> tuple[int, str]:
    """Bits with a sign that the levels of a grid take as integers; 99 where they are none."""
    lo, hi, zero, _ = grid.alphabet()
    if grid.table is not None:
        ends = (min(grid.table), max(grid.table)) if grid.unit is not None else (0, 2**98)
        lo, hi, zero = (round(float(x) / float(grid.unit or 1)) for x in (*ends, 0))
    if zero is None:
        return (int(hi - lo)).bit_length(), ZEROS
    double = 1 if float(zero).is_integer() else 2  # levels on both sides of 0
    ends = double * (lo - zero), double * (hi - zero)
    return 1 + max(int(-1 - ends[0]).bit_length(), int(ends[1]).bit_length()), ""


def _inputs(activations: Any) -> str:
    if activations is None:
        return FLOATS
    grid, kind = activations.grid, None
    if isinstance(grid, (Integer, Asymmetric)) and grid.storage_bits == 8:
        kind = "int8"
    kind = "fp8" if isinstance(grid, E4M3) else kind
    if kind is None or activations.per == "channel" or (activations.per == "row" and isinstance(grid, Asymmetric)):
        return f"{grid} per {activations.per}"
    return (BY_TOKEN if activations.per == "row" else ONE_STEP).format(kind)

"""A result for the runtime of qwix (google/qwix), whose quantized models hold kernels of few bits and multiply by them.

    int4, int8                     integers, and tables whose levels are whole multiples of one number
    float8_e4m3fn, float8_e5m2     E4M3 and E5M2
    mxfp4, mxfp8, nvfp4            E2M1 and E4M3 in groups of 32 (MX) and 16 (NVFP4), with steps of those formats. What NVFP4
                                   multiplies all steps of a kernel by is in the steps here
    nf4                            NF4

qwix is an optional package: pip install qwix. What its runtime computes is what we do, but for the order of sums: it
multiplies integers and steps apart where we multiply by dequantized kernels.
"""

import importlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..calibrate.activation import ActivationQuantizer
from ..matrix.layout import ConvLayout
from ..matrix.signed import signed
from ..model.compat import key_name
from ..model.functional import call
from ..model.linen import is_linen, unboxed
from ..model.nnx import as_param
from ..model.program import trace
from ..model.sites import CASTS, find_sites
from ..scalar import E2M1, E4M3, E5M2, NF4, Asymmetric, Integer
from ..scalar.step_types import E4M3 as E4M3_STEP
from ..scalar.step_types import E8M0 as E8M0_STEP

BLOCKS = {  # grid and the type of steps -> qwix's name, and the inputs that share a step
    (E2M1, E8M0_STEP): ("mxfp4", 32),
    (E2M1, E4M3_STEP): ("nvfp4", 16),
    (E4M3, E8M0_STEP): ("mxfp8", 32),
}
STORED = {"mxfp4": jnp.float4_e2m1fn, "nvfp4": jnp.float4_e2m1fn, "mxfp8": jnp.float8_e4m3fn, "nf4": jnp.uint4}
SLICES = {"slice", "dynamic_slice", "squeeze"}  # of a stack of layers


class _Kernel(NamedTuple):
    """step * (numbers - zero), the numbers in the type that qwix calls `kind`; `zero` is None where it is 0."""

    numbers: jax.Array
    step: jax.Array
    zero: jax.Array | None
    kind: Any
    run: int | None = None  # inputs that share a step, where its kind says how many

    @property
    def whole(self) -> bool:
        """True for integers."""
        return self.kind in (jnp.int4, jnp.int8)


def to_qwix(quantized: Any, batch: Any, model: Any = None, kwargs: dict | None = None) -> Any:
    """See `Quantized.to_qwix`."""
    try:
        qwix: Any = importlib.import_module("qwix")
    except ImportError as error:
        raise ValueError("to_qwix needs the package qwix: pip install qwix.") from error
    nnx = quantized._model is not None
    if not nnx and not is_linen(model):
        raise ValueError("qwix runs Linen modules and NNX models: for Linen, pass the module, to_qwix(batch, module).")
    functional = quantized._functional
    program = trace(functional.fn, functional.paths, functional.leaves, batch)
    uses: dict[str, list] = {}
    for site in find_sites(program)[0]:
        uses.setdefault(site.path, []).append(site)
    kernels: dict[str, _Kernel] = {}
    rules: dict[str, dict] = {}
    refused = [f"  {name}: a product without weights" for name in quantized.inputs if name not in quantized.tensors]
    for path, tensor in quantized.tensors.items():
        rounded = quantized.inputs.get(path, [])
        try:
            if path in quantized.embeddings:
                raise ValueError("an embedding, which qwix reads as floating numbers")
            kernels[path] = _kernel(tensor, uses.get(path, []))
            rule = _rule(kernels[path], uses[path][0].layout, rounded)
            parent = path.rpartition("/")[0]
            if rules.setdefault(parent, rule) != rule:
                raise ValueError("another kernel of its module is quantized otherwise")
        except ValueError as error:
            refused.append(f"  {path}: {error}")
    if refused:
        listing = "\n".join(refused)
        raise ValueError(f"qwix cannot hold these kernels; quantize them so that it can, or skip them:\n{listing}")
    listed = [qwix.QuantizationRule(module_path=re.escape(parent), **rule) for parent, rule in rules.items()]
    provider = qwix.PtqProvider(listed)
    kinds = {path: rules[path.rpartition("/")[0]]["weight_qtype"] for path in kernels}
    leaf = _Leaves(qwix.QArray, kernels, kinds, quantized.inputs)
    if nnx:
        ready = call(
            lambda *args, **kw: qwix.quantize_model(quantized.model, provider, *args, **kw), batch, kwargs or {}
        )
        for path in quantized.tensors:
            _fill(ready, path, leaf)
        return ready
    ready = qwix.quantize_model(model, provider)
    init = lambda: call(lambda *args, **kw: ready.init(jax.random.key(0), *args, **kw), batch, kwargs or {})
    template = unboxed(jax.eval_shape(init)["params"])
    ours = {tuple(path.split("/")): x for path, x in _named(unboxed(quantized.variables["params"])).items()}
    filled = jax.tree_util.tree_map_with_path(
        lambda path, old: leaf(tuple(n for n in map(key_name, path) if n), old, ours), template, is_leaf=_is_auxiliary
    )
    return ready, {**quantized.variables, "params": filled}


class _Leaves:
    """The leaf at each place of a qwix model."""

    def __init__(
        self, array, kernels: dict[str, _Kernel], kinds: dict[str, Any], inputs: dict[str, list[ActivationQuantizer]]
    ):
        self.array, self.kernels, self.kinds, self.inputs = array, kernels, kinds, inputs

    def __call__(self, path: tuple[str, ...], old: Any, floats: dict) -> Any:
        name = "/".join(path)
        if hasattr(old, "how") and hasattr(old.array, "qvalue"):
            if name not in self.kernels:
                raise ValueError(f"qwix quantizes {name}, which is not: skip all kernels of its module, or none.")
            return old.replace(array=self.kernel(name, lambda x: x))
        if path in floats:
            return floats[path]
        rounded = self.of(path)
        if hasattr(old, "how"):
            return old.replace(array=self.scale(rounded, old.array))
        return self.zero(rounded, old)

    def kernel(self, name, wrap):
        numbers, step, zero, *_ = self.kernels[name]
        kind = self.kinds[name]
        stored = STORED[kind] if isinstance(kind, str) else kind
        zero = None if zero is None else wrap(zero.astype(stored))
        kind = kind if isinstance(kind, str) else jnp.dtype(kind)
        return self.array(wrap(numbers.astype(stored)), wrap(step), zero, qtype=kind)

    def of(self, path):
        """The rounding of the inputs of a module's kernel."""
        parent = "/".join(path[:-1])
        found = [uses[0] for name, uses in self.inputs.items() if name.rpartition("/")[0] == parent]
        if not found or not re.fullmatch(r"\w+?\d*_lhs_(scale|zero_point)", path[-1]):
            raise ValueError(f"qwix has {'/'.join(path)}, of which this result knows nothing.")
        return found[0]

    def scale(self, rounded, old):
        return jnp.broadcast_to(rounded.levels.step.astype(old.dtype).reshape((1,) * len(old.shape)), old.shape)

    def zero(self, rounded, old):
        top = (int(rounded.levels.hi) + 1) // 2
        return jnp.broadcast_to((rounded.levels.zero - top).astype(old.dtype).reshape((1,) * len(old.shape)), old.shape)


def _kernel(tensor, sites) -> _Kernel:
    """The kernel in numbers that qwix has; ValueError says why it cannot have it."""
    if tensor.rotated is not None:
        raise ValueError("its inputs are rotated")
    if not sites:
        raise ValueError("the model does not use it on this batch")
    steps = {eqn.primitive.name for site in sites for eqn, _ in site.chain.steps}
    if not steps <= CASTS | SLICES:
        raise ValueError(f"the model changes it before it multiplies ({', '.join(sorted(steps - CASTS - SLICES))})")
    layout = sites[0].layout
    if not isinstance(layout, ConvLayout):
        if layout.first:
            raise ValueError("it comes first in its product")
        return _floating(tensor, None if steps & SLICES else layout.contract[-1]) or _integers(tensor)
    found = _integers(tensor)
    if found.zero is not None or any(n > 1 for axis, n in enumerate(found.step.shape) if axis != layout.spec[0]):
        raise ValueError("a convolution has one step per channel and no zero point")
    return found


def _integers(tensor) -> _Kernel:
    found = signed(tensor)
    if found.bits > 8:
        raise ValueError(f"{tensor.grid} takes {found.bits} bits with a sign, and there are 4 or 8")
    return _Kernel(found.codes, found.step, found.zero, _kind(found.bits))


def _floating(tensor, axis: int | None) -> _Kernel | None:
    """A kernel whose levels are a table that qwix has too; its blocks run along an axis, and None stands for no blocks."""
    grid, step = tensor.grid, tensor.step
    if isinstance(grid, NF4):
        return _Kernel(tensor.codes, step, None, "nf4")
    if not isinstance(grid, (E2M1, E4M3, E5M2)):
        return None
    values = jnp.asarray(np.array(grid.values, np.float32))[tensor.codes]
    kind, run = BLOCKS.get((type(grid), tensor.step_dtype), (None, 0))
    runs = [full // here for here, full in zip(step.shape, tensor.shape, strict=True)]
    if kind is not None and axis is not None and runs == [run if i == axis else 1 for i in range(len(runs))]:
        return _Kernel(values, step, None, kind, run)
    return None if isinstance(grid, E2M1) else _Kernel(values, step, None, getattr(jnp, grid.type))


def _rule(kernel: _Kernel, layout, rounded) -> dict:
    """The settings of a rule of qwix, which say how it rounds the inputs; those of weights are in the kernel itself."""
    rule: dict = {"weight_qtype": kernel.kind}
    steps = zip(kernel.step.shape, kernel.numbers.shape, strict=True)
    runs = {kernel.run} if kernel.run else {full // here for here, full in steps if 1 < here < full}
    if runs:
        rule["tile_size"] = min(runs)
    if rounded:
        rule |= _inputs(rounded)
        if runs and not rule["act_static_scale"]:
            raise ValueError("its inputs are rounded by row, which qwix does by the groups of the weights")
        if not kernel.whole and kernel.run is None:
            raise ValueError(
                "its inputs are rounded to integers, which qwix does not multiply by floating-point weights"
            )
    if isinstance(layout, ConvLayout):  # qwix has one type for both sides, so 4-bit weights lie in 8 beside inputs of 8
        if "act_qtype" not in rule or (rule["act_qtype"] == jnp.int4 and kernel.kind == jnp.int8):
            raise ValueError("a convolution has inputs quantized to as many bits as its weights or more, 4 or 8")
        rule["weight_qtype"] = rule["act_qtype"]
    return rule


def _kind(bits):
    return jnp.int4 if bits <= 4 else jnp.int8


def _inputs(rounded):
    settings = rounded[0].settings
    if len(rounded) > 1 or settings.per == "channel":
        raise ValueError("its inputs are rounded in more ways than one")
    if settings.per == "group" or settings.rotation is not None or settings.step_dtype is not None:
        raise ValueError("its inputs are rotated, in blocks or have steps of another type, and qwix has none of these")
    grid, rows = settings.grid, settings.per == "row"
    if not isinstance(grid, (Integer, Asymmetric)) or grid.bits not in (4, 8):
        raise ValueError(f"its inputs are of {grid}, and there are Integer and Asymmetric of 4 or 8 bits")
    if isinstance(grid, Integer) and grid.narrow and not rows:
        raise ValueError("its inputs leave out the lowest integer, which qwix does not")
    top = 2 ** (grid.bits - 1) - 1
    method = (
        "minmax" if isinstance(grid, Asymmetric) else f"absmax,{(top + 0.5) / top}"
    )  # its top level is half a step on
    return {"act_qtype": _kind(grid.bits), "act_static_scale": not rows, "act_calibration_method": method}


def _fill(model, path, leaf):
    """Sets one kernel of an NNX model, and the rounding of its inputs."""
    *heads, name = path.split("/")
    module = model
    for head in heads:
        module = module[int(head)] if head.isdigit() and not hasattr(module, head) else getattr(module, head)
    old = getattr(module, name)
    if not hasattr(old, "how"):
        raise ValueError(f"qwix leaves {path} as it is: it does not see its product.")
    setattr(module, name, old.replace(array=leaf.kernel(path, as_param)))
    if leaf.inputs.get(path) and leaf.inputs[path][0].levels is not None:
        rounded = leaf.inputs[path][0]
        for key, value in list(vars(module).items()):
            if key.endswith("_lhs_scale"):
                setattr(module, key, value.replace(array=as_param(leaf.scale(rounded, value.array))))
            elif key.endswith("_lhs_zero_point"):
                setattr(module, key, as_param(leaf.zero(rounded, value)))


def _is_auxiliary(x):
    return hasattr(x, "how")


def _named(tree):
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {"/".join(n for n in map(key_name, path) if n): x for path, x in flat}

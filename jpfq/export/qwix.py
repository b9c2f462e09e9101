"""A result for the runtime of qwix (google/qwix), whose quantized models hold integer kernels and multiply by them.

qwix is an optional package: pip install qwix. What its runtime computes is what we do, but for the order of sums: it
multiplies integers and steps apart where we multiply by dequantized kernels.
"""

import importlib
import re
from typing import Any

import jax
import jax.numpy as jnp

from ..calibrate.activation import ActivationQuantizer
from ..matrix.layout import ConvLayout
from ..matrix.signed import Signed, signed
from ..model.compat import key_name
from ..model.functional import call
from ..model.linen import is_linen, unboxed
from ..model.nnx import as_param
from ..model.program import trace
from ..model.sites import CASTS, find_sites
from ..scalar import Asymmetric, Integer

SLICES = {"slice", "dynamic_slice", "squeeze"}  # of a stack of layers


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
    kernels: dict[str, Signed] = {}
    rules: dict[str, dict] = {}
    refused = []
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
        self, array, kernels: dict[str, Signed], kinds: dict[str, Any], inputs: dict[str, list[ActivationQuantizer]]
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
        codes, step, zero, _ = self.kernels[name]
        kind = self.kinds[name]
        zero = None if zero is None else wrap(zero.astype(kind))
        return self.array(wrap(codes.astype(kind)), wrap(step), zero, qtype=jnp.dtype(kind))

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


def _kernel(tensor, sites) -> Signed:
    """The kernel in signed integers; ValueError says why qwix cannot have it."""
    if tensor.rotated is not None:
        raise ValueError("its inputs are rotated")
    if not sites:
        raise ValueError("the model does not use it on this batch")
    steps = {eqn.primitive.name for site in sites for eqn, _ in site.chain.steps}
    if not steps <= CASTS | SLICES:
        raise ValueError(f"the model changes it before it multiplies ({', '.join(sorted(steps - CASTS - SLICES))})")
    found = signed(tensor)
    if found.bits > 8:
        raise ValueError(f"{tensor.grid} takes {found.bits} bits with a sign, and there are 4 or 8")
    layout = sites[0].layout
    if not isinstance(layout, ConvLayout):
        if layout.first:
            raise ValueError("it comes first in its product")
        return found
    if found.zero is not None or any(n > 1 for axis, n in enumerate(found.step.shape) if axis != layout.spec[0]):
        raise ValueError("a convolution has one step per channel and no zero point")
    return found


def _rule(kernel: Signed, layout, rounded) -> dict:
    """The settings of a rule of qwix, which say how it rounds the inputs; those of weights are in the kernel itself."""
    rule: dict = {"weight_qtype": _kind(kernel.bits)}
    runs = {full // here for here, full in zip(kernel.step.shape, kernel.codes.shape, strict=True) if 1 < here < full}
    if runs:
        rule["tile_size"] = min(runs)
    if rounded:
        rule |= _inputs(rounded)
    if isinstance(layout, ConvLayout):  # qwix has one type for both sides, so 4-bit weights lie in 8 beside inputs of 8
        if "act_qtype" not in rule or (rule["act_qtype"] == jnp.int4 and kernel.bits > 4):
            raise ValueError("a convolution has inputs quantized to as many bits as its weights or more, 4 or 8")
        rule["weight_qtype"] = rule["act_qtype"]
    return rule


def _kind(bits):
    return jnp.int4 if bits <= 4 else jnp.int8


def _inputs(rounded):
    settings = rounded[0].settings
    if len(rounded) > 1 or settings.per == "channel":
        raise ValueError("its inputs are rounded in more ways than one")
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

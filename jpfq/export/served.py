"""The layers of a result in the terms of servers, by the matrices that files would hold."""

from typing import Any

from ..matrix.layout import ConvLayout
from ..network.servers import Exported, Form, Servers, form_of, loads_file, servers
from .matrix import linear, products


def served(quantized: Any, batch: Any = None, dynamic_inputs: str | None = None) -> Servers:
    """See `Quantized.servers`."""
    return servers(_forms(quantized, batch), dynamic_inputs)


def exported(quantized: Any, kind: str, left: dict[str, str], options: dict[str, Any]) -> Exported:
    """The return value of `Quantized.export`, from the kernels that the format could not hold."""
    forms = _forms(quantized, options.get("batch"))
    return Exported(left, loads_file(kind, forms, left, options.get("dynamic_inputs")))


def _forms(quantized, batch) -> dict[str, Form]:
    sites = {} if batch is None else products(quantized._functional, batch)
    return {path: _form(quantized, path, tensor, sites.get(path)) for path, tensor in quantized.tensors.items()}


def _form(quantized, path, tensor, site) -> Form:
    uses = quantized.inputs.get(path)
    activations = uses[0].settings if uses else None
    more: dict = {"refused": "its inputs are rounded in several ways"} if uses and len(uses) > 1 else {}
    if site is not None and isinstance(site.layout, ConvLayout):
        _, inputs, neurons = site.layout.dims
        return form_of(tensor.grid, tensor.step_dtype, None, (inputs, neurons), activations, conv=True, **more)
    try:
        found = linear(tensor, path, site)
        group, shape = found.group, found.codes.shape[::-1]
    except ValueError as error:
        group, shape, more = None, (1, 1), {"refused": str(error)}
    return form_of(tensor.grid, tensor.step_dtype, group, shape, activations, **more)

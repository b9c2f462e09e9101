"""Results in compressed-tensors, the format of Hugging Face folders that vLLM and SGLang load.

A dense kernel becomes a linear layer's arrays NAME.weight_packed or NAME.weight, NAME.weight_scale and so on, as layers.py
says. All else is written as it is, dequantized where it was quantized. config.json names how each layer is quantized.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from ..scalar.checks import check_choice
from ..storage.files import HIDDEN, hidden, writing
from ..storage.leaves import NATIVE
from .layers import DYNAMIC, Scheme, inputs_of, layer
from .matrix import products


def compressed_tensors(
    quantized: Any,
    folder: str | os.PathLike,
    *,
    names: Callable[[str], str] | None = None,
    config: dict | None = None,
    dynamic_inputs: Literal["int8", "fp8"] | None = None,
    batch: Any = None,
) -> dict[str, str]:
    """Writes model.safetensors and config.json into a new folder.

    Kernels are held as matrices (out, in): integers of 4 or 8 bits, whichever is enough, E4M3, and the MX and NVFP4 formats.
    Inputs that are rounded per row are rounded per token by the server, and those of one step by that step.

    Args:
        quantized: a result.
        folder: a new folder.
        names: from the path of a parameter to its name; left out, parts joined by dots, with `weight` for `kernel`, `scale`
            and `embedding`. The names of a kernel end in `weight`.
        config: what else config.json is to hold, such as {"architectures": ["LlamaForCausalLM"], ..}.
        dynamic_inputs: what the server is to round inputs to, token by token, of layers that were calibrated on inputs as
            they are. vLLM on TPU loads integer weights of 4 bits with "fp8" only, and those of 8 bits with "int8".
        batch: an input, of the form calibrated on. It tells how each kernel is multiplied: those of attention heads, of rank
            3, are then held as matrices, too. Left out, kernels of rank 2 are.

    Returns:
        By path, the reason for each quantized kernel that is written dequantized.

    Raises:
        ValueError: no kernel can be held, the folder is in use, or two parameters take one name.
    """
    if dynamic_inputs is not None:
        check_choice("dynamic_inputs", dynamic_inputs, tuple(DYNAMIC))
    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and not all(HIDDEN.fullmatch(path.name) for path in folder.iterdir())):
        raise ValueError(f"{folder} is already in use: export into a new folder.")
    functional, arrays, schemes, left, plain = quantized._functional, {}, {}, {}, []
    sites = {} if batch is None else products(functional, batch)
    for path, leaf, ours in zip(functional.paths, functional.leaves, functional.trainable, strict=True):
        name = (names or _name)(path)
        parts = None
        if ours and path in quantized.tensors:
            try:
                schemes[name.removesuffix(".weight")], parts = _layer(
                    quantized, path, name, sites.get(path), dynamic_inputs
                )
            except ValueError as error:
                left[path] = str(error)
        if parts is None:
            parts = {name: _array(leaf, path)}
            if parts[name].ndim == 2 and path.rpartition("/")[2] == "kernel":
                parts[name] = np.ascontiguousarray(parts[name].T)
                plain.append(name.removesuffix(".weight"))
        if taken := arrays.keys() & parts.keys():
            raise ValueError(f"Two parameters take the name {min(taken)}: tell them apart by names=.")
        arrays |= parts
    if not schemes:
        listing = "\n".join(f"  {path}: {reason}" for path, reason in left.items())
        raise ValueError(f"compressed-tensors holds none of the quantized kernels:\n{listing or '  there are none'}")
    if (config or {}).get("tie_word_embeddings"):
        plain.append("lm_head")  # which is the embedding, as it is
    text = {**(config or {}), "quantization_config": _config(schemes, plain)}
    with writing(folder, safetensors.SafetensorError):
        folder.mkdir(parents=True, exist_ok=True)
        with hidden(folder) as new:
            safetensors.numpy.save_file(arrays, new / "model.safetensors", metadata={"format": "pt"})
            (new / "config.json").write_text(json.dumps(text, indent=2) + "\n")
            for file in ("model.safetensors", "config.json"):
                (new / file).replace(folder / file)
    return left


def _layer(quantized, path, name, site, dynamic_inputs) -> tuple[Scheme, dict[str, np.ndarray]]:
    """The scheme of a kernel and its arrays by name."""
    if path in quantized.embeddings:
        raise ValueError("an embedding, which servers read as floating numbers")
    inputs, around = inputs_of(quantized.inputs.get(path))
    scheme, arrays = layer(quantized.tensors[path], path, site, inputs or DYNAMIC.get(dynamic_inputs))
    if not name.endswith(".weight"):
        raise ValueError(f"its name {name} does not end in .weight")
    stem = name.removesuffix("weight")
    return scheme, {f"{stem}{end}": np.ascontiguousarray(x) for end, x in (arrays | around).items()}


def _config(schemes: dict[str, Scheme], plain: list[str]) -> dict:
    """quantization_config: one group of layers for each way in which they are quantized."""
    kinds = list(dict.fromkeys(schemes.values()))
    groups = {}
    for number, kind in enumerate(kinds):
        own = [f"re:^{re.escape(layer)}$" for layer, scheme in schemes.items() if scheme == kind]
        groups[f"group_{number}"] = {"targets": ["Linear"] if len(kinds) == 1 else own, **kind.config()}
    formats = {kind.format for kind in kinds}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": plain,
        "kv_cache_scheme": None,
    }


def _name(path):
    *heads, last = path.split("/")
    return ".".join([*heads, "weight" if last in ("kernel", "scale", "embedding") else last])


def _array(leaf, path):
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    value = np.asarray(leaf)
    if value.dtype.name not in NATIVE:
        raise ValueError(f"{path} is of type {value.dtype.name}, which safetensors and NumPy do not both hold.")
    return np.ascontiguousarray(value).reshape(value.shape)

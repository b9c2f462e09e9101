"""Results in the formats of other systems.

compressed-tensors, "pack-quantized": what vLLM's loaders read. A dense kernel (in, out) becomes a linear layer's

    NAME.weight_packed      int32 (out, ceil(in / n)), n = 32 / bits integers to a word along the inputs, the first lowest,
                            each with 2^(bits - 1) added
    NAME.weight_scale       the steps (out, groups of inputs)
    NAME.weight_zero_point  int32 (ceil(out / n), groups), packed along the outputs, where zero points are fitted
    NAME.weight_shape       int64 (2,), the shape (out, in)

and all else is written as it is, dequantized where it was quantized. config.json names how each layer is quantized.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from ..matrix.signed import Signed, signed
from ..storage.files import HIDDEN, hidden, writing
from ..storage.leaves import NATIVE


def compressed_tensors(
    quantized: Any, folder: str | os.PathLike, *, names: Callable[[str], str] | None = None, config: dict | None = None
) -> dict[str, str]:
    """Writes model.safetensors and config.json into a new folder.

    Kernels of rank 2 are held, at 4 or 8 bits, whichever is enough: fewer bits take 4. They are taken as (in, out), unless
    their steps say that outputs come first.

    Args:
        quantized: a result.
        folder: a new folder.
        names: from the path of a parameter to its name; left out, parts joined by dots, with `weight` for `kernel`, `scale`
            and `embedding`. The names of a kernel end in `weight`.
        config: what else config.json is to hold, such as {"architectures": ["LlamaForCausalLM"], ..}.

    Returns:
        By path, the reason for each quantized kernel that is written dequantized.

    Raises:
        ValueError: no kernel can be held, the folder is in use, or two parameters take one name.
    """
    folder = Path(folder)
    if folder.is_file() or (folder.is_dir() and not all(HIDDEN.fullmatch(path.name) for path in folder.iterdir())):
        raise ValueError(f"{folder} is already in use: export into a new folder.")
    functional, arrays, schemes, left, plain = quantized._functional, {}, {}, {}, []
    for path, leaf, ours in zip(functional.paths, functional.leaves, functional.trainable, strict=True):
        name = (names or _name)(path)
        parts = {name: leaf}
        if ours and path in quantized.tensors:
            try:
                schemes[name.removesuffix(".weight")], parts = _layer(quantized.tensors[path], name, path)
            except ValueError as error:
                left[path] = str(error)
        if name in parts:
            parts[name] = _array(leaf, path)
            if parts[name].ndim == 2 and path.rpartition("/")[2] == "kernel":
                parts[name] = np.ascontiguousarray(parts[name].T)
                plain.append(name.removesuffix(".weight"))
        if taken := arrays.keys() & parts.keys():
            raise ValueError(f"Two parameters take the name {min(taken)}: tell them apart by names=.")
        arrays |= parts
    if not schemes:
        listing = "\n".join(f"  {path}: {reason}" for path, reason in left.items())
        raise ValueError(f"compressed-tensors holds none of the quantized kernels:\n{listing or '  there are none'}")
    text = {**(config or {}), "quantization_config": _config(schemes, plain)}
    with writing(folder, safetensors.SafetensorError):
        folder.mkdir(parents=True, exist_ok=True)
        with hidden(folder) as new:
            safetensors.numpy.save_file(arrays, new / "model.safetensors", metadata={"format": "pt"})
            (new / "config.json").write_text(json.dumps(text, indent=2) + "\n")
            for file in ("model.safetensors", "config.json"):
                (new / file).replace(folder / file)
    return left


def packed_int32(codes: np.ndarray, bits: int) -> np.ndarray:
    """Signed integers (rows, columns) as int32 (rows, ceil(columns / n)), n = 32 / bits to a word, the first lowest."""
    per = 32 // bits
    shifted = (codes + 2 ** (bits - 1)).astype(np.uint32)
    shifted = np.pad(shifted, [(0, 0), (0, -codes.shape[1] % per)]).reshape(len(codes), -1, per)
    return np.bitwise_or.reduce(shifted << (bits * np.arange(per, dtype=np.uint32)), -1).view(np.int32)


def _layer(tensor, name, path) -> tuple[tuple, dict[str, np.ndarray]]:
    """((bits, inputs to a group or None, whether zero points are 0), arrays); ValueError says why there is none."""
    if tensor.rotated is not None:
        raise ValueError("its inputs are rotated")
    if len(tensor.shape) != 2:
        raise ValueError(f"it is of rank {len(tensor.shape)}: only matrices are held")
    if not name.endswith(".weight"):
        raise ValueError(f"its name {name} does not end in .weight")
    found = signed(tensor)
    if found.bits > 8:
        raise ValueError(f"{tensor.grid} takes {found.bits} bits with a sign, and there are 4 or 8")
    bits = 4 if found.bits <= 4 else 8
    found = _oriented(found, path)
    codes, step = np.asarray(found.codes), np.asarray(found.step)
    groups = step.shape[1]
    if groups == codes.shape[1]:
        raise ValueError("each input has a step of its own")
    step = np.broadcast_to(step, (codes.shape[0], groups))
    stem = name.removesuffix("weight")
    arrays = {
        f"{stem}weight_packed": packed_int32(codes, bits),
        f"{stem}weight_scale": np.ascontiguousarray(step),
        f"{stem}weight_shape": np.array(codes.shape, np.int64),
    }
    if found.zero is not None:
        zero = np.broadcast_to(np.asarray(found.zero), step.shape)
        arrays[f"{stem}weight_zero_point"] = np.ascontiguousarray(packed_int32(zero.T, bits).T)
    return (bits, None if groups == 1 else codes.shape[1] // groups, found.zero is None), arrays


def _oriented(found: Signed, path) -> Signed:
    """With codes (out, in). Outputs have a step each; if all share one, a kernel of Flax is known by name."""
    codes, step, zero, bits = found
    n, m = codes.shape
    if step.shape[1] == m > 1 or (step.shape[1] == 1 and path.rpartition("/")[2] == "kernel"):
        return Signed(codes.T, step.T, None if zero is None else zero.T, bits)
    if step.shape[0] == n > 1:
        return found
    raise ValueError("its steps do not tell inputs from outputs")


def _config(schemes: dict[str, tuple], plain: list[str]) -> dict:
    """quantization_config: one group of layers for each way in which they are quantized."""
    kinds = list(dict.fromkeys(schemes.values()))
    groups = {}
    for number, kind in enumerate(kinds):
        bits, size, symmetric = kind
        own = [f"re:^{re.escape(layer)}$" for layer, scheme in schemes.items() if scheme == kind]
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if len(kinds) == 1 else own,
            "weights": {
                "num_bits": bits,
                "type": "int",
                "symmetric": symmetric,
                "strategy": "channel" if size is None else "group",
                "group_size": size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
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

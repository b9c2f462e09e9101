"""Results in compressed-tensors, the format of Hugging Face folders that vLLM and SGLang load.

A dense kernel becomes a linear layer's arrays NAME.weight_packed or NAME.weight, NAME.weight_scale and so on, as layers.py
says. All else is written as it is, dequantized where it was quantized. config.json names how each layer is quantized.
"""

import os
import re
from typing import Any, Literal

from ..scalar.checks import check_choice
from .folder import Folder, write
from .layers import DYNAMIC, Scheme, inputs_of, layer


def compressed_tensors(
    quantized: Any,
    folder: str | os.PathLike,
    *,
    dynamic_inputs: Literal["int8", "fp8"] | None = None,
    **options: Any,
) -> dict[str, str]:
    """Writes model.safetensors, in several files where it is large, and config.json into a new folder.

    Kernels are held as matrices (out, in): integers of 4 or 8 bits, whichever is enough, E4M3, and the MX and NVFP4 formats.
    Inputs that are rounded per row are rounded per token by the server, and those of one step by that step.

    Args:
        quantized: a result.
        folder: a new folder.
        dynamic_inputs: what the server is to round inputs to, token by token, of layers that were calibrated on inputs as
            they are. vLLM on TPU loads integer weights of 4 bits with "fp8" only, and those of 8 bits with "int8".
        **options: those of `jpfq.export.folder.Folder`.

    Returns:
        By path, the reason for each quantized kernel that is written dequantized.

    Raises:
        ValueError: no kernel can be held, the folder is in use, or two parameters take one name.
    """
    if dynamic_inputs is not None:
        check_choice("dynamic_inputs", dynamic_inputs, tuple(DYNAMIC))
    to = Folder.of("compressed-tensors", folder, options, "dynamic_inputs")
    served = None if dynamic_inputs is None else DYNAMIC[dynamic_inputs]

    def held(path, site):
        inputs, around = inputs_of(quantized.inputs.get(path))
        scheme, arrays = layer(quantized.tensors[path], path, site, inputs or served)
        return scheme, arrays | around

    return write(quantized, to, held, _config)


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

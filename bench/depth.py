"""Claim: compilations do not grow with depth, and time grows in proportion at most. Run: python bench/depth.py

A pre-norm transformer of equal blocks, quantized to 4 bits by GPFQ, at several depths. Each depth is measured in fresh
processes: the first `quantize` there (cold: it traces and compiles), and three more (warm: they should compile
nothing). Compilations are counted by JAX's own event; results are medians over the processes, which run interleaved.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable

import flax.linen as nn
import jax
import numpy as np
from common import PLAIN, report, table, verdict

import jpfq

COMPILED = "/jax/core/compile/backend_compile_duration"
AGAIN = 3  # warm calls per process
DEEP, SHALLOW, TARGET = 32, 8, 5.0  # blocks, blocks, ratio of times


class Block(nn.Module):
    """Attention and MLP, each on a residual branch."""

    heads: int = 4

    @nn.compact
    def __call__(self, x):
        x += nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x))
        y = nn.gelu(nn.Dense(4 * x.shape[-1])(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1])(y)


class Transformer(nn.Module):
    depth: int

    @nn.compact
    def __call__(self, x):
        for _ in range(self.depth):
            x = Block()(x)
        return nn.Dense(16)(nn.LayerNorm()(x))


def model_and_batches(depth: int, width: int, batches: int, rows: int) -> tuple[nn.Module, dict, list]:
    """A model with random weights, and its data; drawn by NumPy, so that nothing is compiled before `quantize`."""
    random, model = np.random.default_rng(0), Transformer(depth)
    shape = (rows // 32, 32, width)
    shapes = jax.eval_shape(model.init, jax.ShapeDtypeStruct((2,), np.uint32), jax.ShapeDtypeStruct(shape, np.float32))

    def draw(path, leaf):
        name = path[-1].key
        if name == "scale":
            return np.ones(leaf.shape, np.float32)
        fan_in = leaf.size // leaf.shape[-1] if path[-2].key == "out" else leaf.shape[0]
        spread = 0.0 if name == "bias" else fan_in**-0.5
        return (spread * random.standard_normal(leaf.shape)).astype(np.float32)

    variables = jax.tree_util.tree_map_with_path(draw, shapes)
    return model, variables, [random.standard_normal(shape).astype(np.float32) for _ in range(batches)]


def counted(f: Callable) -> tuple[float, int, float]:
    """Seconds of a call, the compilations in it, and the seconds that XLA took for them."""
    compiling: list[float] = []
    listen = lambda event, seconds, **_: compiling.append(seconds) if event == COMPILED else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    start = time.perf_counter()
    jax.block_until_ready(f())
    seconds = time.perf_counter() - start
    jax.monitoring.unregister_event_duration_listener(listen)
    return seconds, len(compiling), sum(compiling)


def measure(depth: int, args: argparse.Namespace) -> dict:
    """The measurements of a fresh process at one depth."""
    model, variables, batches = model_and_batches(depth, args.width, args.batches, args.rows)
    call = lambda: jpfq.quantize(model, batches, PLAIN, variables=variables, progress=False).params
    cold, again = counted(call), [counted(call) for _ in range(AGAIN)]
    if not cold[1]:
        raise SystemExit(f"This JAX does not report {COMPILED}.")
    seconds, compilations, compiling = zip(*again, strict=True)
    return {"cold": cold, "warm": (float(np.median(seconds)), sum(compilations), sum(compiling))}


def fresh(depth: int, args: argparse.Namespace) -> dict:
    """`measure`, in a process of its own."""
    sizes = [f"--{name}={getattr(args, name)}" for name in ("width", "batches", "rows")]
    command = [sys.executable, __file__, f"--measure={depth}", *sizes]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16, 32], help="numbers of blocks")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--rows", type=int, default=512, help="positions per batch, in sequences of 32")
    parser.add_argument("--repeats", type=int, default=3, help="processes per depth")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args)))
        return

    taken: dict = {depth: [] for depth in args.depths}
    for _ in range(args.repeats):
        for depth in args.depths:
            taken[depth].append(fresh(depth, args))
    median = lambda depth, when, what: float(np.median([run[when][what] for run in taken[depth]]))
    lines = []
    for depth in args.depths:
        cold = (median(depth, "cold", what) for what in range(3))
        warm = (median(depth, "warm", what) for what in range(2))
        lines.append((str(depth), str(6 * depth + 1), *map(_show, cold), *map(_show, warm)))
    head = ("blocks", "kernels", "cold s", "compilations", "in XLA s", "warm s", "compilations")
    verdicts = []
    if {DEEP, SHALLOW} <= set(args.depths):
        ratio, warm = (median(DEEP, when, 0) / median(SHALLOW, when, 0) for when in ("cold", "warm"))
        counts = [int(median(depth, "cold", 1)) for depth in (SHALLOW, DEEP)]
        verdicts += [
            verdict(ratio <= TARGET, f"{DEEP} blocks take at most {TARGET} times {SHALLOW} blocks, cold: {ratio:.2f}"),
            verdict(warm <= TARGET, f"the same, warm: {warm:.2f}"),
            verdict(counts[0] == counts[1], f"as many compilations at {SHALLOW} and {DEEP} blocks: {counts}"),
        ]
    again = [int(median(depth, "warm", 1)) for depth in args.depths]
    verdicts.append(verdict(not any(again), f"later calls compile nothing: {again}"))
    note = (
        f"width {args.width}, {args.batches} batches of {args.rows} positions, 4 bits; "
        f"medians of {args.repeats} processes per depth"
    )
    report("depth", parser, args, note, table(head, lines), "\n".join(verdicts))


def _show(x):
    return f"{x:.0f}" if x == int(x) else f"{x:.2f}"


if __name__ == "__main__":
    main()

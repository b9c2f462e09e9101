"""Claim: quantizing a network takes little more time than its parts alone. Run: python bench/calibration.py

A pre-norm transformer of 32 equal blocks, quantized to 4 bits by GPFQ. Measured in one process, each alone and compiled
beforehand: the whole call; one forward pass of all batches through the float model and one through the quantized, each
as one program; the Grams of all stops; the solves of all kernels. Query, key and value share a Gram.
"""

import argparse
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from common import PLAIN, report, table, verdict
from depth import model_and_batches

import jpfq

TARGET = 1.5
BLOCK = {  # what reads one input: kernels (in, out) as multiples of the width
    "query, key, value": [(1, 1)] * 3,
    "out": [(1, 1)],
    "up": [(1, 4)],
    "down": [(4, 1)],
}


def seconds(f: Callable) -> float:
    start = time.perf_counter()
    jax.block_until_ready(f())
    return time.perf_counter() - start


def parts(args: argparse.Namespace) -> dict[str, Callable]:
    """The functions to measure, by name, the whole call first."""
    model, variables, batches = model_and_batches(args.blocks, args.width, args.batches, args.rows)
    whole = lambda: jpfq.quantize(model, batches, PLAIN, variables=variables, progress=False)
    quantized = whole().variables
    apply = jax.jit(model.apply)
    random = np.random.default_rng(1)
    normal = lambda *shape: jnp.asarray(random.standard_normal(shape), jnp.float32)
    gram_of = jax.jit(jpfq.Gram.from_data)
    add = jax.jit(jpfq.Gram.merge)
    inputs = {n: [normal(args.rows, n) for _ in range(args.batches)] for n in (args.width, 4 * args.width)}
    lossy = {n: [x + 0.1 * normal(*x.shape) for x in xs] for n, xs in inputs.items()}
    stops = [[(a * args.width, b * args.width) for a, b in kernels] for kernels in BLOCK.values()] * args.blocks
    stops.append([(args.width, 16)])

    def grams():
        found = []
        for stop in stops:
            n = stop[0][0]
            one, *more = (gram_of(x, xq) for x, xq in zip(inputs[n], lossy[n], strict=True))
            for gram in more:
                one = add(one, gram)
            found.append(one)
        return found

    data = {n: gram_of(inputs[n][0], lossy[n][0]) for n in inputs}
    weights = {shape: normal(*shape) for stop in stops for shape in stop}
    settings = {name: getattr(PLAIN, name) for name in ("bits", "scale", "method", "order", "finish", "shrinkage")}
    solve = jax.jit(lambda W, gram: jpfq.solve(W, gram, **settings))
    return {
        "jpfq.quantize": lambda: whole().params,
        "float forward": lambda: [apply(variables, x) for x in batches],
        "quantized forward": lambda: [apply(quantized, x) for x in batches],
        "Gram products": grams,
        "solves": lambda: [solve(weights[shape], data[shape[0]]) for stop in stops for shape in stop],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--rows", type=int, default=1024, help="positions per batch, in sequences of 32")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()

    measured = parts(args)
    for f in measured.values():
        seconds(f)
    taken = {name: [] for name in measured}
    for _ in range(args.repeats):
        for name, f in measured.items():
            taken[name].append(seconds(f))
    whole, *each = (float(np.median(times)) for times in taken.values())
    ratio = whole / sum(each)
    rows = [(name, f"{x:.2f}") for name, x in zip(measured, (whole, *each), strict=True)]
    note = (
        f"{args.blocks} blocks of width {args.width}, {args.batches} batches of {args.rows} positions, 4 bits; medians of "
        f"{args.repeats} runs in turn"
    )
    claim = f"the whole takes at most {TARGET} times the sum of its parts: {ratio:.2f}"
    report("calibration", parser, args, note, table(("alone", "seconds"), rows), verdict(ratio <= TARGET, claim))


if __name__ == "__main__":
    main()

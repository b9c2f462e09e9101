"""Claim: on an accelerator one launch per block beats the plain scan. Run: python bench/pallas.py

The recursion q = Q(A - L q) in blocks, by the kernel of jpfq/matrix/pallas.py and by the scan, next to the plain scan over
all coordinates and one float32 product of the same size; ratios are medians over rounds, each with the others beside it.
Codes are compared with the plain scan's: float32 decides some ties otherwise, and a tie turns later codes of its neuron.
Wanted: at most 3 products, and a fifth of the plain scan. Without an accelerator there is nothing to time, and the report
says so.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
from common import report, table, verdict
from recursion import compiled, measure

import jpfq
from jpfq.matrix import GPFQ, Gram, Kernel, Recursion, substitute
from jpfq.matrix.arrays import matmul

PRODUCTS, SCANS = 3.0, 5.0  # products that the kernel may take at most; plain scans over kernels at least


def at_size(n: int, out: int, args: argparse.Namespace, kernel: Kernel) -> tuple[list[tuple], list[str]]:
    """The rows of one size, and the verdicts."""
    keys = jax.random.split(jax.random.key(args.seed), 3)
    mix = jnp.eye(n) + jax.random.normal(keys[0], (n, n)) / n**0.5  # inputs that correlate
    X = jax.nn.relu(jax.random.normal(keys[1], (2 * n, n)) @ mix)
    W, gram = jax.random.normal(keys[2], (n, out)) / n**0.5, Gram.from_data(X)
    system, levels = jax.jit(GPFQ())(W, gram), jpfq.scale.AbsMax()(W, jpfq.Integer(4))

    def run(base, L, about, levels, kernel, block):
        recursion = Recursion(levels, jnp.arange(n), out, jpfq.rounding.Nearest(), kernel=kernel)
        return substitute(base, L, recursion, block=block, about=about).codes

    ways = {f"kernel, blocks of {b}": (kernel, b) for b in args.blocks}
    ways |= {f"scan, blocks of {b}": (None, b) for b in args.blocks} | {"plain scan": (None, None)}
    fed = system.base, system.L, system.about, levels
    forms = [compiled(name, functools.partial(run, kernel=k, block=b), *fed) for name, (k, b) in ways.items()]
    codes = {form.name: np.asarray(form.run()) for form in forms}
    taken = measure(compiled("product", matmul, gram.H, W), forms, args.rounds)
    seconds = {name: np.median(spent) for name, (spent, _) in taken.items()}
    ratios = {name: np.median(ratio) for name, (_, ratio) in taken.items()}
    differ = {name: np.mean(codes[name] != codes["plain scan"]) for name in codes}
    rows = [
        (str(n), name, f"{1e3 * seconds[name]:.2f}", f"{ratios[name]:.2f}", f"{differ.get(name, 0):.3%}")
        for name in taken
    ]
    best = min((name for name in ways if name.startswith("kernel")), key=ratios.get)
    gain, size = seconds["plain scan"] / seconds[best], f"n = {n}, O = {out}"
    return rows, [
        verdict(ratios[best] <= PRODUCTS, f"{size}: {best} at most {PRODUCTS} products: {ratios[best]:.2f}"),
        verdict(gain >= SCANS, f"{size}: {best} at least {SCANS} times as fast as the plain scan: {gain:.1f}"),
        verdict(differ[best] <= 0.01, f"{size}: codes of the plain scan but for 1 %: {differ[best]:.3%}"),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, nargs="+", default=[4096, 8192], help="n, one or more")
    parser.add_argument("--out", type=int, default=4096, help="neurons")
    parser.add_argument("--blocks", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--tile", type=int, default=Kernel().tile, help="neurons of one program")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--interpret", action="store_true", help="run step by step, to try the script without accelerator"
    )
    args = parser.parse_args()

    device = jax.devices()[0]
    if device.platform == "cpu" and not args.interpret:
        none = "No accelerator here: JAX sees CPUs only, where the kernel does not run. Nothing was timed."
        report(
            "pallas",
            parser,
            args,
            f"{none}\nThe scan stays what runs on every platform (jpfq.matrix.pallas.WINS is empty).",
        )
        return
    rows, says = [], []
    for n in args.inputs:
        more_rows, more = at_size(n, args.out, args, Kernel(args.tile, args.interpret))
        rows, says = rows + more_rows, says + more
    head = ("n", "what", "milliseconds", "products", "codes unlike the plain scan's")
    note = f"{device.device_kind}; O = {args.out}; medians of {args.rounds} rounds; tiles of {args.tile} neurons"
    report("pallas", parser, args, note, table(head, rows), "\n".join(says))


if __name__ == "__main__":
    main()

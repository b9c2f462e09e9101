"""Claim: the recursion q = Q(A - L q) costs at most 3 matrix products n x n by n x O. Run: python bench/recursion.py

Every form of the recursion is timed next to one float32 product at highest precision, turn by turn; a ratio is the
median over rounds of form / product. That the forms give the same codes, but for ties, is checked. Only the recursion
is timed (A and L are made before); `solve_all` is the whole way from weights and Gram to codes.
"""

import argparse
import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from common import report, table, verdict

import jpfq
from jpfq.matrix import GPFQ, Gram, Recipe, Recursion, Rows, follow, solve_all, substitute
from jpfq.matrix.gram import matmul
from jpfq.matrix.substitute import BLOCK

TARGET, AIM = 3.0, 2.0  # of the blocked form, in products


class Form(NamedTuple):
    """One thing to time: a function without arguments, compiled before."""

    name: str
    run: Callable
    compile_s: float


def forms(n: int, out: int, seed: int) -> tuple[Form, list[Form]]:
    """The product and the forms of the recursion, at n inputs and `out` neurons."""
    keys = jax.random.split(jax.random.key(seed), 3)
    mix = jnp.eye(n) + jax.random.normal(keys[0], (n, n)) / n**0.5  # inputs that correlate
    X = jax.nn.relu(jax.random.normal(keys[1], (2 * n, n)) @ mix)
    W = jax.random.normal(keys[2], (n, out)) / n**0.5
    gram, rows, method, grid = Gram.from_data(X), Rows(X[: n // 8]), GPFQ(), jpfq.Integer(4)
    A, L = jax.jit(method)(W, gram)
    recursion = lambda W: Recursion(jpfq.AbsMax()(W, grid), jnp.arange(n), out, jpfq.Nearest())
    levels = recursion(W)._replace(out=None)
    plain = lambda A, L, r, block: substitute(A, L, r._replace(out=out), block=block)
    data = lambda W, rows, r: follow(W, rows, method, r._replace(out=out))
    whole = [("AbsMax", jpfq.AbsMax()), ("MinMSE", jpfq.MinMSE())]
    blocked = {f"blocks of {b}": b for b in sorted({BLOCK, 32, 128})}
    lead = functools.partial(jax.tree.map, lambda x: x[None])

    product = compiled("product", matmul, L, A)
    found = [
        compiled("plain scan", functools.partial(plain, block=None), A, L, levels),
        *(compiled(k, functools.partial(plain, block=b), A, L, levels) for k, b in blocked.items()),
        compiled(f"data form, {n // 8} rows", data, W, rows, levels),
        *(compiled(f"solve_all, {k}", solve_all, lead(W), lead(gram), Recipe(grid, s), None) for k, s in whole),
    ]
    codes = [np.asarray(form.run().codes) for form in found[: 1 + len(blocked)]]
    differ = max(float(np.mean(codes[0] != other)) for other in codes[1:])
    if differ > 0.01:  # a tie decided otherwise in float32 turns some codes after it, in its neuron
        raise SystemExit(f"The forms disagree on {differ:.2%} of the codes at n = {n}.")
    return product, found


def compiled(name, f, *args) -> Form:
    """A function, compiled for its arguments and run once."""
    start = time.perf_counter()
    ready = (f if hasattr(f, "lower") else jax.jit(f)).lower(*args).compile()
    seconds = time.perf_counter() - start
    run = lambda: jax.block_until_ready(ready(*args))
    run()
    return Form(name, run, seconds)


def clock(form: Form, least: float = 0.05) -> float:
    """Seconds of one run, over as many runs as take `least` seconds."""
    start, count = time.perf_counter(), 0
    while not count or time.perf_counter() - start < least:
        form.run()
        count += 1
    return (time.perf_counter() - start) / count


def measure(product: Form, found: list[Form], rounds: int) -> dict[str, tuple[list[float], list[float]]]:
    """Per form its seconds, and its ratios to the mean of the products timed just before and just after it."""
    taken: dict = {form.name: ([], []) for form in [product, *found]}
    for _ in range(rounds):
        before = clock(product)
        for form in found:
            seconds, after = clock(form), clock(product)
            taken[form.name][0].append(seconds)
            taken[form.name][1].append(seconds / ((before + after) / 2))
            taken[product.name][0].append(after)
            before = after
    mean = np.median(taken[product.name][0])
    taken[product.name][1].extend(seconds / mean for seconds in taken[product.name][0])
    return taken


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, nargs="+", default=[1024, 4096], help="n, one or more")
    parser.add_argument("--out", type=int, default=1024, help="neurons")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    lines, verdicts = [], []
    for n in args.inputs:
        product, found = forms(n, args.out, args.seed)
        taken = measure(product, found, args.rounds)
        for form in [product, *found]:
            seconds, ratios = taken[form.name]
            spread = (f"{f(ratios):.2f}" for f in (np.median, np.min, np.max))
            lines.append((str(n), form.name, f"{np.median(seconds):.4f}", *spread, f"{form.compile_s:.2f}"))
        ratio = np.median(taken[f"blocks of {BLOCK}"][1])
        aim = "reached" if ratio <= AIM else "missed"
        claim = f"n = {n}, O = {args.out}: blocked (default, {BLOCK}) at most {TARGET} products: {ratio:.2f}"
        verdicts.append(verdict(ratio <= TARGET, f"{claim} (aim {AIM}: {aim})"))
    head = ("n", "what", "seconds", "products", "least", "most", "compile s")
    note = f"O = {args.out}; medians of {args.rounds} rounds; products: time over one float32 product beside it"
    report("recursion", parser, args, note, table(head, lines), "\n".join(verdicts))


if __name__ == "__main__":
    main()

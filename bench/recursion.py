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
from jpfq.matrix import GPFQ, Gram, Recursion, Rows, follow, recipe_of, solve_all, substitute
from jpfq.matrix.arrays import matmul
from jpfq.matrix.recursion import BLOCK

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
    system = jax.jit(method)(W, gram)
    fed = system.base, system.L, system.about
    levels = jpfq.scale.AbsMax()(W, grid)
    recursion = lambda levels: Recursion(levels, jnp.arange(n), out, jpfq.rounding.Nearest())
    plain = lambda base, L, about, levels, block: substitute(base, L, recursion(levels), block=block, about=about)
    data = lambda W, rows, levels: follow(W, rows, method, recursion(levels))
    whole = [("AbsMax", jpfq.scale.AbsMax()), ("MinMSE", jpfq.scale.MinMSE())]
    bare = {"method": method, "order": jpfq.order.Natural(), "finish": None, "shrinkage": None}
    recipe = lambda scale: recipe_of(None, grid, scale=scale, **bare)
    blocked = {f"blocks of {b}": b for b in sorted({BLOCK, 32, 128})}
    lead = functools.partial(jax.tree.map, lambda x: x[None])

    product = compiled("product", matmul, gram.H, W)
    found = [
        compiled("plain scan", functools.partial(plain, block=None), *fed, levels),
        *(compiled(k, functools.partial(plain, block=b), *fed, levels) for k, b in blocked.items()),
        compiled(f"data form, {n // 8} rows", data, W, rows, levels),
        *(compiled(f"solve_all, {k}", solve_all, lead(W), lead(gram), recipe(s), None) for k, s in whole),
    ]
    codes = [np.asarray(form.run().codes) for form in found[: 1 + len(blocked)]]
    differ = max(float(np.mean(codes[0] != other)) for other in codes[1:])
    if differ > 0.01:  # a tie decided otherwise in float32 turns some codes after it, in its neuron
        raise SystemExit(f"The forms disagree on {differ:.2%} of the codes at n = {n}.")
    return product, found


def methods(n: int, out: int, seed: int) -> tuple[Form, list[Form]]:
    """The product, and the recursion of every method, rounding and finisher; the first is GPFQ's."""
    keys = jax.random.split(jax.random.key(seed), 4)
    X = jax.nn.relu(jax.random.normal(keys[0], (2 * n, n)) + jax.random.normal(keys[1], (2 * n, 1)))
    Xq = X + 0.05 * jax.random.normal(keys[2], X.shape)
    W, gram = jax.random.normal(keys[3], (n, out)) / n**0.5, Gram.from_data(X, Xq)
    levels, order, key = jpfq.scale.AbsMax()(W, jpfq.Integer(4)), jnp.arange(n), jax.random.key(0)

    def run(rounding, draws=None):
        f = lambda base, L, about, levels: substitute(
            base, L, Recursion(levels, order, out, rounding, draws), about=about
        )
        return jax.jit(f)

    nearest = run(jpfq.rounding.Nearest())
    parts = {"GPFQ": GPFQ(), "UNI": jpfq.UNI(2.0), "OPTQ": jpfq.OPTQ(), "QEP": jpfq.QEP(), "Qronos": jpfq.Qronos()}
    parts |= {"Qronos, exact": jpfq.Qronos(exact=True), "GPTAQ": jpfq.GPTAQ()}
    systems = {name: jax.jit(method)(W, gram) for name, method in parts.items()}
    fed = {name: (s.base, s.L, jnp.zeros_like(s.base) if s.about is None else s.about) for name, s in systems.items()}
    found = [compiled(name, nearest, *args, levels) for name, args in fed.items()]
    found.append(compiled("GPFQ, soft threshold", run(jpfq.rounding.SoftThreshold(0.01)), *fed["GPFQ"], levels))
    found.append(compiled("GPFQ, stochastic", run(jpfq.rounding.Stochastic(), key), *fed["GPFQ"], levels))
    codes = nearest(*fed["GPFQ"], levels).codes
    for passes in (jpfq.finish.Descend, jpfq.finish.CosineDescend):
        both = [jax.jit(functools.partial(_finish, passes(k), out)) for k in (1, 5)]
        found.extend(
            compiled(f"{passes.__name__}, {k} passes", f, W, gram, codes, levels) for k, f in zip((1, 5), both)
        )
    return compiled("product", matmul, gram.H, W), found


def _finish(finish, out, W, gram, codes, levels):
    return finish(W, gram, codes, Recursion(levels, jnp.arange(W.shape[0]), out, jpfq.rounding.Nearest()), BLOCK)[0]


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
    product, found = methods(1024, args.out, args.seed)
    taken = measure(product, found, args.rounds)
    base = np.median(taken["GPFQ"][1])
    others = {form.name: np.median(taken[form.name][1]) for form in found}
    rows = [(name, f"{ratio:.2f}", f"{ratio / base:.2f}") for name, ratio in others.items()]
    every = table(("recursion of, n = 1024", "products", "of GPFQ's"), rows)
    worst = max(others[name] for name in ("UNI", "OPTQ", "QEP", "Qronos", "Qronos, exact", "GPTAQ")) / base
    verdicts.append(verdict(worst <= 1.1, f"every method's recursion costs what GPFQ's does, to 10 %: {worst:.2f}"))
    for name in ("Descend", "CosineDescend"):
        one = (others[f"{name}, 5 passes"] - others[f"{name}, 1 passes"]) / 4
        verdicts.append(
            verdict(one <= 2 * base + 1, f"a pass of {name} costs about a recursion and a product: {one:.2f}")
        )
    head = ("n", "what", "seconds", "products", "least", "most", "compile s")
    note = f"O = {args.out}; medians of {args.rounds} rounds; products: time over one float32 product beside it"
    report("recursion", parser, args, note, table(head, lines), every, "\n".join(verdicts))


if __name__ == "__main__":
    main()

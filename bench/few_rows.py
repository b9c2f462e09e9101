"""Claim: with few rows too, the error of the recommended settings on new rows is at most 1.1 times that of rounding.

One layer. Inputs are correlated (eigenvalues of their covariance fall as 1 / i), independent, or rectified units of a
layer before, some of which are on in few rows or none; the quantized network's are the same with noise of `drift` standard
deviations. `asleep`: a fifth of the inputs is 0 on all calibration rows, and not on new ones. Plain rounding is MSQ with the
steps of MinMSE. Shown is the error on new rows over that of plain rounding on the same rows, means over seeds; the worst
over kinds of inputs, drift and bits is shown. The published methods alone (no shrinkage, steps of MinMSE, no finish) are
there to compare: they have no defence against few rows, and nothing is claimed for them.

Run: python bench/few_rows.py
"""

import argparse
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from common import report, table, verdict

import jpfq

ALONE = {"scale": jpfq.scale.MinMSE(), "shrinkage": None, "finish": None}
PLAIN = ALONE | {"method": jpfq.MSQ()}
METHODS = {
    "best": {},
    "GPFQ": {"method": jpfq.GPFQ()},
    "OPTQ": {"method": jpfq.OPTQ()},
    "Qronos": {"method": jpfq.Qronos()},
    "GPFQ alone": {"method": jpfq.GPFQ()} | ALONE,
    "OPTQ alone": {"method": jpfq.OPTQ()} | ALONE,
    "Qronos alone": {"method": jpfq.Qronos()} | ALONE,
}
OURS = ("best", "GPFQ", "OPTQ", "Qronos")
KINDS = ("correlated", "independent", "rectified")
DRIFTS = (0.0, 0.02, 0.3)
BITS = (2, 3, 4, 8)
NEW = 512  # rows
MOST = 1.1


def layer(seed: int, n: int, out: int, kind: str, drift: float, rows: int):
    """Weights, and inputs of both networks: `rows` to calibrate on, then new ones."""
    rng = np.random.default_rng(seed)
    Z = rng.standard_normal((rows + NEW, n))
    if kind == "correlated":
        turn = np.linalg.qr(rng.standard_normal((n, n)))[0]
        Z = (Z / np.sqrt(np.arange(1, n + 1))) @ turn.T
    if kind == "rectified":
        z, A, B = rng.standard_normal((rows + NEW, n // 4)), *rng.standard_normal((2, n // 4, n)) / (n // 4) ** 0.5
        bias = rng.standard_normal(n) - 1.5
        Z, Zq = (np.maximum(z @ M + bias, 0) for M in (A, A + drift * B))
        return rng.standard_normal((n, out)) / n**0.5, Z, Zq
    Zq = Z + drift * Z.std(0) * rng.standard_normal(Z.shape)
    return rng.standard_normal((n, out)) / n**0.5, Z, Zq


@functools.cache
def problems(n: int, out: int, kind: str, drift: float, rows: int, asleep: bool, seeds: int):
    """For each seed (leading axis): weights, Gram, and new rows of both networks."""
    Ws, Zs, Zqs = (np.stack(x) for x in zip(*(layer(s, n, out, kind, drift, rows) for s in range(seeds)), strict=True))
    X, Xq = Zs[:, :rows].copy(), Zqs[:, :rows].copy()
    if asleep:
        X[..., ::5] = Xq[..., ::5] = 0
    W, X, Xq, newX, newXq = (jnp.asarray(x, jnp.float32) for x in (Ws, X, Xq, Zs[:, rows:], Zqs[:, rows:]))
    gram = jax.vmap(jpfq.Gram.from_data)(X, Xq) if drift else jax.vmap(jpfq.Gram.from_data)(X)
    return W, gram, newX, newXq


@functools.partial(jax.jit, static_argnames="name")
def errors(W, gram, X, Xq, bits, name):
    """The error on new rows, by seed."""
    settings = PLAIN if name == "plain" else METHODS[name]

    def one(W, gram, X, Xq):
        q = jpfq.solve(W, gram, bits=bits, **settings)[0].dequantize()
        exact = jnp.matmul(X, W, precision="highest")
        return jnp.linalg.norm(exact - jnp.matmul(Xq, q, precision="highest")) / jnp.linalg.norm(exact)

    return jax.vmap(one)(W, gram, X, Xq)


def ratio(name: str, bits: int, problem) -> float:
    """The mean error over that of plain rounding."""
    bits = jnp.float32(bits)
    return float(errors(*problem, bits, name).mean() / errors(*problem, bits, "plain").mean())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=64, help="inputs")
    parser.add_argument("--out", type=int, default=8, help="neurons")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    args = parser.parse_args()
    n = args.n
    rows = sorted({1, 2, 4, n // 4, n // 2, n, 2 * n, 4 * n})
    worst: dict = {}
    for m, kind, drift, asleep in itertools.product(rows, KINDS, DRIFTS, (False, True)):
        problem = problems(n, args.out, kind, drift, m, asleep, args.seeds)
        for name, bits in itertools.product(args.methods, BITS):
            found = ratio(name, bits, problem), f"{m} rows, {kind}, drift {drift:g}, {bits} bits"
            for key in ((name, m, asleep), (name, bits, "bits"), (name, drift, "drift"), (name, asleep, "all")):
                worst[key] = max(worst.get(key, (0.0, "")), found)
        problems.cache_clear()
    row = lambda label, key: [str(label), *(f"{worst[name, *key][0]:.3f}" for name in args.methods)]
    by = lambda title, keys: table([title, *args.methods], [row(*pair) for pair in keys])
    parts = [
        by(f"rows (n = {n})", [(f"{m:,}", (m, False)) for m in rows]),
        by("rows, asleep", [(f"{m:,}", (m, True)) for m in rows]),
        by("bits", [(b, (b, "bits")) for b in BITS]),
        by("drift", [(d, (d, "drift")) for d in DRIFTS]),
    ]
    over = lambda name: max(worst[name, False, "all"], worst[name, True, "all"])
    claim = lambda name: (
        f"{name}: {MOST} times plain rounding at most, on new rows: {over(name)[0]:.3f} ({over(name)[1]})"
    )
    lines = [verdict(over(name)[0] <= MOST, claim(name)) for name in OURS if name in args.methods]
    report("few_rows", parser, args, *parts, "\n".join(lines))


if __name__ == "__main__":
    main()

"""Noise-shaping quantizers: errors against measurements and bits, the papers' tables, recall, and time.

Kernel error against m by order; kernel error against stored bits; a linear SVM on digits as in the paper on random Fourier
features; relative errors of distances as in the paper on binary embeddings; nearest neighbours of Fashion-MNIST images;
seconds against measurements and rows.
"""

import argparse
import itertools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from common import HERE, add_data, needed, report, table, verdict

import jpfq
from jpfq.embed import FJLT, Beta, Memoryless, Quantizer, SigmaDelta

COLORS = ("#1f5fa8", "#b0562f", "#2a7d46", "#7a4fa3", "0.35", "#c2942b")


def rms(x) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def distances(X, Y):
    """|x - y|_2 of all pairs, in float64."""
    X, Y = np.asarray(X, np.float64), np.asarray(Y, np.float64)
    square = (X**2).sum(1)[:, None] + (Y**2).sum(1) - 2 * X @ Y.T
    return np.sqrt(np.maximum(square, 0))


# The kernel

INPUTS, GAMMA = 5, 0.1


def pairs(seed: int, count: int = 60) -> tuple[jax.Array, np.ndarray, np.ndarray]:
    """Vectors, the kernel exp(-gamma |x - y|^2) of all pairs, and which pairs are of two vectors."""
    X = np.random.default_rng(seed).standard_normal((count, INPUTS)).astype(np.float32)
    return jnp.asarray(X), np.exp(-GAMMA * distances(X, X) ** 2), ~np.eye(count, dtype=bool)


class Errors(NamedTuple):
    """RMS errors of the kernel over pairs and draws, and what a vector takes."""

    whole: float
    added: float  # by quantization
    bits: float
    entropy: float  # what an ideal entropy coder would take, with one table for all numbers


def entropy(numbers) -> float:
    share = np.unique(np.asarray(numbers), return_counts=True)[1] / numbers.size
    return float(-np.sum(share * np.log2(share)))


def kernel_errors(quantizer: Quantizer, m: int, draws: int) -> Errors:
    """Errors of the kernel with m features."""
    whole, part, bits, coded = [], [], 0.0, []
    for seed in range(draws):
        first, *keys = jax.random.split(jax.random.key(seed), 3)
        features = jpfq.RandomFourierFeatures.sample(first, INPUTS, m, GAMMA, quantizer)
        X, exact, off = pairs(seed)
        # Two sides, each with its own draws, as between what is stored and a query.
        codes = [features.transform(X, key)[0] for key in keys]
        a, b = (features.load(features.store(x)) for x in codes)
        numbers = quantizer.to_store(codes[0])
        coded.append(entropy(numbers) * numbers.shape[-1])
        f = features.features(X)
        other = f if quantizer == Memoryless.semi_quantized() else b
        found, unquantized = np.asarray(features.kernel(a, other)), np.asarray(features.kernel(f, f))
        whole.append(rms((found - exact)[off]))
        part.append(rms((found - unquantized)[off]))
        bits = features.bits_per_vector
    return Errors(rms(whole), rms(part), bits, float(np.mean(coded)))


def against_m(draws: int):
    """The error that quantization adds, at p condensed features of `width` codes each, by order; slopes in width."""
    p, widths = 64, np.array([13, 25, 49, 97, 193])
    makers: dict[str, Callable[[int], Quantizer]] = {
        "order 1, one bit": lambda w: SigmaDelta(1, w),
        "order 2, one bit": lambda w: SigmaDelta(2, w),
        "order 3, one bit": lambda w: SigmaDelta(3, w),
        "order 1, K = 4": lambda w: SigmaDelta(1, w, K=4),
        "order 2, K = 4": lambda w: SigmaDelta(2, w, K=4),
    }
    curves = {
        name: [kernel_errors(make(int(w)), int(w) * p, draws).added for w in widths] for name, make in makers.items()
    }
    betas = np.array([3, 6, 9, 12])
    curves["beta = 1.9, one bit"] = [kernel_errors(Beta(1.9, int(w)), int(w) * p, draws).added for w in betas]
    rows, slopes = [], {}
    for name, errors in curves.items():
        x, last = (betas, "error / code") if name.startswith("beta") else (widths, "slope")
        along = x if last == "error / code" else np.log(x)
        slopes[name] = float(np.polyfit(along, np.log(errors), 1)[0])
        shown = f"{slopes[name]:.2f}" if last == "slope" else f"factor {np.exp(slopes[name]):.2f} a code"
        rows.append((name, *(f"{e:.5f}" for e in errors), *("",) * (len(widths) - len(errors)), shown))
    head = ("quantization's part", *(f"m={w * p}" for w in widths), "slope in m")
    note = f"p = {p} condensed features, d = {INPUTS}, gamma = {GAMMA}; RMS over pairs and {draws} draws"
    note += f"; beta at m = {', '.join(str(w * p) for w in betas)}"
    return f"{note}\n{table(head, rows)}", (p, widths, betas, curves), slopes


def against_bits(draws: int):
    """The whole error of the kernel and the bits of a stored vector."""
    makers: dict[str, tuple[Callable[[], Quantizer], tuple[int, ...]]] = {
        "sign, other side real": (Memoryless.semi_quantized, (256, 512, 1024, 2048, 4096)),
        "StocQ, K = 1": (Memoryless.stochastic, (256, 512, 1024, 2048, 4096)),
        "StocQ, K = 2": (lambda: Memoryless.stochastic(2), (128, 256, 512, 1024, 2048)),
        "order 1, width 15, K = 1": (lambda: SigmaDelta(1, 15), (64, 128, 256, 512, 1024)),
        "order 2, width 29, K = 1": (lambda: SigmaDelta(2, 29), (43, 85, 170, 340)),
        "beta 1.9, width 12, K = 1": (lambda: Beta(1.9, 12), (21, 43, 85, 171, 342)),
    }
    rows, curves = [], {}
    for name, (make, ps) in makers.items():
        quantizer = make()
        curves[name] = [kernel_errors(quantizer, p * quantizer.width, draws) for p in ps]
        rows.append((name, *(f"{e.bits:.0f}: {e.whole:.4f}" for e in curves[name])))
        rows.append(("  entropy coded", *(f"{e.entropy:.0f}" for e in curves[name])))
    return table(("bits: RMS error of the kernel", *("",) * 5), rows), curves


def at_bits(points: list[Errors], bits: float, coded: bool) -> float:
    """The error at so many bits, between the points on a logarithmic scale."""
    x = [e.entropy if coded else e.bits for e in points]
    return float(np.exp(np.interp(np.log(bits), np.log(x), np.log([e.whole for e in points]))))


# Digits

PAPER = {  # accuracies at m = 240 and 8208: Zhang, Kannan, Cloninger, Saab
    "RFF": (0.9807, 0.9909),
    "sign": (0.9711, 0.9902),
    "StocQ": (0.9806, 0.9909),
    "order 1": (0.9709, 0.9904),
    "order 2": (0.9554, 0.9900),
    "beta": (0.9750, 0.9908),
}


def digits(draws: tuple[int, int]):
    """A linear SVM on features of digits / 16, a fifth for the test; gamma = .1105 is 1 / (64 var(X))."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    from sklearn.svm import SVC

    X, y = load_digits(return_X_y=True)
    X, test, y, expected = train_test_split(X / 16, y, test_size=0.2, random_state=0)
    exact = SVC(gamma=0.1105).fit(X, y).score(test, expected)
    X, test = (jnp.asarray(x, jnp.float32) for x in (X, test))

    schemes: dict[str, Quantizer] = {
        "RFF": Memoryless(),
        "sign": Memoryless.semi_quantized(),
        "StocQ": Memoryless.stochastic(2),
        "order 1": SigmaDelta(1, 2, K=2),
        "order 2": SigmaDelta.published(2, 3, K=2),
        "order 2, stable step": SigmaDelta(2, 3, K=2),
        "beta": Beta(1.1, 2, K=2),
    }

    def accuracy(name, m, seed):
        first, *keys = jax.random.split(jax.random.key(seed), 3)
        some = jpfq.RandomFourierFeatures.sample(first, 64, m, 0.1105, schemes[name])
        codes = lambda X, key: np.asarray(some.condense(some.transform(X, key)[0]))
        learned = np.asarray(some.features(X)) if name in ("RFF", "sign") else codes(X, keys[0])
        tried = np.asarray(some.features(test)) if name == "RFF" else codes(test, keys[1])
        return SVC(kernel="linear").fit(learned, y).score(tried, expected)

    rows, apart = [], {}
    for name in schemes:
        found = [np.mean([accuracy(name, m, s) for s in range(n)]) for m, n in zip((240, 8208), draws)]
        paper = PAPER.get(name)
        shown = [f"{x:.4f} ({paper[i]:.4f})" if paper else f"{x:.4f}" for i, x in enumerate(found)]
        rows.append((name, *shown))
        if paper:
            apart[name] = max(abs(a - b) for a, b in zip(found, paper))
    note = f"kernel SVM: {exact:.4f} (the paper: .9917); {draws[0]} and {draws[1]} draws of features; in brackets the paper"
    return f"{note}\n{table(('linear SVM on digits', 'm = 240', 'm = 8208'), rows)}", max(apart.values()), exact


# Distances

CHECKED = {  # algorithms of the specification, p = 64: m -> mean relative error quantized, unquantized
    1: {512: (0.0898, 0.0721), 2048: (0.0773, 0.0758), 8192: (0.0783, 0.0775)},
    2: {576: (0.1042, 0.0700), 2112: (0.0801, 0.0788), 8256: (0.0763, 0.0763)},
}


def preserved(images: np.ndarray, draws: int):
    """Mean relative errors of distances at p = 64, on Gaussian vectors and on images; step and scale of the paper."""
    sets = {"Gaussian": np.random.default_rng(0).standard_normal((200, 784)), "Fashion-MNIST": images[:200]}
    rows, curves, worst = [], {}, 0.0
    for which, X in sets.items():
        exact = distances(X, X)
        off, X32 = ~np.eye(len(X), dtype=bool), jnp.asarray(X, jnp.float32)
        for order, figures in CHECKED.items():
            for m, figure in figures.items():
                errors = []
                for seed in range(draws):
                    map = FJLT.sample(jax.random.key(seed), 784, m, 0.05)
                    scale = 1.5 * float(np.linalg.norm(X, axis=1).max())
                    some = jpfq.BinaryEmbedding(map, SigmaDelta.published(order, m // 64), scale)
                    codes, stability = some.transform(X32)
                    each = [np.asarray(some.distance(v, v)) for v in (some.condense(codes), some.features(X32))]
                    relative = [np.abs(d[off] / exact[off] - 1).mean() for d in each]
                    errors.append((*relative, float(stability.stable.mean())))
                quantized, unquantized, stable = np.mean(errors, 0)
                curves.setdefault((which, order), []).append((m, quantized, unquantized))
                rows.append(
                    (which, str(order), str(m), f"{quantized:.4f}", f"{unquantized:.4f}", f"{stable:.0%}")
                    + ((f"{figure[0]:.4f}", f"{figure[1]:.4f}") if which == "Gaussian" else ("", ""))
                )
                if which == "Gaussian":
                    worst = max(worst, abs(quantized / figure[0] - 1))
    head = ("vectors", "order", "m", "one bit", "unquantized", "|v| <= 1", "checked", "unquantized")
    return table(head, rows), curves, worst


def recall(images: np.ndarray, draws: int):
    """The share of the 10 nearest images that are among the 10 found, against bits per vector."""
    base, queries = images[200:], images[:200]
    mean = base.mean(0)  # distances do not see it, signs do
    base, queries = base - mean, queries - mean
    true = np.argsort(distances(queries, base), axis=1)[:, :10]
    scale = 1.5 * float(np.linalg.norm(base, axis=1).max())
    B, Q = (jnp.asarray(x, jnp.float32) for x in (base, queries))
    schemes = {
        "plain signs": (lambda: Memoryless(), (256, 512, 1024, 2048, 4096)),
        "order 1, width 16": (lambda: SigmaDelta(1, 16), (64, 128, 256, 512, 1024)),
        "order 1, width 64": (lambda: SigmaDelta(1, 64), (43, 85, 170, 340)),
        "order 2, width 15": (lambda: SigmaDelta(2, 15), (43, 85, 170, 340, 680)),
        "order 2, width 33": (lambda: SigmaDelta(2, 33), (32, 64, 128, 256, 512)),
    }
    rows, curves = [], {}
    for name, (make, ps) in schemes.items():
        quantizer = make()
        for p in ps:
            found, bits = [], 0.0
            for seed in range(draws):
                map = FJLT.sample(jax.random.key(seed), 784, p * quantizer.width, 0.03)
                some = jpfq.BinaryEmbedding(map, quantizer, scale)
                b, q = (some.load(jnp.concatenate([s for s, _ in some.stream(chunks(x))])) for x in (B, Q))
                near = np.argsort(np.asarray(some.distance(q, b)), axis=1, kind="stable")[:, :10]
                found.append(np.mean([len(set(x) & set(y)) / 10 for x, y in zip(near, true)]))
                bits = some.bits_per_vector
            curves.setdefault(name, []).append((bits, np.mean(found)))
        rows.append((name, *(f"{bits:.0f}: {share:.3f}" for bits, share in curves[name]), *("",) * (5 - len(ps))))
    return table(("bits: recall of 10 in 10", *("",) * 5), rows), curves


def chunks(X, rows: int = 200):
    return [X[i : i + rows] for i in range(0, len(X), rows)]


# Cost


class Run(NamedTuple):
    name: str
    m: int
    rows: int
    call: Callable[[], object]


def cost(rounds: int):
    """Processor seconds of all threads against m and rows, at the sizes of the papers; rows in chunks of 256.

    Not seconds on the clock, which on a machine that others use measure how long threads wait for each other.
    """
    runs = []
    for name, quantizer in (
        ("order 1", SigmaDelta(1, 15)),
        ("order 2", SigmaDelta(2, 15, K=4)),
        ("order 3", SigmaDelta(3, 16)),
        ("beta", Beta(1.9, 12)),
    ):
        for p, rows in ((128, 256), (256, 256), (512, 256), (1024, 256), (128, 512), (128, 1024)):
            Y = jnp.sin(jax.random.normal(jax.random.key(0), (rows, p * quantizer.width)))
            call = lambda q=quantizer, Y=Y: [q(chunk)[0] for chunk in chunks(Y, 256)]
            runs.append(Run(name, p * quantizer.width, rows, call))
    X = jax.random.normal(jax.random.key(1), (1024, 784))
    for m, rows in ((2048, 256), (4096, 256), (8192, 256), (16384, 256), (2048, 512), (2048, 1024)):
        some = jpfq.BinaryEmbedding(FJLT.sample(jax.random.key(2), 784, m, 0.03), SigmaDelta(1, 16), 60.0)
        call = lambda some=some, X=X[:rows]: [s for s, _ in some.stream(chunks(X, 256))]
        runs.append(Run("FJLT, order 1, stored", m, rows, call))
    for run in runs:
        jax.block_until_ready(run.call())
    seconds = {run: [] for run in runs}
    for _ in range(rounds):
        for run in runs:
            start, count = time.process_time(), 0
            while not count or time.process_time() - start < 0.05:
                jax.block_until_ready(run.call())
                count += 1
            seconds[run].append((time.process_time() - start) / count)
    rows, worst = [], {"4 m": 0.0, "8 m": 0.0, "4 rows": 0.0}
    for name in dict.fromkeys(run.name for run in runs):
        base, *others = [(run, min(seconds[run])) for run in runs if run.name == name]
        ratios = [f"{t / base[1]:.2f}" for _, t in others]
        rows.append((name, f"{base[0].m} x {base[0].rows}", f"{1000 * base[1]:.2f}", *ratios))
        for what, (_, t) in zip(worst, (others[1], others[2], others[4]), strict=True):
            worst[what] = max(worst[what], t / base[1])
    head = ("seconds", "m x rows", "ms", "2 m", "4 m", "8 m", "2 rows", "4 rows")
    return f"processor time, least of {rounds} rounds, then as multiples of the first\n{table(head, rows)}", worst


# Plots


def save_plot(name: str, panels: list[Callable]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axis, draw in zip(figure.subplots(1, len(panels)), panels, strict=True):
        draw(axis)
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(HERE / "results" / f"features_{name}.png", dpi=110)


def plot_kernel(found, by_bits) -> None:
    p, widths, betas, curves = found

    def by_m(axis):
        for (name, errors), color in zip(curves.items(), COLORS):
            x = betas if name.startswith("beta") else widths
            axis.loglog(p * x, errors, "o--" if "K = 4" in name else "o-", label=name, color=color, markersize=4)
        axis.set_xscale("log", base=2)
        axis.set(title=f"what quantization adds, p = {p}", xlabel="m", ylabel="RMS error of the kernel")

    def bits(axis):
        for (name, points), color in zip(by_bits.items(), COLORS):
            axis.loglog(*zip(*((e.bits, e.whole) for e in points)), "o-", label=name, color=color, markersize=4)
            axis.loglog(*zip(*((e.entropy, e.whole) for e in points)), ":", color=color)
        axis.set_xscale("log", base=2)
        axis.set(title="the whole error (dotted: entropy coded)", xlabel="bits per stored vector", ylabel="RMS error")

    save_plot("kernel", [by_m, bits])


def plot_binary(by_m, by_bits) -> None:
    def relative(axis):
        for ((which, order), points), color in zip(by_m.items(), COLORS):
            m, quantized, unquantized = zip(*points)
            axis.semilogx(m, quantized, "o-", base=2, label=f"{which}, order {order}", color=color, markersize=4)
            axis.semilogx(m, unquantized, ":", base=2, color=color)
        axis.set(
            title="distances, p = 64 (dotted: unquantized)", xlabel="m", ylabel="mean relative error", ylim=(0, 0.4)
        )

    def recalls(axis):
        for (name, points), color in zip(by_bits.items(), COLORS):
            axis.semilogx(*zip(*points), "o-", base=2, label=name, color=color, markersize=4)
        axis.set(title="Fashion-MNIST, 10 nearest of 1,800", xlabel="bits per stored vector", ylabel="recall")

    save_plot("binary", [relative, recalls])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    add_data(parser)
    parser.add_argument("--draws", type=int, default=8, help="of the random maps, for errors")
    parser.add_argument("--digits", type=int, nargs=2, default=[20, 3], help="draws at m = 240 and at m = 8208")
    parser.add_argument("--rounds", type=int, default=7, help="of timing")
    args = parser.parse_args()
    images = np.load(needed(args.data, "fashion_mnist.npz"))["x_test"].reshape(2000, -1) / 255.0

    timed, worst = cost(args.rounds)
    by_m, found, slopes = against_m(args.draws)
    by_bits, bit_curves = against_bits(args.draws)
    svm, apart, exact = digits(tuple(args.digits))
    kept, distance_curves, off = preserved(images, max(1, args.draws // 2))
    nearest, recall_curves = recall(images, max(1, args.draws // 2))
    if all(getattr(args, k) == parser.get_default(k) for k in ("draws", "digits", "rounds")):
        plot_kernel(found, bit_curves)
        plot_binary(distance_curves, recall_curves)

    one_bit = [slopes[f"order {r}, one bit"] for r in (1, 2, 3)]
    stored = {name: points for name, points in bit_curves.items() if not name.startswith("sign")}  # both sides are
    at, coded = ({name: at_bits(points, 1024, c) for name, points in stored.items()} for c in (False, True))
    least = lambda found: "; ".join(f"{name} {error:.4f}" for name, error in sorted(found.items(), key=lambda x: x[1]))
    share = lambda name: float(np.interp(np.log(1024), *zip(*[(np.log(b), s) for b, s in recall_curves[name]])))
    shares = {name: share(name) for name in recall_curves}
    signs = shares.pop("plain signs")
    top = max(shares, key=lambda name: shares[name])
    verdicts = [
        verdict(
            all(a - b > 0.5 for a, b in itertools.pairwise(one_bit)) and one_bit[0] < -0.4,
            f"what quantization adds falls faster with m the higher the order: slopes {one_bit[0]:.2f}, {one_bit[1]:.2f}, "
            f"{one_bit[2]:.2f} for one bit",
        ),
        *(
            verdict(
                not min(found, key=lambda name: found[name]).startswith("StocQ"),
                f"condensed codes err less than StocQ at 1,024 bits {how}: {least(found)}",
            )
            for how, found in (("as stored", at), ("entropy coded", coded))
        ),
        verdict(apart <= 0.01, f"accuracies on digits within .01 of the paper's: {apart:.4f} apart, exact {exact:.4f}"),
        verdict(off <= 0.2, f"errors of distances within 20 % of the checked figures (Gaussian vectors): {off:.1%}"),
        verdict(
            shares[top] > signs, f"recall at 1,024 bits above plain signs' {signs:.3f}: {shares[top]:.3f} by {top}"
        ),
        verdict(worst["4 m"] <= 4.8, f"four times the measurements, at most 4.8 times the time: {worst['4 m']:.2f}"),
        verdict(worst["8 m"] <= 9.6, f"eight times the measurements, at most 9.6 times the time: {worst['8 m']:.2f}"),
        verdict(worst["4 rows"] <= 4.8, f"four times the rows, at most 4.8 times the time: {worst['4 rows']:.2f}"),
    ]
    report("features", parser, args, by_m, by_bits, svm, kept, nearest, timed, "\n".join(verdicts))


if __name__ == "__main__":
    main()

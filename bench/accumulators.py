"""Claim: integer sums fit few bits at little loss, which is not so for networks that were not quantized for it.

Run: python bench/accumulators.py

Weights of 4 bits (narrow) and activations of 8 (unsigned, with a zero point), all kernels that can be quantized. Sums run
over all inputs of a neuron (one stage) or over tiles of 64 or 128, and must fit a signed accumulator of P bits whatever the
inputs:

EP-init       weights projected on the l1 ball of the accumulator and rounded towards zero
fewer bits    `jpfq.best`, at the widths of weights and activations whose products fit, kernel by kernel
AXE-..        GPFQ, OPTQ and Qronos with AXE, steps of least square error of the weights
scale-aware   `jpfq.Rule(bits=4, activation_bits=8, accumulator=..)`; A6, A5, A4: with activations of
              as many bits, which takes fewer bits of a sum and leaves more to the weights

Where all products of such codes fit, every P is the same: those runs are made once. Then both networks, the scale-aware one
and the one without accumulator in mind, are run in integers with accumulators that wrap, and the time of the recursion with
AXE is compared with that of nearest rounding.
"""

import argparse
import functools
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import matplotlib
import models
import numpy as np
from common import HERE, add_data, report, table, verdict

import jpfq
from jpfq.matrix import Recursion, substitute
from jpfq.scalar import ScaledGrid, datatype_bits

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GRID, INPUTS = jpfq.Integer(4, narrow=True), jpfq.Asymmetric(8)
TILES = {"one stage": None, "T = 64": 64, "T = 128": 128}
WIDE = 32
LEAST = 1e-3  # of what is lost, in the plot
PLAIN = {"scale": jpfq.scale.MinMSE(), "order": jpfq.order.Descending(), "finish": None, "shrinkage": None}
AXE = {"AXE-GPFQ": jpfq.GPFQ(), "AXE-OPTQ": jpfq.OPTQ(), "AXE-Qronos": jpfq.Qronos()}
BASELINES = ("EP-init", "fewer bits")
OURS = {"scale-aware": 8, "scale-aware, A6": 6, "scale-aware, A5": 5, "scale-aware, A4": 4}  # bits of activations
METHODS = (*BASELINES, *AXE, *OURS)
MODELS = {"resnet20": models.resnet20, "stories": models.stories}


def rules(method: str, P: int, tile: int | None, sizes: dict[str, int]) -> list[jpfq.Rule]:
    """The result of a method with an accumulator."""
    if method == "EP-init":
        return jpfq.paper.ep_init(4, 8, P, tile)
    if method == "fewer bits":
        return jpfq.paper.fewer_bits(sizes, P, tile)
    how = PLAIN | {"method": AXE[method]} if method in AXE else {}
    wide = OURS.get(method, 8)
    return [jpfq.Rule(".*", grid=GRID, activation_bits=wide, accumulator=jpfq.Accumulator(P, tile), **how)]


class Scored:
    """A model, and its score once quantized; the network in float, with inputs rounded, is compiled once."""

    def __init__(self, name: str, args: argparse.Namespace):
        tests = {"resnet20": args.tests, "stories": args.texts}
        self.name, self.s = name, MODELS[name](args, tests[name])
        plan = jpfq.plan(self.s.model, self.s.batches[0], 4, variables=self.s.variables)
        self.sizes = {line.path: line.dims[1] for line in plan.lines}
        self.run = None

    def quantize(self, rules) -> jpfq.Quantized:
        return jpfq.quantize(self.s.model, self.s.batches, rules, variables=self.s.variables, progress=False)

    def __call__(self, quantized: jpfq.Quantized) -> float:
        self.run = self.run or quantized._run  # of the first: weights and grids of inputs are arguments
        return self.s.score(lambda batch: self.run(quantized._functional.leaves, quantized.inputs, batch))

    def needed(self, tile: int | None) -> int:
        """P*: where the widest kernel fits whatever its codes."""
        return max(datatype_bits(min(n, tile or n), GRID, INPUTS) for n in self.sizes.values())


def losses(subject: Scored, args: argparse.Namespace) -> dict[tuple[str, str, int], float]:
    """By method, tile and P: what is lost against the float model."""
    found: dict = {}
    s = subject.s
    for tile in args.tiles:
        T = TILES[tile]
        jax.clear_caches()  # of hundreds of programs, which would exhaust the memory maps of a process
        for P, method in ((P, m) for P in args.bits for m in args.methods):
            free = subject.needed(T) <= P
            known = next((v for (m, _, p), v in found.items() if m == method and p == WIDE), None)
            if free and known is not None:
                found[method, tile, P] = known
                continue
            start = time.perf_counter()
            quantized = subject.quantize(rules(method, WIDE if free else P, T, subject.sizes))
            certified = jpfq.certify(quantized, bits=P, tile=T)
            if not certified.holds:
                raise AssertionError(f"{method}, {tile}, P = {P}: {certified}")
            lost = s.sign * (s.exact - subject(quantized))
            if free:
                found[method, tile, WIDE] = lost
            found[method, tile, P] = lost
            seconds = time.perf_counter() - start
            print(
                f"{subject.name}: {tile}, P = {P}, {method}: {s.shown(lost)} ({seconds:.0f} s)",
                file=sys.stderr,
                flush=True,
            )
    return found


def wrapping(subject: Scored, args: argparse.Namespace) -> tuple[list, list[str]]:
    """Rows of the network in integers with accumulators that wrap, and verdicts."""
    s, T = subject.s, 64
    lost = lambda quantized, P: (
        s.sign * (s.exact - s.score(lambda batch: quantized.apply_integer(batch, accumulator=jpfq.Accumulator(P, T))))
    )
    free = subject.quantize([jpfq.Rule(".*", grid=GRID, activation_bits=8)])
    rows, verdicts, apart = [], [], 0.0
    for P in args.wraps:
        made = subject.quantize(rules("scale-aware", P, T, subject.sizes))
        floats = s.sign * (s.exact - subject(made))
        figures = (lost(free, P), lost(made, P), lost(made, WIDE), floats)
        rows.append((subject.name, str(P), *map(s.shown, figures)))
        apart = max(apart, abs(figures[2] - floats))
        print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    near = 0.3 if s.unit == "points" else 0.005  # inputs at a tie may round the other way
    claim = f"{subject.name}: in integers the score of the float network within {near:g} {s.unit}: {apart:.4f}"
    verdicts.append(verdict(apart <= near, claim))
    same = all(row[3] == row[4] for row in rows)
    verdicts.append(verdict(same, f"{subject.name}: made for P bits, P bits give what 32 bits give"))
    return rows, verdicts


@jax.jit
def _inputs_of(rounding, W, order, levels):
    carry, inputs_of = rounding.init_all(W, order)
    return carry, inputs_of(Recursion(levels, order, W.shape[1], rounding).spread())


@jax.jit
def _recursed(rounding, A, L, order, levels, carry, inputs):
    recursion = Recursion(levels, order, A.shape[1], rounding, None, carry)
    return substitute(A, L, recursion, about=A, inputs=inputs).codes


def overhead(n: int, repeats: int) -> list[tuple[str, float]]:
    """Times of the recursion n x n as ratios to nearest rounding's, medians of ratios taken side by side."""
    rng = np.random.default_rng(0)
    f32 = lambda x: jnp.asarray(x, jnp.float32)
    W, L = f32(rng.standard_normal((n, n))), f32(np.tril(rng.standard_normal((n, n)) * 0.3 / n**0.5, -1))
    order, levels = (
        jnp.asarray(rng.permutation(n)),
        ScaledGrid(f32(np.full((1, n), 0.4)), f32(np.zeros((1, n))), f32(-7), f32(7)),
    )
    around = lambda tile, inputs=(0, 255): jpfq.Accumulator(16, tile).around(jpfq.rounding.Nearest(), inputs)
    kinds = {
        "nearest": jpfq.rounding.Nearest(),
        "one stage": around(None),
        "T = 128": around(128),
        "T = 64": around(64),
    }
    kinds["T = 128, signed inputs"] = around(128, (-128, 127))
    runs = {
        k: functools.partial(_recursed, r, W, L, order, levels, *_inputs_of(r, W, order, levels))
        for k, r in kinds.items()
    }
    times: dict[str, list[float]] = {kind: [] for kind in runs}
    for turn in range(repeats + 1):
        for kind, run in runs.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            if turn:
                times[kind].append(time.perf_counter() - start)
    ratio = lambda kind: statistics.median(a / b for a, b in zip(times[kind], times["nearest"], strict=True))
    return [(kind, ratio(kind)) for kind in kinds]


def draw(found: dict[str, dict], subjects: dict[str, Scored], args: argparse.Namespace) -> None:
    """Loss against P, a row for each model and a column for each tile."""
    figure, axes = plt.subplots(
        len(found),
        len(args.tiles),
        figsize=(12, 3.4 * len(found) + 0.6),
        squeeze=False,
        sharey="row",
        layout="constrained",
    )
    for row, (name, losses) in zip(axes, found.items(), strict=True):
        for ax, tile in zip(row, args.tiles, strict=True):
            for method in args.methods:
                lost = [max(losses[method, tile, P], LEAST) for P in args.bits]
                marks = "s--" if method in BASELINES else "o-"
                ax.plot(range(len(args.bits)), lost, marks, ms=3, lw=1.2, label=method)
            ax.set(title=f"{name}, {tile}", xlabel="bits of the accumulator", yscale="log")
            ax.set_xticks(range(len(args.bits)), list(map(str, args.bits)))
            ax.grid(alpha=0.3)
        row[0].set_ylabel(f"{subjects[name].s.unit} lost; {LEAST:g} is none")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    (HERE / "results").mkdir(exist_ok=True)
    figure.savefig(HERE / "results" / "accumulators.png", dpi=110)


def verdicts(name: str, found: dict, args: argparse.Namespace, s: models.Subject) -> list[str]:
    """On the claims of the trade-off, as far as they were looked at."""
    at = lambda method, tile, P: found.get((method, tile, P), np.inf)
    spread = 10.0**-s.digits if s.unit == "nats" else 0.3  # what a thousand images can tell
    worse = [
        f"{tile}, P = {P}, {base}"
        for tile in args.tiles
        for P in args.bits
        for base in BASELINES
        if min(at(ours, tile, P) for ours in OURS) > at(base, tile, P) + spread
    ]
    said = (
        f"{name}: scale-aware, at the best width of activations, loses no more than EP-init and fewer bits at every P"
        + (f", but for {worse}" if worse else "")
    )
    lost = at("scale-aware", "T = 128", 16) - at("scale-aware", "T = 128", WIDE)
    most = 1.0 if s.unit == "points" else float(np.log(1.05))
    claim = f"{name}: T = 128, P = 16 loses at most {most:.2f} {s.unit} more than P = 32: {s.shown(lost)}"
    return [verdict(not worse, said), verdict(lost <= most, claim)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tiles", nargs="+", choices=TILES, default=list(TILES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--bits", nargs="+", type=int, default=[12, 14, 16, 18, 32])
    parser.add_argument("--wraps", nargs="+", type=int, default=[13, 16])
    parser.add_argument("--images", type=int, default=250, help="calibration images")
    parser.add_argument("--tests", type=int, default=1_000, help="test images")
    parser.add_argument("--windows", type=int, default=64, help="calibration windows of stories")
    parser.add_argument("--texts", type=int, default=128, help="test windows of stories")
    parser.add_argument("--size", type=int, default=1024, help="of the recursion that is timed")
    parser.add_argument("--repeats", type=int, default=21, help="of each time")
    add_data(parser)
    args = parser.parse_args()

    subjects = {name: Scored(name, args) for name in args.models}
    found, parts, wrapped, said = {}, [], [], []
    for name, subject in subjects.items():
        s = subject.s
        found[name] = losses(subject, args)
        for tile in args.tiles:
            rows = [(m, *(s.shown(found[name][m, tile, P]) for P in args.bits)) for m in args.methods]
            needs = f"{name}, {tile}: {s.unit} lost (float {s.shown(s.exact)}; P* = {subject.needed(TILES[tile])})"
            parts += [needs, table(("P", *map(str, args.bits)), rows)]
        said += verdicts(name, found[name], args, s)
        rows, claims = wrapping(subject, args)
        wrapped += rows
        said += claims
    if all(value == parser.get_default(name) for name, value in vars(args).items() if name != "data"):
        draw(found, subjects, args)  # beside the report
    times = overhead(args.size, args.repeats)
    most = max(ratio for kind, ratio in times if kind != "nearest")
    said.append(
        verdict(most <= 1.5, f"the recursion with AXE takes at most 1.5 times that of nearest rounding: {most:.2f}")
    )
    head = (
        "accumulators that wrap, T = 64",
        "P",
        "made without one",
        "made for it",
        "made for it, 32 bits",
        "in floats",
    )
    report(
        "accumulators",
        parser,
        args,
        f"calibrated on {args.images} images, {args.windows} windows; "
        f"scored on {args.tests:,} images, {args.texts} windows",
        *parts,
        table(head, wrapped),
        table(("recursion", "time against nearest"), [(kind, f"{ratio:.2f}") for kind, ratio in times]),
        "\n".join(said),
    )


if __name__ == "__main__":
    main()

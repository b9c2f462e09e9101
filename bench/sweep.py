"""Claim: a sweep costs a fraction of its runs, and each of its rows is the single run. Run: python bench/sweep.py

Sixteen settings of the digits CNN of `jpfq demo`: four widths by four radii, of GPFQ alone and with the recommended
settings, each scored on the test images. From a fresh process, compilation included, the sweep is next to one run; warm,
next to the sixteen runs one after the other. Scores are part of both.
"""

import argparse
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from common import PLAIN, report, table, verdict

import jpfq
from jpfq.study import demo

COLD, WARM, DIFFER = 4.0, 0.5, 1e-4
WIDTHS, RADII = (2, 3, 4, 5), (0.6, 0.75, 0.9, 1.0)
KINDS = {
    "GPFQ": lambda bits, c: jpfq.Rule(
        ".*",
        bits=bits,
        scale=jpfq.scale.AbsMax(c),
        **{k: getattr(PLAIN, k) for k in ("method", "order", "finish", "shrinkage")},
    ),
    "recommended": lambda bits, c: jpfq.Rule(".*", bits=bits, scale=jpfq.scale.MinError(jpfq.scale.AbsMax(c))),
}


class Case:
    """The trained CNN and its test images."""

    def __init__(self, kind: str):
        images, labels, test, answers = demo.digits()
        self.model, self.variables = demo.train_cnn(images, labels)
        self.batches = [jnp.asarray(part) for part in np.split(images, 4)]
        self.test, self.answers = jnp.asarray(test), jnp.asarray(answers)
        self.space = jpfq.Space(KINDS[kind], bits=WIDTHS, c=RADII)
        self.wrong = jax.jit(self.evaluate_variables)
        self.evaluate = lambda quantized: self.evaluate_variables(quantized.variables)

    def evaluate_variables(self, variables):
        return jnp.mean(jnp.argmax(self.model.apply(variables, self.test), -1) != self.answers)

    def one(self, point):
        rules = self.space.rules_of(point)
        quantized = jpfq.quantize(self.model, self.batches, rules, variables=self.variables, progress=False)
        return quantized, float(self.wrong(quantized.variables))

    def sweep(self):
        given = {"variables": self.variables, "evaluate": self.evaluate, "progress": False}
        return jpfq.sweep(self.model, self.batches, self.space, **given)


def seconds(f) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


def cold(kind: str, what: str) -> float:
    """Seconds in a process of its own."""
    command = [sys.executable, __file__, "--cold", kind, what]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def differing(case: Case, swept: jpfq.Sweep) -> tuple[int, int]:
    """Codes of the sweep that are not the single runs', and all of them."""
    wrong = total = 0
    for i, point in enumerate(case.space.points):
        for path, tensor in case.one(point)[0].tensors.items():
            wrong += int((np.asarray(tensor.codes) != np.asarray(swept[i].tensors[path].codes)).sum())
            total += tensor.codes.size
    return wrong, total


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--cold", nargs=2, metavar=("KIND", "WHAT"), help="print the seconds of 'one' or 'sweep', and stop"
    )
    args = parser.parse_args()
    if args.cold:
        kind, what = args.cold
        case = Case(kind)
        print(seconds(case.sweep if what == "sweep" else lambda: case.one(case.space.points[0])))
        return

    rows, verdicts = [], []
    for kind in KINDS:
        case = Case(kind)
        swept, points = case.sweep(), case.space.points
        first = [(cold(kind, "one"), cold(kind, "sweep")) for _ in range(3)]
        wrong, total = differing(case, swept)
        taken = [(seconds(lambda: [case.one(p) for p in points]), seconds(case.sweep)) for _ in range(args.rounds)]
        cold_ratio, warm_ratio = (float(np.median([b / a for a, b in pairs])) for pairs in (first, taken))
        for name, pairs, ratio in (("one run, cold", first, cold_ratio), ("16 runs, warm", taken, warm_ratio)):
            alone, together = np.median(np.array(pairs), 0)
            rows.append((kind, name, f"{alone:.2f}", f"{together:.2f}", f"{ratio:.2f}"))
        verdicts += [
            verdict(cold_ratio <= COLD, f"{kind}: cold, at most {COLD} times one run: {cold_ratio:.2f}"),
            verdict(warm_ratio <= WARM, f"{kind}: warm, at most {WARM} times the sixteen runs: {warm_ratio:.2f}"),
            verdict(wrong <= DIFFER * total, f"{kind}: {wrong} of {total:,} codes differ from the single runs'"),
        ]
        best = min(swept.records, key=lambda record: record["loss"])
        verdicts.append(f"      {kind}: least loss {best['loss']:.4f} at {best['bits']} bits, c = {best['c']}")
    note = (
        f"sweep of {len(WIDTHS) * len(RADII)} settings; medians of 3 cold and {args.rounds} warm pairs, taken in turn"
    )
    head = ("settings", "beside", "that, s", "sweep, s", "ratio")
    report("sweep", parser, args, note, table(head, rows), "\n".join(verdicts))


if __name__ == "__main__":
    main()

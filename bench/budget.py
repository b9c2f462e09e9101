"""Claim: a width for each kernel is better than the same width everywhere. Run: python bench/budget.py

ResNet20 and stories260K (see models.py), each at 3 and 4 bits per weight on average: one width for all kernels, and the
rules of `jpfq.budget`, which may take from 2 to 8 bits. Both with the recommended settings otherwise.
"""

import argparse
import sys
import time

from common import add_data, report, table, verdict
from models import resnet20, stories

import jpfq

AVERAGES = (4, 3)


def spent(rules: list[jpfq.Rule]) -> str:
    """The widths chosen, and for how many kernels each."""
    widths = [rule.bits for rule in rules]
    return ", ".join(f"{widths.count(b)} x {b}" for b in sorted(set(widths), reverse=True))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000, help="calibration images, 5,000 at most")
    parser.add_argument("--windows", type=int, default=128, help="calibration windows of stories, 512 at most")
    add_data(parser)
    args = parser.parse_args()

    rows, verdicts = [], []
    for subject in (resnet20, stories):
        s, name = subject(args), subject.__name__
        for average in AVERAGES:
            start = time.perf_counter()
            rules = jpfq.budget(s.model, s.batches, average, variables=s.variables)
            seconds = time.perf_counter() - start
            uniform = s.quantized(f"{name}: {average} bits", jpfq.best(average))
            chosen = s.quantized(f"{name}: {average} bits on average", rules)
            lost = [s.sign * (s.exact - x) for x in (uniform, chosen)]
            rows.append((name, s.unit, str(average), *map(s.shown, lost), spent(rules), f"{seconds:.0f}"))
            claim = f"{name}: {average} bits on average lose less than {average} everywhere"
            verdicts.append(verdict(lost[1] < lost[0], claim))
            print(verdicts[-1], file=sys.stderr, flush=True)
    head = ("lost against float", "unit", "bits", "everywhere", "budget", "kernels x bits", "s to choose")
    note = f"calibrated on {args.images:,} images, {args.windows} windows"
    report("budget", parser, args, note, table(head, rows), "\n".join(verdicts))


if __name__ == "__main__":
    main()

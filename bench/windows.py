"""Claim: 128 windows per input of a convolution are enough for calibration. Run: python bench/windows.py

ResNet20 by the recommended settings, calibrated on 500 images of CIFAR-10: on all windows of its convolutions, and on fewer.
The criterion is the relative error of the logits on the 10,000 test images; top-1 is shown beside it, and is noise of .2
points. Processor seconds are those of a second call.
"""

import argparse
import time

import jax
import models
import networks
import numpy as np
from common import add_data, needed, report, table, verdict

import jpfq

MOST = 1.03  # of the error of the logits on all windows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--windows", type=int, nargs="+", default=[128, 32, 8], help="for each input")
    parser.add_argument("--images", type=int, default=500)
    add_data(parser)
    args = parser.parse_args()
    subject = models.resnet20(args)
    test = np.load(needed(args.data, "cifar10_test_jpeg.npz"))
    shown = [networks.pixels(x) for x in models.cut(test["x_test"], 250)]
    logits = lambda variables: np.concatenate([np.asarray(subject.run(variables, x)) for x in shown])
    exact = logits(subject.variables)
    rows, verdicts = [], []
    for bits in args.bits:
        found = {}
        for count in (None, *args.windows):
            patches = jpfq.patches.All() if count is None else jpfq.patches.AtMost(count)
            rule = jpfq.Rule(".*", grid=jpfq.Integer(bits, narrow=True), patches=patches)
            for _ in range(2):
                start = time.process_time()
                made = jpfq.quantize(subject.model, subject.batches, rule, variables=subject.variables, progress=False)
                jax.block_until_ready(made.params)
                seconds = time.process_time() - start
            y = logits(made.variables)
            found[count] = np.linalg.norm(y - exact) / np.linalg.norm(exact)
            right = 100 * np.mean(y.argmax(-1) == test["y_test"])
            rows.append(
                [
                    str(bits),
                    "all" if count is None else str(count),
                    f"{found[count]:.4f}",
                    f"{right:.2f}",
                    f"{seconds:.1f}",
                ]
            )
            print(*rows[-1], flush=True)
        if 128 in found:
            ratio = found[128] / found[None]
            verdicts.append(
                verdict(ratio <= MOST, f"{bits} bits: on 128 windows at most {MOST} of the error on all: {ratio:.3f}")
            )
    head = ["bits", "windows for each input", "error of the logits", "top-1", "second call, CPU s"]
    report("windows", parser, args, table(head, rows), "\n".join(verdicts))


if __name__ == "__main__":
    main()

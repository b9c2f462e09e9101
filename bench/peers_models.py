"""Claim: whole models are quantized as well as by Brevitas, in less time. Run: python bench/peers_models.py

ResNet20 and stories260K, written once more in PyTorch (torch_twins.py; that both give the same outputs is checked), go
through Brevitas' GPFQ and GPTQ and through `jpfq.quantize`: the same calibration data in the same batches, the same grids,
steps of the largest weight of each neuron, natural order (of a convolution's inputs: by place, then by channel; theirs by
channel, then by place, so that codes differ). Layers of the language model with a common input are updated together by
Brevitas too, which saves it passes. "best" has the recommended settings and steps. Seconds are those of calibration and
quantization, from a float model in memory to a quantized one; ours are of the whole call, once with all compilation
("first"), and warm just before and just after the peer. Scores are of the Flax model on the weights of either.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import models
import networks
import numpy as np
import torch
import torch_twins as twins
from common import add_data, report, table, verdict
from peers import DAMPING, as_torch, gpfq_mode, gptq_mode

import jpfq

MODES = {"GPFQ": gpfq_mode, "GPTQ": gptq_mode}
FASTER = {"GPFQ": 10, "GPTQ": 3}  # their seconds over ours, at least
_SAME = {"scale": jpfq.scale.AbsMax(), "order": jpfq.order.Natural(), "finish": None, "shrinkage": None}
OURS = {  # what a rule says besides the grid
    "GPFQ": {"method": jpfq.GPFQ(), **_SAME},
    "GPTQ": {"method": jpfq.OPTQ(damping=DAMPING), **_SAME},
    "best": {},
}


class Twin(NamedTuple):
    """A model in both worlds."""

    subject: models.Subject
    make: Callable[[int | None], torch.nn.Module]
    load: Callable[[Path], Any]  # of the Flax model
    file: str
    together: list | None  # names of layers that Brevitas may update together

    def weights(self, folder: Path):
        """The data of the subject, from stored arrays."""
        loaded = self.load(folder)
        return loaded if self.subject.variables is None else loaded[1]

    def score(self, weights) -> float:
        """The score of the Flax model on these weights."""
        return self.subject.score(lambda batch: self.subject.run(weights, batch))


TWINS = {
    "resnet20": (models.resnet20, twins.ResNet20, networks.resnet20, twins.RESNET20, None),
    "stories": (models.stories, twins.Llama, networks.llama, twins.STORIES, twins.PARALLEL),
}


def twin(name: str, args: argparse.Namespace) -> Twin:
    """A model in both worlds; ends the program where their outputs differ."""
    subject, network, load, file, together = TWINS[name]
    found = Twin(subject(args), lambda bits: twins.filled(network(bits), args.data, file), load, file, together)
    some = found.subject.batches[0][:4]
    ours = np.asarray(found.subject.run(found.weights(args.data), some))
    off = np.abs(ours - found.make(None)(as_torch(some)).numpy()).max() / np.abs(ours).max()
    if off > 1e-5:
        raise SystemExit(f"{name}: the model in PyTorch differs from the one in Flax by {off:.1e}.")
    return found


def by_brevitas(one: Twin, method: str, bits: int, data: Path) -> tuple[float, float]:
    """Seconds of Brevitas, and the score of what it makes."""
    model, batches = one.make(bits), [as_torch(x) for x in one.subject.batches]
    start = time.perf_counter()
    with MODES[method](model, group_of_parallel_layers=one.together) as mode:
        for _ in range(mode.num_layers):
            for batch in batches:
                mode.model(batch)
            mode.update()
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        twins.emptied(model, data, one.file, Path(folder))
        return seconds, one.score(one.weights(Path(folder)))


def by_us(one: Twin, settings: dict, bits: int) -> tuple[float, Any]:
    """Seconds of jpfq, and the weights it makes."""
    rule = jpfq.Rule(".*", grid=jpfq.Integer(bits, narrow=True), **settings)
    start = time.perf_counter()
    made = jpfq.quantize(one.subject.model, one.subject.batches, rule, variables=one.subject.variables, progress=False)
    jax.block_until_ready(made.params)
    return time.perf_counter() - start, made.model if one.subject.variables is None else made.variables


def compared(name: str, args: argparse.Namespace) -> tuple[list[tuple], list[str]]:
    """The rows of one model, and the verdicts."""
    one, rows, says = twin(name, args), [], []
    shown, better = one.subject.shown, lambda a, b: one.subject.sign * (a - b) >= 0
    exact = one.subject.exact
    wanted = models.CHECK[name][0]
    says.append(verdict(shown(exact) == shown(wanted), f"{name}: float {wanted}: {shown(exact)}"))
    rows.append((name, "", "float", "", "", "", "", shown(exact), ""))
    first = {label: by_us(one, settings, args.bits[0])[0] for label, settings in OURS.items()}
    for bits in args.bits:
        for method in MODES:
            labels = (method, "best")
            before = {label: by_us(one, OURS[label], bits) for label in labels}
            theirs, their_score = by_brevitas(one, method, bits, args.data)
            after = {label: by_us(one, OURS[label], bits) for label in labels}
            for label in labels:
                warm = statistics.mean((before[label][0], after[label][0]))
                score = one.score(after[label][1])
                seconds = (f"{theirs:.1f}", f"{warm:.2f}", f"{first[label]:.1f}", f"{theirs / warm:.1f}")
                rows.append(
                    (name, str(bits), f"Brevitas {method}, ours {label}", *seconds, shown(their_score), shown(score))
                )
                print(*rows[-1], file=sys.stderr, flush=True)
                fast = theirs / warm >= FASTER[method]
                claim = f"{name}, {bits} bits: {label} at least {FASTER[method]} times as fast as Brevitas' {method}"
                says.append(verdict(fast, f"{claim}: {theirs / warm:.1f}"))
                claim = f"{name}, {bits} bits: {label} no worse than Brevitas' {method}"
                says.append(verdict(better(score, their_score), f"{claim}: {shown(score)}, {shown(their_score)}"))
    return rows, says


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=TWINS, default=list(TWINS))
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--images", type=int, default=500, help="calibration images, 5,000 at most")
    parser.add_argument("--windows", type=int, default=64, help="calibration windows of 256 tokens, 512 at most")
    add_data(parser)
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # as many as jax takes
    torch.set_grad_enabled(False)

    rows, says = [], []
    for name in args.models:
        more_rows, more = compared(name, args)
        rows, says = rows + more_rows, says + more
    note = f"calibrated on {args.images:,} images, {args.windows} windows; {torch.get_num_threads()} threads"
    head = ("model", "bits", "who", "their s", "our s", "our first, s", "ratio", "their score", "ours")
    report("peers_models", parser, args, note, table(head, rows), "\n".join(says))


if __name__ == "__main__":
    main()

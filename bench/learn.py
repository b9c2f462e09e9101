"""Claim: learning halves what two bits cost a language model, and takes a fifth off at four. Run: python bench/learn.py

stories    stories260K in NNX: nats per token on 538 windows of 256 tokens, learned on the 128 others that it was calibrated
           on, in batches of 4
resnet20   ResNet20 in Linen: top-1 on the 10,000 test images of CIFAR-10, learned on the 500 others that it was calibrated
           on, in batches of 25

The start is `best`. Learning minimises the divergence of the logits from the float network's; it holds an eighth of the
batches out. No labels are used.
"""

import argparse
import time

import jax.numpy as jnp
import models
from common import add_data, report, table, verdict

import jpfq

GRIDS = {
    "stories": {"W4": jpfq.Integer(4), "W3": jpfq.Integer(3), "W2": jpfq.Integer(2)},
    "resnet20": {
        "W4": jpfq.Integer(4, narrow=True),
        "W3": jpfq.Integer(3, narrow=True),
        "ternary": jpfq.Ternary(),
    },
}
TARGETS = {"stories": {"W4": 0.03, "W3": 0.12, "W2": 0.6}, "resnet20": {"W4": 0.1, "W3": 0.3}}  # the most to be lost
BATCH = {"stories": 4, "resnet20": 25}


def lost(subject: models.Subject, result: jpfq.Quantized) -> float:
    """The score that a result loses against the float network."""
    weights = result.model if subject.variables is None else result.variables
    return subject.sign * (subject.exact - subject.score(lambda batch: subject.run(weights, batch)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", choices=GRIDS, default="stories")
    parser.add_argument("--grids", nargs="+", help="of those of the model: W4, W3, W2 or ternary")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    add_data(parser)
    args = parser.parse_args()

    subject = {"stories": models.stories, "resnet20": models.resnet20}[args.model](args)
    size = BATCH[args.model]
    batches = [x for batch in subject.batches for x in jnp.split(batch, len(batch) // size)]
    learning = jpfq.Learning(steps=args.steps, rate=args.rate, loss="logits", seed=args.seed)
    rows, verdicts = [], []
    for name in args.grids or GRIDS[args.model]:
        rule = jpfq.Rule(".*", grid=GRIDS[args.model][name])
        start = jpfq.quantize(subject.model, subject.batches, rule, variables=subject.variables, progress=False)
        before, begin = lost(subject, start), time.perf_counter()
        result = jpfq.learn(start, subject.model, batches, learning, variables=subject.variables, progress=True)
        seconds, after, said = time.perf_counter() - begin, lost(subject, result), result.learned
        rows.append(
            (name, subject.shown(before), subject.shown(after), f"{said.before:.4f}", f"{said.after:.4f}")
            + (str(said.kept), f"{said.moved:.1%}", f"{seconds:.0f}")
        )
        print(*rows[-1], flush=True)
        verdicts.append(verdict(after < before, f"{name}: learning loses less than its start"))
        if (most := TARGETS[args.model].get(name)) is not None:
            claim = f"{name}: {most:g} {subject.unit} lost at most: {subject.shown(after)}"
            verdicts.append(verdict(after <= most, claim))
    head = ("grid", "best loses", "learned loses", "held-out loss, best", "learned", "steps kept", "codes changed", "s")
    note = (
        f"{args.model}: float {subject.shown(subject.exact)} {subject.unit}; {args.steps} steps of Adam, "
        f"rate {args.rate:g}, batches of {size}, seed {args.seed}; losses against float; held-out: divergence in nats"
    )
    parser.set_defaults(model=args.model)  # each model has a file of its own
    file = "learn" if args.model == "stories" else f"learn_{args.model}"
    report(file, parser, args, note, table(head, rows), "\n".join(verdicts))


if __name__ == "__main__":
    main()

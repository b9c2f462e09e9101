"""Claim: 100 steps of fine-tuning recover half of what ternary weights cost. Run: python bench/finetune.py

The demo's CNN on digits, all kernels ternary, is trained for 100 steps of Adam on its 1,024 calibration images, towards
the float network's outputs: no labels are used. Once with codes fixed (`quantized.tunable`: steps, biases and norms), once
with derivatives passed straight through the rounding (`quantized.params`: kernels too, steps fixed). Losses are
cross-entropies in nats against the true labels; the share recovered is (quantized - tuned) / (quantized - float) on held-out
images, median and least over the seeds that draw the batches. GPFQ20 has one step for a whole layer, the others one for
each neuron.
"""

import argparse
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from common import report, table, verdict

import jpfq
from jpfq.study.demo import digits, train_cnn

SHARE = 0.5  # of the loss against float, to be recovered at least
_PLAIN = {
    "grid": jpfq.Ternary(),
    "scale": jpfq.scale.MinMSE(),
    "order": jpfq.order.Natural(),
    "finish": None,
    "shrinkage": None,
}
RULES = {
    "MSQ, step MinMSE": [jpfq.Rule(".*", method=jpfq.MSQ(), **_PLAIN)],
    "GPFQ, step MinMSE": [jpfq.Rule(".*", method=jpfq.GPFQ(), **_PLAIN)],
    "paper.gpfq20(3, C=3)": jpfq.paper.gpfq20(3, 3.0),
    "best": jpfq.best(grid=jpfq.Ternary()),
}


class Problem(NamedTuple):
    """The trained network and its images."""

    model: Any
    variables: dict
    train: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]

    def with_params(self, params):
        """The variables with other parameters."""
        return {**self.variables, "params": params}

    def score(self, params) -> tuple[float, float, float]:
        """Loss on the calibration images, loss on the held-out images, and top-1 there."""
        logits = [self.model.apply(self.with_params(params), x) for x, _ in (self.train, self.test)]
        losses = [_cross_entropy(z, y) for z, (_, y) in zip(logits, (self.train, self.test))]
        return *map(float, losses), 100 * float(jnp.mean(logits[1].argmax(-1) == self.test[1]))


def _cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def tuner(problem: Problem, steps: int, rate: float, batch: int) -> Callable:
    """The function (params, tensors, key) -> trained params, its step compiled for each kind of parameters."""
    images, _ = problem.train
    wanted = jax.nn.softmax(problem.model.apply(problem.variables, images))
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    @jax.jit
    def step(params, memory, tensors, key):
        rows = jax.random.choice(key, len(images), (batch,), replace=False)

        def loss(params):
            weights = problem.with_params(jpfq.fake_quant(params, tensors))
            return optax.softmax_cross_entropy(problem.model.apply(weights, images[rows]), wanted[rows]).mean()

        change, memory = optimizer.update(jax.grad(loss)(params), memory)
        return optax.apply_updates(params, change), memory

    def tune(params, tensors, key):
        memory = optimizer.init(params)
        for here in jax.random.split(key, steps):
            params, memory = step(params, memory, tensors, here)
        return params

    return tune


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rate", type=float, default=3e-3, help="of Adam at the start; falls to 0 as a cosine")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()

    images, labels, test, answers = digits()
    model, variables = train_cnn(images, labels)
    as_jax = lambda *xs: tuple(map(jnp.asarray, xs))
    problem = Problem(model, variables, as_jax(images, labels), as_jax(test, answers))
    tune = tuner(problem, args.steps, args.rate, args.batch)
    exact = problem.score(variables["params"])

    show = lambda name, trained, score, *more: (
        name,
        trained,
        *(f"{x:.4f}" for x in score[:2]),
        f"{score[2]:.2f}",
        *more,
    )
    rows, verdicts = [show("float", "", exact, "", "")], []
    for name, rules in RULES.items():
        quantized = jpfq.quantize(model, jnp.split(problem.train[0], 4), rules, variables=variables, progress=False)
        before = problem.score(quantized.params)
        rows.append(show(name, "nothing", before, "", ""))
        for kind, start in (("codes fixed", quantized.tunable), ("straight through", quantized.params)):
            keys = jax.random.split(jax.random.key(0), args.seeds)
            results = [quantized.tuned(tune(start, quantized.tensors, key)) for key in keys]
            scores = [problem.score(result.params) for result in results]
            shares = [(before[1] - after[1]) / (before[1] - exact[1]) for after in scores]
            rows.append(show(name, kind, np.median(scores, 0), f"{np.median(shares):.0%}", f"{min(shares):.0%}"))
            if kind == "codes fixed":
                same = all(
                    np.array_equal(r.tensors[p].codes, t.codes) for r in results for p, t in quantized.tensors.items()
                )
                verdicts.append(verdict(same, f"{name}: codes are those before training"))
                claim = f"{name}, codes fixed: {SHARE:.0%} recovered at least: {min(shares):.0%} for the worst seed"
                verdicts.append(verdict(min(shares) >= SHARE, claim))
    head = ("ternary by", "trained", "calibration loss", "held-out loss", "top-1", "recovered", "least")
    note = f"{args.steps} steps of Adam, rate {args.rate:g}, batches of {args.batch}, {args.seeds} seeds (medians)"
    report("finetune", parser, args, note, table(head, rows), "\n".join(verdicts))


if __name__ == "__main__":
    main()

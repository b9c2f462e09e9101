"""Claim: trained models lose little at 4 bits, and with activations of 8. Run: python bench/models.py

Two models in Linen, two in NNX, all kernels quantized that can be (an embedding that is also the output stays), a step per
neuron:

resnet20   Linen  top-1 on the 10,000 test images of CIFAR-10, calibrated on 1,000 others
cnn        NNX    likewise, GPFQ20's network
stories    NNX    a Llama: nats per token on 538 windows of 256 tokens, calibrated on 128 others; also with coupled neurons
sorter     Linen  a transformer: share of all 729 inputs it puts in order, calibrated on 128 of them

First the float models and plain rounding are compared with results of another program, which are stored with the data.
"""

import argparse
import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import networks
import numpy as np
from common import add_data, needed, report, table, verdict
from flax import nnx
from paper_tables import SETTINGS

import jpfq

PLAIN = {  # plain rounding: the largest weight of each neuron on the top level
    "scale": jpfq.scale.AbsMax(),
    "method": jpfq.MSQ(),
    "order": jpfq.order.Natural(),
    "finish": None,
    "shrinkage": None,
}
CHECK = {  # by another program: float, and plain rounding to 8, 4 and 3 bits
    "resnet20": (81.03, 81.10, 77.57, 62.63),
    "cnn": (77.60, 77.58, 76.26, 72.95),
    "stories": (1.5057, 1.5063, 1.6643, 3.3237),
    "sorter": (100.0, 100.0, 100.0, 100.0),
}
CONFIGURATIONS = {
    "W8A8": {"grid": jpfq.Integer(8, narrow=True), "activation_bits": 8},
    "W4A8": {"grid": jpfq.Integer(4, narrow=True), "activation_bits": 8},
    "W4": {"grid": jpfq.Integer(4, narrow=True)},
    "W3": {"grid": jpfq.Integer(3, narrow=True)},
    "ternary": {"grid": jpfq.Ternary()},
}
COUPLED = {"coupling": jpfq.Coupling("logits", block=1)}
METHODS = {name: SETTINGS[name] for name in ("MSQ", "GPFQ", "best")} | {"coupled": COUPLED}
TARGETS = {  # the most that is to be lost by the better of best and coupled
    "resnet20": {"W4A8": 0.4, "W4": 0.2, "W3": 0.8},
    "stories": {"W4": 0.03, "W3": 0.12},
    "sorter": {"W4A8": 0.0},
}
Logits = Callable[[Any], jax.Array]  # of a batch


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model, its variables (None for NNX) and calibration batches, and its score, in a unit and to so many digits."""

    model: Any
    variables: dict | None
    batches: list
    score: Callable[[Logits], float]
    unit: str
    digits: int = 2
    sign: int = 1  # -1 where less is better
    methods: tuple[str, ...] = ("MSQ", "GPFQ", "best")

    @functools.cached_property
    def run(self) -> Callable:
        """The model's outputs from an NNX model or Linen variables, and a batch. Compiled once for all weights."""
        return nnx.jit(lambda model, x: model(x)) if self.variables is None else jax.jit(self.model.apply)

    @functools.cached_property
    def exact(self) -> float:
        """The score of the float model."""
        weights = self.model if self.variables is None else self.variables
        return self.score(lambda batch: self.run(weights, batch))

    def quantized(self, name: str, rules: jpfq.Rule | list[jpfq.Rule], batches: list | None = None) -> float:
        """The score of the quantized model; says so as it goes."""
        start = time.perf_counter()
        result = jpfq.quantize(self.model, batches or self.batches, rules, variables=self.variables, progress=False)
        if result.inputs:
            logits = result.apply
        else:
            weights = result.model if self.variables is None else result.variables
            logits = lambda batch: self.run(weights, batch)
        seconds, found = time.perf_counter() - start, self.score(logits)
        print(f"{name}: {self.shown(found)} ({seconds:.0f} s)", file=sys.stderr, flush=True)
        return found

    def shown(self, value: float) -> str:
        return f"{value:.{self.digits}f}"


def cut(x: np.ndarray, size: int) -> list:
    """Batches of at most that size."""
    return [x[i : i + size] for i in range(0, len(x), size)]


def classifier(model, variables, args: argparse.Namespace, tests: int | None = None) -> Subject:
    """A network for CIFAR-10, scored on the first `tests` images, on all where that is None."""
    test = np.load(needed(args.data, "cifar10_test_jpeg.npz"))
    images = np.load(needed(args.data, "cifar10_train.npz"))["x_train_jpeg"][: args.images]
    shown, labels = [networks.pixels(x) for x in cut(test["x_test"][:tests], 250)], test["y_test"][:tests]

    def accuracy(logits: Logits) -> float:
        return 100 * float(np.mean(np.concatenate([np.argmax(logits(x), -1) for x in shown]) == labels))

    return Subject(model, variables, [networks.pixels(x) for x in cut(images, 250)], accuracy, "points")


def resnet20(args: argparse.Namespace, tests: int | None = None) -> Subject:
    """ResNet20 in Linen."""
    return classifier(*networks.resnet20(args.data), args, tests)


def cnn(args: argparse.Namespace) -> Subject:
    """GPFQ20's network in NNX."""
    return classifier(networks.nnx_cnn(args.data), None, args)


@jax.jit
def nats(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """-log p of each token (batch, position)."""
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)[..., 0]


def stories(args: argparse.Namespace, tests: int | None = None) -> Subject:
    """stories260K in NNX, scored on the first `tests` windows, on all where that is None."""
    tokens = np.load(needed(args.data, "tinystories_tok512.npz"))["tokens"].astype(np.int32)
    windows = lambda x, size: x[: len(x) // size * size].reshape(-1, size)
    texts = [jnp.asarray(x) for x in cut(windows(tokens[600_000:], 257)[:tests], 32)]
    batches = [jnp.asarray(x) for x in cut(windows(tokens[:131_072], 256)[: args.windows], 32)]

    def loss(logits: Logits) -> float:
        return float(np.mean(np.concatenate([nats(logits(x[:, :-1]), x[:, 1:]) for x in texts]), dtype=np.float64))

    return Subject(networks.llama(args.data), None, batches, loss, "nats", 4, -1, tuple(METHODS))


def sorter(args: argparse.Namespace) -> Subject:
    """The transformer that sorts, in Linen. An input and what is to follow hold all it reads on its way."""
    inputs = np.array(list(itertools.product(range(3), repeat=6)), np.int32)
    lines = np.concatenate([inputs, np.sort(inputs)], 1)
    some = np.random.default_rng(0).permutation(len(lines))[: args.lines]

    def sorted_share(logits: Logits) -> float:
        made = np.where(np.arange(12) < 6, lines, 0)
        for end in range(6, 12):  # attention is causal: what is not yet made is not looked at
            made[:, end] = np.argmax(logits(jnp.asarray(made[:, :-1]))[:, end - 1], -1)
        return 100 * float(np.mean(np.all(made == lines, 1)))

    return Subject(*networks.sorter(args.data), [jnp.asarray(lines[some, :-1])], sorted_share, "percent")


SUBJECTS = {f.__name__: f for f in (resnet20, cnn, stories, sorter)}


def wiring(name: str, s: Subject) -> tuple[list[str], list[str]]:
    """A row of float and plain rounding, and the verdicts. Plain rounding needs no data, and gets little."""
    few, found = [s.batches[0][:8]], [s.exact]
    for bits in (8, 4, 3):
        grid = jpfq.Integer(bits, narrow=True)
        rule = jpfq.Rule(".*", grid=grid, **PLAIN)
        found.append(s.quantized(f"{name}: plain rounding, {bits} bits", rule, few))
    off = max(abs(a - b) for a, b in zip(found[1:], CHECK[name][1:], strict=True))
    near = 2 * 10.0**-s.digits  # two images, or two units of the last digit
    verdicts = [
        verdict(s.shown(found[0]) == s.shown(CHECK[name][0]), f"{name}: float {CHECK[name][0]}: {s.shown(found[0])}"),
        verdict(off < 1.01 * near, f"{name}: plain rounding within {near:g} of another program: {s.shown(off)}"),
    ]
    return [name, *map(s.shown, found)], verdicts


def losses(name: str, s: Subject, args: argparse.Namespace) -> Iterator[tuple[str, str, float]]:
    """Method, configuration, and what they lose against float."""
    for method, configuration in itertools.product(args.methods or s.methods, args.configurations):
        settings = CONFIGURATIONS[configuration]
        if not (args.no_activations and "activation_bits" in settings):
            rule = jpfq.Rule(".*", **METHODS[method], **settings)
            found = s.quantized(f"{name}: {method}, {configuration}", rule)
            yield method, configuration, s.sign * (s.exact - found)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="left out, coupled is tried on stories alone")
    for option, choices in (("models", SUBJECTS), ("configurations", CONFIGURATIONS)):
        parser.add_argument(f"--{option}", nargs="+", choices=choices, default=list(choices))
    parser.add_argument("--no-activations", action="store_true", help="leave out what quantizes activations")
    parser.add_argument("--images", type=int, default=1_000, help="calibration images, 5,000 at most")
    parser.add_argument("--windows", type=int, default=128, help="calibration windows of stories, 512 at most")
    parser.add_argument("--lines", type=int, default=128, help="calibration lines of the sorter, 729 at most")
    add_data(parser)
    args = parser.parse_args()

    plain, rows, wired, reached = [], [], [], []
    for name in args.models:
        s = SUBJECTS[name](args)
        row, verdicts = wiring(name, s)
        plain.append(row)
        wired += verdicts
        found = {(method, configuration): lost for method, configuration, lost in losses(name, s, args)}
        show = lambda method, c: s.shown(found[method, c]) if (method, c) in found else ""
        here = dict.fromkeys(method for method, _ in found)
        rows += [(name, s.unit, m, *(show(m, c) for c in args.configurations)) for m in here]
        for c, most in TARGETS.get(name, {}).items():
            ours = [lost for (method, at), lost in found.items() if method in ("best", "coupled") and at == c]
            if ours:
                claim = f"{name}, {c}: {most:g} {s.unit} lost at most: {s.shown(min(ours))}"
                reached.append(verdict(round(min(ours), s.digits) <= most, claim))
    note = (
        f"calibrated on {args.images:,} images, {args.windows} windows, {args.lines} lines; "
        "MSQ and GPFQ: scale MinError, order Descending, no shrinkage, no finisher; "
        "coupled: best, with neurons coupled one by one"
    )
    report(
        "models",
        parser,
        args,
        table(("score", "float", "plain rounding, 8 bits", "4 bits", "3 bits"), plain),
        "\n".join(wired),
        note,
        table(("lost against float", "unit", "method", *args.configurations), rows),
        "\n".join(reached),
    )


if __name__ == "__main__":
    main()

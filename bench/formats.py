"""Claim: in every number format the recommended recipe beats the format's own rounding. Run: python bench/formats.py

layer    ||X W - X q|| / ||X W|| in per cent, on one synthetic layer of 512 x 256 with correlated inputs and outlying weights
resnet20 points of top-1 lost on 2,000 test images of CIFAR-10, calibrated on 250 others
stories  nats per token lost against float, a Llama of 260,000 parameters, all of whose kernels are quantized

with the bits per weight that are stored, steps included. Groups run along the inputs; where a group does not divide the
inputs of a kernel (some of both models), that kernel has a step per neuron. RTN is the format's own rounding: the largest
weight of a group on the top level, to nearest; GPFQ, OPTQ and Qronos run on these very steps. Scores are said as they come.
"""

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import models
import numpy as np
from common import add_data, report, table, verdict

import jpfq

FORMATS = {
    "int4 per channel": jpfq.formats.int4(),
    "int4, groups of 128": jpfq.formats.int4(128),
    "int4, groups of 32": jpfq.formats.int4(32),
    "Q4_0": jpfq.formats.q4_0(),
    "Q4_K": jpfq.formats.q4_k(),
    "MXFP4": jpfq.formats.mxfp4(),
    "NVFP4": jpfq.formats.nvfp4(),
    "NF4, groups of 64": jpfq.formats.nf4(),
    "powers of two, 4 bits, 32": jpfq.formats.int4(32, grid=jpfq.PowersOfTwo(4)),
    "MXFP6": jpfq.formats.mxfp6(),
    "MXFP8": jpfq.formats.mxfp8(),
    "FP8 per channel": jpfq.formats.fp8(),
}
CODEBOOKS = {"codebook of 16": 16, "codebook of 8": 8}  # levels, fitted to each kernel
ALL = [*FORMATS, *CODEBOOKS]
USUAL = [
    name for name in ALL if name.split(",")[0] not in ("Q4_K", "powers of two", "MXFP6", "MXFP8", "FP8 per channel")
]
METHODS = {
    "RTN": {"plain": True, "method": jpfq.MSQ()},
    "GPFQ": {"plain": True, "method": jpfq.GPFQ()},
    "OPTQ": {"plain": True, "method": jpfq.OPTQ()},
    "Qronos": {"plain": True, "method": jpfq.Qronos()},
    "best": {},
}


def rules_of(name: str, method: str, inputs: dict[str, int], model, batch, **state) -> list[jpfq.Rule]:
    """The rules of a format: groups where they divide the inputs of a kernel, by path, and else a step per neuron."""
    own = METHODS[method]
    if name in CODEBOOKS:
        return jpfq.formats.codebook(CODEBOOKS[name], model, batch, **state, **own)
    (rule,) = FORMATS[name]
    searched = rule.scale
    base = searched.base
    per = base.per
    size = per.size if isinstance(per, jpfq.scale.PerGroup) else 1
    stored = {"step_dtype": rule.step_dtype}
    if name == "Q4_K":  # which has a float16 for 256 inputs
        size, stored = 256, {"step_dtype": "float16"}

    def make(pattern, per, **stored):
        laid = dataclasses.replace(base, per=per)
        scale = laid if own.get("plain") else dataclasses.replace(searched, base=laid)
        return dataclasses.replace(rule, pattern=pattern, scale=scale, **own, **stored)

    odd = [path for path, n in inputs.items() if n % size]
    rules = [make(path, jpfq.scale.PerChannel(), **stored) for path in odd]
    return rules if len(odd) == len(inputs) else [*rules, make(".*", per)]


def layer(seed: int = 0) -> tuple[dict, list]:
    """Weights with outlying inputs, and rows of correlated inputs."""
    rng = np.random.default_rng(seed)
    n, out = 512, 256
    W = rng.standard_normal((n, out)) * rng.lognormal(0, 0.7, (n, 1))
    mix = np.eye(n) + 0.7 * rng.standard_normal((n, n)) / np.sqrt(n)
    X = rng.standard_normal((2048, n)) * rng.lognormal(0, 0.5, n) @ mix
    return {"kernel": jnp.asarray(W, jnp.float32)}, [jnp.asarray(X, jnp.float32)]


def front(found: dict[str, tuple[float, float]]) -> str:
    """The formats that no other beats with as many bits or fewer, of bits and loss by name."""
    beaten = lambda b, lost: any(c <= b and other < lost for c, other in found.values())
    rows = sorted((b, lost, name) for name, (b, lost) in found.items() if not beaten(b, lost))
    return ", ".join(f"{name} ({b:.2f})" for b, _, name in rows)


class Kept:
    """Losses as they come: said, and kept in a file from which a later run goes on."""

    def __init__(self, file: Path | None):
        self.file, self.known = file, {}
        if file is not None and file.exists():
            self.known = {tuple(key): lost for *key, lost in map(json.loads, file.read_text().splitlines())}

    def __call__(self, key: tuple[str, str, str], lose: Callable[[], float]) -> float:
        if key not in self.known:
            self.known[key] = lose()
            print(*key, f"{self.known[key]:.6g}", file=sys.stderr, flush=True)
            if self.file is not None:
                with self.file.open("a") as lines:
                    lines.write(json.dumps([*key, self.known[key]]) + "\n")
        return self.known[key]


class Part(NamedTuple):
    """A subject that formats are compared on. `call` are the arguments of `jpfq.plan` and the like but for the rules."""

    name: str
    unit: str
    shown: Callable[[float], str]
    model: Any
    batch: Any
    weights: dict[str, Any]  # params=.. or variables=..
    kernels: dict[str, tuple[int, int]]  # inputs, and how many weights
    lose: Callable[[str, list], float]  # from a name and rules

    def rows(self, names: list[str], kept: Kept) -> tuple[str, str]:
        """The table with a line on the best formats, and the verdict."""
        rows, lost, stored = [], {}, {}
        inputs = {path: n for path, (n, _) in self.kernels.items()}
        make = lambda name, method: rules_of(name, method, inputs, self.model, self.batch, **self.weights)
        for method, name in itertools.product(sorted(METHODS, key=lambda m: m not in ("RTN", "best")), names):
            run = lambda name=name, method=method: self.lose(f"{self.name}: {name}, {method}", make(name, method))
            lost[name, method] = kept((self.name, name, method), run)
        for name in names:
            packed = jpfq.plan(self.model, self.batch, make(name, "best"), **self.weights).packed
            stored[name] = 8 * sum(packed.values()) / sum(count for _, count in self.kernels.values())
            rows.append([name, f"{stored[name]:.3f}", *(self.shown(lost[name, m]) for m in METHODS)])
        wins = [lost[name, "best"] < lost[name, "RTN"] for name in names]
        least = front({name: (stored[name], lost[name, "best"]) for name in names})
        said = table([f"{self.name}, {self.unit}", "bits", *METHODS], rows)
        claim = f"{self.name}: best beats the rounding of {sum(wins)} of {len(wins)} formats"
        return f"{said}\nBest at as many bits or fewer: {least}", verdict(all(wins), claim)


def of_layer(args: argparse.Namespace) -> Part:
    """The synthetic layer."""
    params, batches = layer()
    product = lambda params, x: x @ params["kernel"]

    def lose(name, rules):
        found = jpfq.quantize(product, batches, rules, params=params, progress=False)
        return 100 * float(found.info["kernel"].relative_error)

    kernels = {"kernel": (params["kernel"].shape[0], params["kernel"].size)}
    return Part("layer", "per cent", "{:.2f}".format, product, batches[0], {"params": params}, kernels, lose)


def of_model(name: str, subject: models.Subject) -> Part:
    """A model, by what is lost of its score."""
    rule = jpfq.Rule(".*", bits=8, plain=True, method=jpfq.MSQ(), scale=jpfq.scale.AbsMax())
    few = [jax.tree.map(lambda x: x[:2], subject.batches[0])]
    found = jpfq.quantize(subject.model, few, rule, variables=subject.variables, progress=False)
    kernels = {path: (t.codes.size // t.step.size, t.codes.size) for path, t in found.tensors.items()}
    lose = lambda name, rules: subject.sign * (subject.exact - subject.quantized(name, rules))
    weights = {"variables": subject.variables}
    unit = f"{subject.unit} lost"
    return Part(name, unit, subject.shown, subject.model, subject.batches[0], weights, kernels, lose)


PARTS = {
    "layer": of_layer,
    "resnet20": lambda args: of_model("resnet20", models.resnet20(args, 2000)),
    "stories": lambda args: of_model("stories", models.stories(args, 256)),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", choices=ALL, default=USUAL)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--images", type=int, default=250)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--keep", type=Path, help="a file for results as they come, from which a later run goes on")
    add_data(parser)
    args = parser.parse_args()
    kept = Kept(args.keep)
    found = [PARTS[name](args).rows(args.formats, kept) for name in args.parts]
    report("formats", parser, args, *(text for text, _ in found), "\n".join(said for _, said in found))


if __name__ == "__main__":
    main()

"""Claim: with weights, inputs and cache at 4 bits the recommended recipe beats plain rounding, with and without rotation.

Run: python bench/attention.py

Nats per token that a Llama of 260,000 parameters loses against float. All kernels are quantized, a step per neuron, and the
inputs of all layers, a step per row (token), taken while the network runs:

W4A8      weights of 4 bits, inputs of 8
W4A4      inputs of 4
W4A4KV4   keys and values of 4 bits too, with a zero point, a step per head and token, as a cache holds them
NVFP4     weights and inputs in blocks of 16, steps in E4M3
MXFP4     weights and inputs in blocks of 32, steps that are powers of two; on request
FP8       E4M3, a step per neuron and per row; on request

A second table has the cache alone, all else in float.

RTN is plain rounding, the largest weight on the top level. Rotated: weights and inputs by one Hadamard rotation, keys and
values along the head. Where a block does not divide the inputs of a kernel, its weights have a step per neuron.
"""

import argparse
import dataclasses

import jax.numpy as jnp
import models
from common import add_data, report, table, verdict
from formats import rules_of

import jpfq

PER_ROW = {f"A{bits}": jpfq.Activations(jpfq.Integer(bits), per="row") for bits in (4, 8)}
KV4 = jpfq.Activations(jpfq.Asymmetric(4), per="row")
CONFIGURATIONS = {  # the format of weights in formats.py, settings of inputs, and of the cache
    "W4A8": (None, PER_ROW["A8"], None),
    "W4A4": (None, PER_ROW["A4"], None),
    "W4A4KV4": (None, PER_ROW["A4"], KV4),
    "NVFP4": ("NVFP4", jpfq.Activations(jpfq.E2M1(), group=16, step_dtype=jnp.float8_e4m3fn), None),
    "MXFP4": ("MXFP4", jpfq.Activations(jpfq.E2M1(), group=32, step_dtype=jnp.float8_e8m0fnu), None),
    "FP8": ("FP8 per channel", jpfq.Activations(jpfq.E4M3(), per="row"), None),
}
CACHES = {  # with all else in float
    "keys and values, 8 bits": (".*", 8),
    "values, 4 bits": (".*/value", 4),
    "keys, 4 bits": (".*/key", 4),
}
ROUNDED = {"plain": True, "method": jpfq.MSQ(), "scale": jpfq.scale.AbsMax()}
NAMES = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
COLUMNS = {
    "RTN": ("RTN", False),
    "RTN, rotated": ("RTN", True),
    "best": ("best", False),
    "best, rotated": ("best", True),
}


def rules(configuration: str, method: str, rotated: bool, inputs: dict[str, int]) -> list[jpfq.Rule]:
    """The rules of a configuration; `inputs` are those of each kernel, by path."""
    name, activations, cache = CONFIGURATIONS[configuration]
    if name is None:
        found = [jpfq.Rule(".*", grid=jpfq.Integer(4, narrow=True), **(ROUNDED if method == "RTN" else {}))]
    else:
        found = rules_of(name, method, inputs)
    turn = jpfq.Hadamard() if rotated else None
    turned = lambda own: None if own is None else dataclasses.replace(own, rotation=turn)
    found = [dataclasses.replace(rule, rotation=turn, activations=turned(activations)) for rule in found]
    return found if cache is None else [jpfq.Rule(".*", cache=turned(cache)), *found]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configurations", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS)[:4])
    parser.add_argument("--windows", type=int, default=8, help="calibration windows of 256 tokens")
    parser.add_argument("--tests", type=int, default=32, help="windows that are scored")
    add_data(parser)
    args = parser.parse_args()
    subject = models.stories(args, args.tests)
    widths = {f"blocks/{i}/{name}/kernel": 172 if name == "w2" else 64 for i in range(5) for name in NAMES}
    rows, lost = [], {}
    for configuration in args.configurations:
        for column, (method, rotated) in COLUMNS.items():
            found = subject.quantized(f"{configuration}, {column}", rules(configuration, method, rotated, widths))
            lost[configuration, column] = found - subject.exact
        rows.append([configuration, *(f"{lost[configuration, column]:.4f}" for column in COLUMNS)])
        print(*rows[-1], flush=True)
    alone = {}
    for name, (pattern, bits) in CACHES.items():
        rule = jpfq.Rule(pattern, cache=dataclasses.replace(KV4, grid=jpfq.Asymmetric(bits)))
        alone[name] = subject.quantized(name, rule) - subject.exact
    wins = [lost[c, f"best{r}"] < lost[c, f"RTN{r}"] for c in args.configurations for r in ("", ", rotated")]
    below = verdict(all(wins), f"best loses less than plain rounding in {sum(wins)} of {len(wins)} cases")
    head = [f"nats lost of {subject.exact:.4f}", *COLUMNS]
    cached = table(["the cache alone", "lost"], [[name, f"{x:.4f}"] for name, x in alone.items()])
    report("attention", parser, args, table(head, rows), cached, below)


if __name__ == "__main__":
    main()

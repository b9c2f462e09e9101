"""Claim: a first call, compilation included, takes a few times as long as a second. Run: python bench/first_call.py

Each model and recipe in a process of its own, two calls of `quantize` one after the other; processor seconds, programs
compiled, and the peak of the resident set. ResNet20 on 500 images and stories260K on 64 windows; EfficientNet-Lite0 has
random weights and 32 random images of 224 x 224, as what it takes is a matter of its 32 different sizes of kernels.
"""

import argparse
import collections
import json
import resource
import subprocess
import sys
import time
from typing import Any

import jax
import models
import networks
import numpy as np
from common import PLAIN, add_data, report, table, verdict

import jpfq

RECIPES = {"best": jpfq.Rule(".*", bits=4), "GPFQ": PLAIN}
TARGETS = {"resnet20": (60, 2.5), "efficientnet": (80, 3.0)}  # programs, and first over second


def efficientnet(args: argparse.Namespace) -> tuple[Any, dict, list]:
    """EfficientNet-Lite0, its variables and batches."""
    rng, model = np.random.default_rng(0), networks.EfficientNetLite0()
    batches = [rng.standard_normal((16, 224, 224, 3)).astype(np.float32) for _ in range(2)]
    return model, jax.jit(model.init)(jax.random.key(0), batches[0][:1]), batches


def subject(name: str, args: argparse.Namespace) -> tuple[Any, dict | None, list]:
    """A model, its variables and batches."""
    if name == "efficientnet":
        return efficientnet(args)
    found = getattr(models, name)(args)
    return found.model, found.variables, found.batches


def calls(name: str, recipe: str, args: argparse.Namespace) -> list[dict]:
    """The costs of a first and a second call in this process."""
    model, variables, batches = subject(name, args)
    compiled: collections.Counter = collections.Counter()

    def listen(event, seconds, **_):
        if event.endswith("backend_compile_duration"):
            compiled.update(programs=1, seconds=seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    found = []
    for _ in range(2):
        compiled.clear()
        start, wall = time.process_time(), time.perf_counter()
        result = jpfq.quantize(model, batches, RECIPES[recipe], variables=variables, progress=False)
        jax.block_until_ready(result.params)
        took = {"cpu": time.process_time() - start, "wall": time.perf_counter() - wall}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        found.append(took | {"programs": compiled["programs"], "compiling": compiled["seconds"], "peak": peak})
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["resnet20", "stories", "efficientnet"])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "RECIPE"), help="in this process, as JSON")
    add_data(parser)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(calls(*args.one, args)))
        return
    rows, verdicts = [], []
    for name in args.models:
        for recipe in args.recipes:
            command = [sys.executable, __file__, "--one", name, recipe, "--data", str(args.data)]
            command += ["--images", str(args.images), "--windows", str(args.windows)]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            first, second = json.loads(out.splitlines()[-1])
            cells = [f"{first['programs']}", f"{first['compiling']:.0f}", f"{first['cpu']:.0f}", f"{first['wall']:.0f}"]
            ratio = first["cpu"] / second["cpu"]
            rows.append([name, recipe, *cells, f"{second['cpu']:.1f}", f"{ratio:.1f}", f"{first['peak']:.0f}"])
            print(*rows[-1], file=sys.stderr, flush=True)
            if name in TARGETS:
                programs, most = TARGETS[name]
                verdicts.append(
                    verdict(
                        first["programs"] <= programs,
                        f"{name}, {recipe}: at most {programs} programs: {first['programs']}",
                    )
                )
                verdicts.append(
                    verdict(ratio <= most, f"{name}, {recipe}: first at most {most} times the second: {ratio:.1f}")
                )
    head = [
        "model",
        "recipe",
        "programs",
        "compiling, s",
        "first, CPU s",
        "first, s",
        "second, CPU s",
        "ratio",
        "peak, MiB",
    ]
    report("first_call", parser, args, table(head, rows), "\n".join(verdicts))


if __name__ == "__main__":
    main()

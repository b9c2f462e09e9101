"""Solves on eight virtual devices, data 2 x model 4, against one: run by test_shard.py as a program of its own.

    python -m tests.matrix.eight few | all

prints a line of JSON for each solve, {name: {type: found}}: how many codes differ, how far steps and figures are apart,
and what the compiled program sends inside its loops.
"""

import dataclasses
import importlib
import json
import os
import re
import sys

os.environ["XLA_FLAGS"] = (  # on a machine of few cores devices wait for each other
    "--xla_backend_optimization_level=0 --xla_cpu_collective_call_terminate_timeout_seconds=600 "
    "--xla_force_host_platform_device_count=8"
)

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jpfq
from jpfq.matrix import Devices, Rows, recipe_of, solve_all
from jpfq.matrix.shard import SQUARES, program
from jpfq.scalar import Codes
from tests.helpers import PLAIN, problem

N, DEAD = 40, (3, 17)
MESH = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))
MODEL, BOTH = Devices(MESH, ("model",)), Devices(MESH, ("model", "data"))
METHODS = [jpfq.MSQ(), jpfq.GPFQ(), jpfq.UNI(2.0), jpfq.OPTQ(), jpfq.QEP(), jpfq.GPTAQ(), jpfq.Qronos()]
METHODS += [jpfq.Qronos(exact=True)]
ROUNDINGS = [
    jpfq.rounding.Nearest(),
    jpfq.rounding.Stochastic(),
    jpfq.rounding.SoftThreshold(0.1),
    jpfq.rounding.HardThreshold(0.1),
    jpfq.rounding.Prune(0.3),
]
TENSOR = jpfq.scale.PerTensor()
GPFQ = PLAIN | {"method": jpfq.GPFQ(), "block": 8}

# name: settings, neurons, matrices, devices, form of the data
FEW = {
    "recommended": ({}, 10, 1, BOTH, "gram"),
    "shared steps, drawn": (
        {
            "scale": jpfq.scale.MinError(jpfq.scale.Quantile(0.9), candidates=3),
            "method": jpfq.UNI(2.0),
            "rounding": jpfq.rounding.Stochastic(),
            "shrinkage": None,
            "finish": jpfq.finish.CosineDescend(1),
        },
        10,
        3,
        MODEL,
        "gram",
    ),
    "split": (GPFQ | {"order": jpfq.order.Descending(), "finish": jpfq.finish.Descend(1)}, 10, 1, BOTH, "split"),
    "rows, pruned": (
        GPFQ
        | {
            "form": "data",
            "method": jpfq.UNI(),
            "rounding": jpfq.rounding.Prune(0.3),
            "scale": jpfq.scale.Median(per=TENSOR),
        },
        10,
        1,
        MODEL,
        "rows",
    ),
}
FIXED = np.linspace(0.3, 0.5, 10)
ALL = FEW | {
    "one neuron each": ({"scale": jpfq.scale.MinError(candidates=3)}, 8, 1, BOTH, "gram"),
    "refit groups": (
        PLAIN | {"scale": jpfq.scale.AbsMax(per=jpfq.scale.PerGroup(8, refit=True)), "method": jpfq.OPTQ()},
        10,
        1,
        MODEL,
        "gram",
    ),
    "groups": (PLAIN | {"scale": jpfq.scale.MinMSE(per=jpfq.scale.PerGroup(8), weighted=True)}, 10, 2, BOTH, "gram"),
    "rotated": (PLAIN | {"rotation": jpfq.Hadamard(), "finish": jpfq.finish.Refit()}, 10, 1, MODEL, "gram"),
    "prepared": (
        PLAIN
        | {
            "prepare": (jpfq.prepare.Align(2), jpfq.prepare.MagR(iterations=5), jpfq.prepare.LeastSquares()),
            "order": jpfq.order.MinPivot(),
        },
        10,
        1,
        MODEL,
        "gram",
    ),
    "walked": (
        PLAIN | {"prepare": jpfq.prepare.MalySaab(), "method": jpfq.MSQ(), "form": "data"},
        10,
        1,
        BOTH,
        "few rows",
    ),
    "fixed": (PLAIN | {"scale": jpfq.scale.Fixed(FIXED)}, 10, 1, BOTH, "gram"),
    "fixed, one step": (
        PLAIN | {"scale": jpfq.scale.Fixed(0.4), "finish": jpfq.finish.Descend(1)},
        10,
        1,
        BOTH,
        "gram",
    ),
    "absmax, shared": (
        PLAIN | {"scale": jpfq.scale.AbsMax(per=TENSOR), "finish": jpfq.finish.Refit()},
        10,
        2,
        BOTH,
        "gram",
    ),
    "mse, shared": (PLAIN | {"scale": jpfq.scale.MinMSE(per=TENSOR)}, 8, 1, BOTH, "gram"),
    "split, searched": (
        GPFQ
        | {"scale": jpfq.scale.MinError(jpfq.scale.AbsMax(), candidates=3), "finish": jpfq.finish.CosineDescend(1)},
        10,
        1,
        MODEL,
        "split",
    ),
    "split, drawn": (
        GPFQ | {"method": jpfq.UNI(), "rounding": jpfq.rounding.Stochastic(), "order": jpfq.order.Descending()},
        10,
        2,
        BOTH,
        "split",
    ),
    "split, refit": (GPFQ | {"scale": jpfq.scale.AbsMax(per=jpfq.scale.PerGroup(8, refit=True))}, 8, 1, BOTH, "split"),
}
PAIRS = [(method, ROUNDINGS[(i + shift) % 5]) for i, method in enumerate(METHODS) for shift in (0, 2)]
ALL |= {  # every method with two roundings, every rounding with three methods or more
    f"{method} {rounding}": (PLAIN | {"method": method, "rounding": rounding, "block": 16}, 10, 1, BOTH, "gram")
    for method, rounding in PAIRS
}


def given(out, matrices, form, dtype):
    """W (matrices, N, out) and data in a form."""
    drawn = [problem(seed, n=N, out=out, dead=DEAD, m=20 if form == "few rows" else 64) for seed in range(matrices)]
    X, Xq, W = (jnp.stack([jnp.asarray(x[i], dtype) for x in drawn]) for i in range(3))
    rows = Rows(X, Xq)
    return W, rows if "rows" in form else jax.vmap(lambda rows: rows.gram())(rows)


def compare(settings, out, matrices, devices, form, dtype):
    """What differs between one device and many."""
    recipe, key = recipe_of(3, None, **settings), jax.random.key(5)
    W, data = given(out, matrices, form, dtype)
    one = solve_all(W, data, recipe, key)
    if form == "split":
        data = dataclasses.replace(data, **{k: jax.device_put(getattr(data, k), devices.rows) for k in SQUARES})
    if out % 4 == 0:
        W = jax.device_put(W, NamedSharding(MESH, P(None, None, "model")))
    compiled = program(W, data, recipe, key, devices)
    many = compiled(W, data, dataclasses.replace(recipe, grid=Codes.of(recipe.grid)), key)
    figures = [
        abs(float(a) - float(b)) / (1 + abs(float(a))) for a, b in zip(*map(jax.tree.leaves, (one.info, many.info)))
    ]
    result = {
        "differ": int((one.codes != many.codes).sum()),
        "codes": one.codes.size,
        "shape": many.step.shape == one.step.shape and many.codes.shape == one.codes.shape,
        "steps": float(jnp.max(jnp.abs(many.step - one.step) / one.step)),
        "values": float(jnp.max(jnp.abs(many.q - one.q))),
        "figures": max(x for x in figures if x == x),
    }
    return result | sent(compiled.as_text())


CALLS = r"%([\w.\-]+)"
KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|collective-broadcast"
SENDS = rf"= \(?(\w+\[[\d,]*\]).* ({KINDS})(?:-start)?\("


def sent(text):
    """What a program sends: in any of its loops, and in the recursion, the innermost of the loops that round."""
    bodies, name = {}, None
    for line in text.splitlines():
        if line.rstrip().endswith("{") and "->" in line:
            name = line.split()[1 if line.startswith("ENTRY") else 0].lstrip("%")
            bodies[name] = []
        elif name is not None:
            bodies[name].append(line)
    called = {n: {c for line in lines for c in re.findall(CALLS, line) if c in bodies} for n, lines in bodies.items()}
    loops = {body for lines in bodies.values() for line in lines for body in re.findall(r"body=%?([\w.\-]+)", line)}

    def within(name):
        seen, todo = set(), [name]
        while todo:
            here = todo.pop()
            if here not in seen:
                seen.add(here)
                todo.extend(called[here])
        return [line for n in seen for line in bodies[n]]

    found = {"loops": [], "recursion": []}
    recursions = 0
    rounds = {loop for loop in loops if any(" floor(" in line for line in within(loop))}
    for loop in loops:
        lines = within(loop)
        what = [f"{kind} {shape}" for line in lines for shape, kind in re.findall(SENDS, line)]
        found["loops"] += what
        if loop in rounds and not any(other in line for line in lines for other in rounds - {loop}):
            found["recursion"] += what
            recursions += 1
    return {name: sorted(set(kinds)) for name, kinds in found.items()} | {"recursions": recursions}


def control():
    """A loop that does gather and round, which `sent` must see."""
    turn = lambda x, _: (jnp.floor(lax.all_gather(x, "model").sum(0) / 3), None)
    run = jax.shard_map(
        lambda x: lax.scan(turn, x, length=5)[0], mesh=MESH, in_specs=P("model"), out_specs=P("model"), check_vma=False
    )
    return sent(jax.jit(run).lower(jnp.ones(16)).compile().as_text())


def main(which):
    importlib.import_module("jpfq.matrix.split").AT_ONCE = 16
    importlib.import_module("jpfq.matrix.recursion").PANEL = 16
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    print(json.dumps({"control": control()}))
    for name, (settings, *case) in {"few": FEW, "all": ALL}[which].items():
        found = {}
        for dtype in ("float64", "float32") if which == "all" and name in FEW else ("float64",):
            with jax.enable_x64(dtype == "float64"):
                found[dtype] = compare(settings, *case, dtype)
        print(json.dumps({name: found}), flush=True)
        jax.clear_caches()


if __name__ == "__main__":
    main(sys.argv[1])

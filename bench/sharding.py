"""The memory of a solve on each device: one device against eight virtual ones, with the Gram replicated or split.

Sizes are XLA's own for the compiled program of one device: arguments, results, and temporaries. Codes
of all programs are compared at the small size.
"""

import argparse
import dataclasses
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
from common import report, table, verdict
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jpfq
from jpfq.matrix import Devices, Gram, recipe_of, solve_all, solve_sharded
from jpfq.matrix.shard import SQUARES, program

PLAIN = {"scale": jpfq.scale.AbsMax(), "order": jpfq.order.Natural(), "finish": None, "shrinkage": None}
RECIPES = {
    "GPFQ": PLAIN | {"method": jpfq.GPFQ()},
    "GPFQ, searched": PLAIN
    | {"method": jpfq.GPFQ(), "scale": jpfq.scale.MinError(), "finish": jpfq.finish.CosineDescend()},
    "Qronos": PLAIN | {"method": jpfq.Qronos()},
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=8192, help="n")
    parser.add_argument("--neurons", type=int, default=2048, help="O")
    args = parser.parse_args()
    n, out = args.inputs, args.neurons
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("data", "model"))
    eight, one = Devices(mesh, ("model", "data")), Devices(Mesh(jax.devices()[:1], ("x",)), ("x",))
    rows, least = [], {}
    for name, settings in RECIPES.items():
        recipe = recipe_of(4, None, **settings)
        for how, devices, split in (("one", one, False), ("eight", eight, False), ("eight, Gram split", eight, True)):
            if split and name == "Qronos":
                continue
            W, gram = shapes(n, out, devices, split)
            memory = program(W, gram, recipe, None, devices).memory_analysis()
            parts = (memory.argument_size_in_bytes, memory.output_size_in_bytes, memory.temp_size_in_bytes)
            least[name, how] = sum(parts)
            rows.append((name, how, *(f"{x / 2**20:,.0f}" for x in (*parts, sum(parts)))))
    given = 4 * (n * out + 2 * n * n) / 2**20
    share = least["GPFQ", "one"] / 8 / 2**20
    peak = least["GPFQ", "eight, Gram split"] / 2**20
    report(
        "sharding",
        parser,
        args,
        f"n = {n}, O = {out}, float32. W, H and C together: {given:,.0f} MiB. Megabytes (MiB) per device:",
        table(("method", "devices", "given", "returned", "temporary", "peak"), rows),
        f"Codes of n = 512, O = 64 that differ from one device's: {differing(eight)}.",
        verdict(
            peak < given,
            f"GPFQ with the Gram split: peak {peak:,.0f} MiB per device, less than W, H and C together "
            f"({given:,.0f} MiB); an eighth of what one device needs is {share:,.0f} MiB",
        ),
    )


def shapes(n, out, devices, split):
    """W, and a Gram of inputs that have drifted, as shapes with shardings."""
    whole = NamedSharding(devices.mesh, P())
    placed = lambda shape, sharding: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    W = placed((1, n, out), NamedSharding(devices.mesh, P(None, None, devices.axes)))
    square = placed((1, n, n), devices.rows if split else whole)
    vector = placed((1, n), whole)
    return W, Gram(square, square, square, vector, vector, placed((1,), whole))


def differing(devices):
    """By recipe, whole and split."""
    X = jax.random.normal(jax.random.key(0), (1, 1024, 512))
    Xq = X + 0.1 * jax.random.normal(jax.random.key(1), X.shape)
    W = jax.random.normal(jax.random.key(2), (1, 512, 64))
    gram = jax.vmap(Gram.from_data)(X, Xq)
    split = dataclasses.replace(gram, **{k: jax.device_put(getattr(gram, k), devices.rows) for k in SQUARES})
    found = []
    for name, settings in RECIPES.items():
        recipe = recipe_of(4, None, **settings)
        codes = solve_all(W, gram, recipe, None).codes
        counts = [int((solve_sharded(W, data, recipe, None, devices).codes != codes).sum()) for data in (gram, split)]
        found.append(f"{name} {counts[0]} and {counts[1]} of {codes.size:,}")
    return ", ".join(found) + " (Gram whole, and split)"


if __name__ == "__main__":
    main()

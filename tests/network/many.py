"""A model on many devices: run by test_shard.py as programs of their own, which print one JSON object.

python -m tests.network.many eight few|all         one process, data 2 x model 4
python -m tests.network.many sweep             likewise, a sweep with its settings on one axis or nothing split but batches
python -m tests.network.many alone CASES           one process without a mesh
python -m tests.network.many host CASES RANK PORT  one of two processes of two devices each, data 2 x model 2
"""

import json
import os
import sys
import tempfile

os.environ["XLA_FLAGS"] = (  # on a machine of few cores devices wait for each other
    "--xla_backend_optimization_level=0 --xla_cpu_collective_call_terminate_timeout_seconds=600 "
    f"--xla_force_host_platform_device_count={'8' if sys.argv[1] in ('eight', 'sweep') else '2'}"
)
os.environ["NPROC"] = "64"  # threads, so that programs in which devices wait never want for one

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jpfq
from jpfq.matrix import shard
from tests.network import zoo

SPECS = {"a": P(None, "model"), "b": P("model"), "c": P("model"), "d": P(None, None, None, "model"), "e": P()}
RULES = {
    "plain": [zoo.plain(bits=3, correct_bias=True)],
    "recommended": [jpfq.Rule(".*", bits=3)],
    "offload": [jpfq.Rule(".*", bits=3, activation_bits=4)],
    "block": [
        zoo.plain("a", bits=3, form="data", rounding=jpfq.rounding.Stochastic()),
        zoo.plain("[bd]", bits=3, scale=jpfq.scale.Quantile(), patches=jpfq.patches.Random(0.5)),
        zoo.plain(bits=3, coupling=jpfq.Coupling()),
    ],
}


def model(params, x, image):
    """Dense layers split over neurons, over inputs and not at all, and convolutions with groups and without."""
    y = jax.nn.relu(x @ params["a"]) @ params["b"] + params["c"]
    return y, conv(conv(image, params["e"], 4), params["d"], 1)


def conv(x, w, groups):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=dimensions, feature_group_count=groups)


def given():
    """Parameters and batches, as NumPy arrays."""
    rng = np.random.default_rng(0)
    shapes = {"a": (16, 24), "b": (24, 12), "c": (12,), "d": (3, 3, 4, 8), "e": (3, 3, 1, 4)}
    params = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    return params, [(rng.standard_normal((8, 5, 16)), rng.standard_normal((8, 6, 6, 4))) for _ in range(2)]


def placed(mesh):
    """The same on a mesh."""
    put = lambda x, spec: jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda place: x[place])
    params, batches = given()
    return {k: put(x, SPECS[k]) for k, x in params.items()}, [tuple(put(x, P("data")) for x in b) for b in batches]


def quantized(case, params, batches, rules=None, checkpoint=None):
    """The model, quantized as a case says."""
    how = {"checkpoint": checkpoint, "offload": case == "offload", "reference": "block" if case == "block" else "float"}
    return jpfq.quantize(
        model, batches, rules or RULES[case], params=params, key=jax.random.key(1), progress=False, **how
    )


def whole(x):
    """An array that this process can read."""
    mesh = getattr(getattr(x, "sharding", None), "mesh", None)
    return np.asarray(x if mesh is None or x.is_fully_replicated else jax.device_put(x, NamedSharding(mesh, P())))


def facts(result, params):
    """What is to be compared."""
    return {
        "codes": {path: whole(tensor.codes).tolist() for path, tensor in result.tensors.items()},
        "error": {path: float(info.relative_error) for path, info in result.info.items()},
        "bias": whole(result.params["c"]).tolist(),
        "kept": {k: result.params[k].sharding == x.sharding for k, x in params.items() if isinstance(x, jax.Array)},
        "output": result.output_error,
    }


def eight(which):
    auto = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    explicit = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    params, batches = given()
    yield "one", facts(quantized("plain", params, batches), params)
    params, batches = placed(auto)
    yield "auto", facts(quantized("plain", params, batches), params)
    params, batches = placed(explicit)
    yield "explicit", facts(quantized("plain", params, batches), params)
    named = lambda params, x: jnp.einsum("bti,io->bto", x, params["a"], out_sharding=P("data"))
    try:
        jpfq.quantize(named, [x for x, _ in batches], RULES["plain"], params={"a": params["a"]})
    except ValueError as error:
        yield "refused", str(error)
    if which == "few":
        return
    with jax.set_mesh(explicit):
        result = quantized("plain", params, batches)
        yield "set_mesh", facts(result, params)
        apart = [np.abs(whole(result.tensors[k].dequantize()) - whole(result.params[k])).max() for k in "abde"]
        outputs = model(jax.tree.map(whole, result.params), *map(whole, batches[0]))
        apart += [np.abs(whole(x) - y).max() for x, y in zip(result.apply(batches[0]), map(np.asarray, outputs))]
        yield "usable", [float(x) for x in apart]
    params, batches = placed(auto)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("kept", "resumed"):
            yield name, facts(quantized("plain", params, batches, checkpoint=f"{folder}/run"), params)
            jax.clear_caches()
    params, batches = placed(explicit)
    shard.WHOLE = 400  # so that the Gram of layer b is split
    jax.clear_caches()
    yield "split", facts(quantized("plain", params, batches), params)


def sweep():
    rule = lambda bits, c: zoo.plain(
        bits=bits, scale=jpfq.scale.AbsMax(c), correct_bias=True, activation_bits=8, rounding=jpfq.rounding.Stochastic()
    )
    points = [{"bits": bits, "c": c, "seed": seed} for bits, c, seed in ((2, 0.7, 0), (3, 0.8, 0), (3, 0.8, 1))]
    space = jpfq.Space.listed(points, rule)  # fewer than devices of the axis
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    params, batches = given()
    on = lambda spec: lambda x: jax.device_put(x, NamedSharding(mesh, spec))
    settings = {"sharding": NamedSharding(mesh, P("model"))}
    for name, model_at, batches_at, how in (
        ("one", None, None, {}),
        ("settings", None, None, settings),
        ("settings and batches", P(), P("data"), settings),
        ("neurons and batches", P(None), P("data"), {}),
    ):
        own, data = params, batches
        if model_at is not None:
            own, data = jax.tree.map(on(model_at), params), jax.tree.map(on(batches_at), batches)
        square = lambda q, data=data: sum(jnp.mean(x**2) for x in q.apply(data[0]))
        found = jpfq.sweep(model, data, space, params=own, evaluate=square, progress=False, **how)
        codes = [{k: whole(t.codes).tolist() for k, t in found[i].tensors.items()} for i in range(len(found))]
        arrays = jax.tree.leaves((found[2].params, found[2].tensors, found[2].inputs))
        places = {str(x.sharding) for x in arrays if isinstance(x, jax.Array)}
        yield name, {"codes": codes, "loss": [r["loss"] for r in found.records], "places": sorted(places)}
    for name, where, how in (
        ("another mesh", jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)), P("data")),
        ("the same axis", mesh, P("model")),
    ):
        moved = [jax.tree.map(lambda x, w=where, h=how: jax.device_put(x, NamedSharding(w, h)), b) for b in batches]
        try:
            jpfq.sweep(model, moved, space, params=params, progress=False, **settings)
        except ValueError as error:
            yield name, str(error)


def alone(cases):
    for case in cases.split(","):
        yield case, facts(quantized(case, *given()), {})


def host(cases, rank, port):
    rank = int(rank)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    params, batches = placed(mesh)
    other = [tuple(x + rank for x in batch) for batch in given()[1]]
    local = params | {"c": jax.device_put(given()[0]["c"] + rank, jax.local_devices()[0])}
    for name, arguments in {
        "rules": (params, batches, [zoo.plain(bits=3 + rank)]),
        "number": (params, batches[: 1 + rank]),
        "values": (params, other),
        "parameters": (local, batches),
        "checkpoint": (params, batches, None, "here"),
    }.items():
        try:
            quantized("plain", *arguments)
        except ValueError as error:
            yield name, str(error)
    for case in filter(None, cases.split(",")):
        yield case, facts(quantized(case, params, batches), params)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    command, *rest = sys.argv[1:]
    print(json.dumps(dict({"eight": eight, "sweep": sweep, "alone": alone, "host": host}[command](*rest))))

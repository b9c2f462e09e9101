"""Results in whatever context they are made and used: meshes, traces, pickles, terminals.

What a result says in one context is compared with what the same saved numbers say in none, in NumPy.
"""

import contextlib
import copy
import dataclasses
import os
import pickle
import subprocess
import sys
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jpfq
from jpfq.study.cli import main
from jpfq.study.compare import Subject
from jpfq.study.evaluate import evaluate
from tests.network import zoo

RULE = zoo.plain(bits=4, activation_bits=8, accumulator=jpfq.Accumulator(16, tile=8))
X = np.random.default_rng(0).standard_normal((32, 8)).astype(np.float32)
PARAMS = {
    "a": np.random.default_rng(1).standard_normal((8, 16)).astype(np.float32),
    "b": np.random.default_rng(2).standard_normal((16, 4)).astype(np.float32),
}


def layers(p, x):
    return jax.nn.relu(x @ p["a"]) @ p["b"]


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, use_bias=False, name="b")(nn.relu(nn.Dense(16, use_bias=False, name="a")(x)))


class Nnx(nnx.Module):
    def __init__(self):
        self.a = nnx.Linear(8, 16, use_bias=False, rngs=nnx.Rngs(0))
        self.b = nnx.Linear(16, 4, use_bias=False, rngs=nnx.Rngs(0))
        self.a.kernel[...], self.b.kernel[...] = PARAMS["a"], PARAMS["b"]

    def __call__(self, x):
        return self.b(nnx.relu(self.a(x)))


def mesh_of(kind, name="data"):
    return jax.make_mesh((2,), (name,), axis_types=(kind,))


def within(mesh):
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def placed(mesh, how):
    """Parameters and a batch: free, whole on every device of a mesh, or split."""
    params, x = jax.tree.map(jnp.asarray, (PARAMS, X))
    if how == "free":
        return params, x
    put = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))
    columns, rows = (P(None, mesh.axis_names[0]), P(mesh.axis_names[0])) if how == "split" else (P(), P())
    return jax.tree.map(lambda x: put(x, columns), params), put(x, rows)


MADE = {
    "in none": (None, "free", True),
    "Explicit, free": (mesh_of(AxisType.Explicit), "free", True),
    "Auto, free": (mesh_of(AxisType.Auto), "free", True),
    "Explicit, whole": (mesh_of(AxisType.Explicit), "whole", True),
    "Explicit, split": (mesh_of(AxisType.Explicit), "split", True),
    "Explicit, split, none set": (mesh_of(AxisType.Explicit), "split", False),
    "Auto, split": (mesh_of(AxisType.Auto), "split", True),
}
USED = {
    "none": None,
    "Explicit": mesh_of(AxisType.Explicit),
    "Auto": mesh_of(AxisType.Auto),
    "other": mesh_of(AxisType.Explicit, "x"),
}


@pytest.mark.slow
@pytest.mark.parametrize("used", USED)
@pytest.mark.parametrize("made", MADE)
def test_a_result_serves_within_any_mesh(made, used, tmp_path):
    mesh, how, inside = MADE[made]
    with within(mesh if inside else None):
        params, x = placed(mesh, how)
        quantized = jpfq.quantize(layers, [x], RULE, params=params)
    tensors = {
        path: (np.asarray(t.codes, np.float64), np.asarray(t.step, np.float64)) for path, t in quantized.tensors.items()
    }
    kernels = {path: codes * step for path, (codes, step) in tensors.items()}  # this grid has no zero point
    size, said = quantized.save(tmp_path / "first"), quantized.summary()
    outputs = None
    with within(USED[used]):
        batch = jnp.asarray(X)
        assert quantized.summary() == said
        assert quantized.save(tmp_path / "second") == size
        loaded = jpfq.load(tmp_path / "second", layers, params=params)
        for made_of in (
            {path: t.dequantize() for path, t in quantized.tensors.items()},
            {path: jpfq.Packed.of(t).dequantize() for path, t in quantized.tensors.items()},
            {path: t.rounded(t.dequantize()).dequantize() for path, t in quantized.tensors.items()},
            jpfq.fake_quant(quantized.params, quantized),
            jpfq.fake_quant(quantized.tunable, quantized),
            jpfq.dequantize(quantized.serve().params),
            quantized.tuned(quantized.tunable).params,
            loaded.params,
        ):
            for path, kernel in kernels.items():
                np.testing.assert_allclose(np.asarray(made_of[path]), kernel, rtol=1e-6, atol=1e-7)
        for run in (quantized.apply, quantized.serve(), quantized.apply_integer, loaded.apply, loaded.serve()):
            found = np.asarray(run(batch))
            outputs = found if outputs is None else outputs
            np.testing.assert_allclose(found, outputs, rtol=1e-4, atol=1e-4)
        errors = [float(info.relative_error) for info in quantized.info.values()]
        np.testing.assert_allclose(
            errors,
            [float(np.sqrt(i.square_error / i.energy)) for i in map(host, quantized.info.values())],
            rtol=1e-5,
        )
        assert jpfq.certify(quantized, bits=16, tile=8).holds
        figures = evaluate(Subject("m", layers, params, [x], None), quantized)
        assert figures["output_error"] == pytest.approx(quantized.output_error, rel=1e-3)
        assert len(jpfq.plan(layers, batch, RULE, params=params).lines) == 2


def host(info):
    return jax.tree.map(np.asarray, dataclasses.replace(info, reach=None))


@pytest.mark.slow
def test_outputs_lie_on_the_mesh_that_is_set():
    free = jpfq.quantize(layers, [X], RULE, params=PARAMS)
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        x = jax.device_put(jnp.asarray(X), NamedSharding(mesh, P("data")))
        for run in (free.apply, free.serve()):
            assert int((run(x) + 1).argmax(-1).max()) < 4  # JAX refuses arrays of another mesh here
        assert layers(free.params, x).shape == (32, 4)
        gradient = jax.jit(jax.grad(lambda p: (layers(jpfq.fake_quant(p, free), x) ** 2).mean()))(free.tunable)
    assert all(np.abs(np.asarray(g)).max() > 0 for g in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_a_sweep_serves_within_any_mesh():
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        params, x = placed(mesh, "split")
        loss = lambda quantized: jnp.mean(quantized.apply(X) ** 2)
        swept = jpfq.sweep(
            layers, [x], jpfq.Space(lambda bits: zoo.plain(bits=bits), bits=[3, 4]), params=params, evaluate=loss
        )
    for used in USED.values():
        with within(used):
            for i, record in enumerate(swept.records):
                assert np.mean(np.asarray(swept[i].apply(jnp.asarray(X))) ** 2) == pytest.approx(
                    record["loss"], rel=1e-3
                )


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Whole:
    """A module as Equinox has them: a pytree that holds its functions too."""

    a: Any
    activation: Any

    def __call__(self, x):
        return self.activation(x @ self.a)


def test_what_has_no_values_is_refused_in_a_sentence():
    rule, x = zoo.plain(bits=4), jnp.asarray(X)
    shape = jax.ShapeDtypeStruct(X.shape, jnp.float32)
    run = lambda params, x: jpfq.quantize(layers, [x], rule, params=params).params
    many = lambda tree: jax.tree.map(lambda x: jnp.asarray(x)[None], tree)
    weighted = lambda w: jpfq.quantize(layers, [jpfq.Weighted(X, w)], rule, params=PARAMS).params
    sweep = lambda x: jpfq.sweep(layers, [x], jpfq.Space(bits=[3, 4]), params=PARAMS).records
    whole = Whole(PARAMS["a"], jax.nn.relu)
    for call, said in (
        (lambda: jax.jit(lambda x: run(PARAMS, x))(x), "inside jit, vmap or grad"),
        (lambda: jax.jit(lambda: run(PARAMS, x))(), "inside jit, vmap or grad"),
        (lambda: jax.vmap(lambda x: run(PARAMS, x))(x[None]), "Batch 0 has inputs that are traced"),
        (lambda: jax.vmap(weighted)(jnp.ones((2, 32))), "Batch 0 has row weights that are traced"),
        (lambda: jax.vmap(lambda p: run(p, x))(many(PARAMS)), "got a as a traced"),
        (lambda: jax.grad(lambda p: run(p, x)["a"].sum())(jax.tree.map(jnp.asarray, PARAMS)), "got a as a traced"),
        (lambda: jax.jit(sweep)(x), "inside jit, vmap or grad"),
        (lambda: jax.jit(lambda p: jpfq.budget(layers, [X], 4.0, params=p))(PARAMS), "inside jit, vmap or grad"),
        (lambda: run(PARAMS, shape), "Batch 0 holds a shape"),
        (lambda: run(jax.eval_shape(lambda: PARAMS), x), "got a as a shape"),
        (
            lambda: jpfq.quantize(whole, [X], rule),
            "Whole, a pytree that contains its own parameters.*eqx.partition",
        ),
        (lambda: jpfq.quantize(lambda m, x: m(x), [X], rule, params=whole), "a function, relu, at 'activation'"),
        (lambda: jpfq.plan(lambda m, x: m(x), X, rule, params=whole), "a function, relu, at 'activation'"),
        (lambda: jpfq.solve(shape, jpfq.Gram.from_data(x), bits=4), "holds no numbers"),
    ):
        with pytest.raises(ValueError, match=said):
            call()
    assert len(jpfq.plan(layers, shape, rule, params=jax.eval_shape(lambda: PARAMS)).lines) == 2


@pytest.mark.slow
def test_a_model_on_two_devices_is_refused():
    first, second = jax.devices()[:2]
    here, there = jax.device_put(PARAMS["a"], first), jax.device_put(PARAMS["b"], second)
    rule = zoo.plain(bits=4)
    for params, x in (({"a": here, "b": there}, X), ({"a": here, "b": PARAMS["b"]}, jax.device_put(X, second))):
        with pytest.raises(ValueError, match=r"a is on .*0 and .* on .*1: put all of them on one device"):
            jpfq.quantize(layers, [x], rule, params=params)
    with pytest.raises(ValueError, match="W and the data lie apart"):
        jpfq.solve(here, jax.device_put(jpfq.Gram.from_data(X), second), bits=4)
    free = jpfq.quantize(layers, [X], rule, params=PARAMS)
    bound = jpfq.quantize(layers, [X], rule, params=jax.device_put(PARAMS, second))
    assert bound.params["a"].devices() == {second}
    np.testing.assert_array_equal(*(np.asarray(q.tensors["b"].codes) for q in (free, bound)))


@pytest.mark.slow
@pytest.mark.parametrize("again", [lambda x: pickle.loads(pickle.dumps(x)), copy.deepcopy, copy.copy])
def test_results_pickle_and_copy(again, tmp_path):
    linen, variables = Linen(), {"params": {name: {"kernel": jnp.asarray(x)} for name, x in PARAMS.items()}}
    space = jpfq.Space(lambda bits: zoo.plain(bits=bits), bits=[3, 4])
    swept = jpfq.sweep(layers, [X], space, params=PARAMS)
    of_linen = jpfq.quantize(linen, [X], RULE, variables=variables)
    of_function = jpfq.quantize(layers, [X], RULE, params=PARAMS)
    results = [of_function, of_linen, jpfq.quantize(Nnx(), [X], RULE), swept[0]]
    for result in results:
        expected = np.asarray(result.apply(X))  # compiled before, which is not part of the result
        found = again(result)
        np.testing.assert_array_equal(np.asarray(found.apply(X)), expected)
        assert found.summary() == result.summary()
        assert all(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a == b).all()), found.params, result.params)))
    np.testing.assert_array_equal(np.asarray(again(of_linen.serve())(X)), np.asarray(of_linen.serve()(X)))
    assert again(swept).records == swept.records
    np.testing.assert_array_equal(*(np.asarray(s[1].tensors["a"].codes) for s in (swept, again(swept))))
    of_linen.save(tmp_path / "saved")
    assert again(jpfq.load(tmp_path / "saved")).summary() == of_linen.summary()
    key = jax.random.key(0)
    quantizer = jpfq.embed.SigmaDelta(order=1, width=15, K=2)
    features = jpfq.RandomFourierFeatures.sample(key, inputs=8, m=960, gamma=0.01, quantizer=quantizer)
    np.testing.assert_array_equal(*(np.asarray(f.features(X)) for f in (features, again(features))))
    certificate, plan = jpfq.certify(of_function, bits=16), jpfq.plan(layers, X, RULE, params=PARAMS)
    for value in (
        RULE,
        plan,
        certificate,
        of_function.tensors["a"],
        of_function.info["a"],
        jpfq.Packed.of(of_function.tensors["a"]),
    ):
        assert str(again(value)) == str(value)


def test_loading_into_another_type_says_what_to_do(tmp_path):
    jpfq.quantize(layers, [X], zoo.plain(bits=4), params=PARAMS).save(tmp_path / "single")
    half = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), PARAMS)
    jpfq.quantize(layers, [jnp.asarray(X, jnp.bfloat16)], zoo.plain(bits=4), params=half).save(tmp_path / "half")
    with pytest.raises(ValueError, match=r"a was saved in float32, and is of bfloat16.*in float32, and convert"):
        jpfq.load(tmp_path / "single", layers, params=half)
    with pytest.raises(ValueError, match=r"a was saved in bfloat16, and is of float32"):
        jpfq.load(tmp_path / "half", layers, params=PARAMS)
    converted = jax.tree.map(lambda x: x.astype("bfloat16"), jpfq.load(tmp_path / "single", layers).params)
    assert converted["a"].dtype == jnp.bfloat16


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "utf-8"])
def test_tables_keep_to_what_the_terminal_can_write(encoding, monkeypatch, tmp_path):
    params = {"größe": PARAMS["a"]}
    model = lambda p, x: x @ p["größe"]
    quantized = jpfq.quantize(model, [X], zoo.plain(bits=4), params=params)
    with open(tmp_path / "out", "w", encoding=encoding) as file:
        monkeypatch.setattr(sys, "stdout", file)
        texts = quantized.summary(), str(jpfq.plan(model, X, 4, params=params))
        print(*texts)
    monkeypatch.undo()
    text = (tmp_path / "out").read_text(encoding=encoding)
    assert "gr\\xf6\\xdfe" in text if encoding == "ascii" else "größe" in text
    assert ("----" in text) == (encoding != "utf-8")


def test_an_output_that_nobody_reads_is_no_internal_error(monkeypatch, tmp_path, capsys):
    jpfq.quantize(layers, [X], zoo.plain(bits=4), params=PARAMS).save(tmp_path / "saved")
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["inspect", str(tmp_path / "saved")]) == 141
    assert main(["inspect", str(tmp_path / "none")]) == 2
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["inspect", str(tmp_path / "none")]) == 2


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
def test_the_command_in_a_shell(tmp_path):
    jpfq.quantize(layers, [X], zoo.plain(bits=4), params=PARAMS).save(tmp_path / "saved")
    command = (
        f'{sys.executable} -c "from jpfq.study.cli import main; raise SystemExit(main())" inspect {tmp_path / "saved"}'
    )
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    run = lambda line: subprocess.run(["bash", "-c", line], capture_output=True, text=True, env=environment)
    assert "----" in run(command).stdout
    for line in (f"{command} | true; exit ${{PIPESTATUS[0]}}", f"{command} >&-"):
        found = run(line)
        assert (found.returncode, found.stderr) == (141, "")

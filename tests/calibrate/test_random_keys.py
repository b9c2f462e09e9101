"""Random keys that are inputs of the model, as of a VAE: both networks see one noise. Others are refused, and why."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jpfq
from jpfq.study.compare import Subject
from jpfq.study.evaluate import evaluate
from tests.network import zoo

PARAMS = {"a": zoo.normal(0, 8, 16) / 3, "b": zoo.normal(1, 8, 6) / 3}
XS = zoo.batches(32, 8, count=2)
RULE = zoo.plain(bits=3)


def decode(params, x, noise):
    """A VAE without its losses; the noise is what a key makes of the shape of a latent code."""
    mean, spread = jnp.split(jnp.tanh(x @ params["a"]), 2, -1)
    return (mean + jnp.exp(spread) * noise(mean.shape)) @ params["b"]


def vae(params, x, key):
    return decode(params, x, lambda shape: jax.random.normal(key, shape))


def with_noise(params, x, noise):
    return decode(params, x, lambda shape: noise)


def given_noise(key_of):
    """The same network with the noise itself as an input, and its batches: what a key may change is the name of it."""
    batches = [(x, jax.random.normal(key_of(i), x.shape)) for i, x in enumerate(XS)]
    return batches, jpfq.quantize(with_noise, batches, RULE, params=PARAMS)


def assert_same(one, two):
    for (path, tensor), other in zip(one.tensors.items(), two.tensors.values(), strict=True):
        np.testing.assert_array_equal(tensor.codes, other.codes, path)
    assert one.output_error == pytest.approx(two.output_error, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [jax.random.key, pytest.param(jax.random.PRNGKey, marks=pytest.mark.slow)])
def test_a_key_in_the_batch_is_an_input_like_another(kind, tmp_path):
    """Alone, resumed, offloaded, swept, saved and evaluated: codes and outputs are those of the noise itself."""
    plain, expected = given_noise(kind)
    batches = [(x, kind(i)) for i, x in enumerate(XS)]
    run = lambda *batches, **given: jpfq.quantize(vae, batches, RULE, params=PARAMS, **given)
    found = run(*batches, checkpoint=tmp_path / "run")
    assert_same(found, expected)
    assert_same(run(*batches, offload=True), expected)
    assert_same(run(*batches, checkpoint=tmp_path / "run"), expected)
    with pytest.raises(ValueError, match="calibration data: array"):
        run(batches[0], (XS[1], kind(5)), checkpoint=tmp_path / "run")
    assert [line.rows for line in jpfq.plan(vae, batches[0], RULE, params=PARAMS, batches=2).lines] == [64, 64]
    loss = lambda quantized: jnp.mean(quantized.apply(batches[0]) ** 2)
    space = jpfq.Space(lambda bits: zoo.plain(bits=bits), bits=[3, 4])
    sweep = jpfq.sweep(vae, batches, space, params=PARAMS, evaluate=loss)
    assert_same(sweep[0], expected)
    made = with_noise(expected.params, *plain[0])
    assert sweep.records[0]["loss"] == pytest.approx(float(jnp.mean(made**2)), rel=1e-4)
    found.save(tmp_path / "saved")
    again = jpfq.load(tmp_path / "saved", vae, params=PARAMS)
    np.testing.assert_allclose(again.apply(batches[0]), made, rtol=1e-5, atol=1e-5)
    same = lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype)
    assert all(map(same, jax.tree.leaves(again._shapes), jax.tree.leaves(batches[0])))
    figures = evaluate(Subject("vae", vae, PARAMS, batches, None), found)
    assert figures["output_error"] == pytest.approx(expected.output_error, rel=1e-4)


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dropout(0.5, deterministic=False)(nn.Dense(8, name="a")(x))
        return nn.Dense(4, name="b")(x)


class Noisy(nnx.Module):
    def __init__(self):
        self.a, self.b = (nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in (0, 1))
        self.drop = nnx.Dropout(0.5)

    def __call__(self, x, rngs):
        return self.b(self.drop(self.a(x), rngs=rngs))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linen", "nnx rngs", pytest.param("nnx key", marks=pytest.mark.slow)])
def test_noise_of_a_framework_takes_its_key_from_the_batch(kind):
    """The inputs of the second layer are half zero, and those zeros are the same in both networks."""
    model = Dropped() if kind == "linen" else Noisy()
    given = {"variables": zoo.initial(model, XS[0])} if kind == "linen" else {}
    make = {
        "linen": lambda i, x: {"x": x, "rngs": {"dropout": jax.random.key(i)}},
        "nnx rngs": lambda i, x: (x, nnx.Rngs(dropout=i)),
        "nnx key": lambda i, x: (x, jax.random.key(i)),
    }[kind]
    fresh = lambda: [make(i, x) for i, x in enumerate(XS)]
    quantized = jpfq.quantize(model, fresh(), RULE, **given)
    if kind == "linen":
        run = lambda variables, batch: model.apply(variables, **batch)
        pairs = [(run(given["variables"], b), run(quantized.variables, b)) for b in fresh()]
    else:
        pairs = [(model(*one), quantized.model(*two)) for one, two in zip(fresh(), fresh())]
    error = sum(float(jnp.sum((a - b) ** 2)) for a, b in pairs) / sum(float(jnp.sum(a**2)) for a, _ in pairs)
    assert quantized.output_error == pytest.approx(np.sqrt(error), rel=1e-3)
    assert quantized.output_error < 0.5  # with other zeros in one of them it would be about 1


def in_a_loop(params, x, key):
    """A few steps of diffusion: the key is carried beside what a layer makes."""

    def step(carry, t):
        x, key = carry
        key, own = jax.random.split(key)
        return (jnp.tanh(x @ params["c"]) + t * jax.random.normal(own, x.shape), key), None

    return jax.lax.scan(step, (x, key), jnp.arange(3.0))[0][0] @ params["b"]


@pytest.mark.slow
def test_a_key_that_is_carried_beside_layers_is_still_the_batchs():
    params = {"b": PARAMS["b"], "c": zoo.normal(2, 8, 8)}
    quantized = jpfq.quantize(in_a_loop, [(XS[0], jax.random.key(0))], RULE, params=params)
    assert list(quantized.tensors) == ["b"]

    def counted(p, x, key, n):
        body = lambda i, c: (c[0] + jax.random.normal(c[1], x.shape), jax.random.fold_in(c[1], i))
        return jax.lax.fori_loop(0, n, body, (x, key))[0] @ p["b"]

    assert jpfq.quantize(counted, [(XS[0], jax.random.key(0), jnp.asarray(2))], RULE, params=params).tensors
    chosen = lambda p, x, key: jax.lax.cond(
        x[0, 0] > 0, lambda k: jax.random.normal(k, (8,)), lambda k: jnp.ones(8), key
    )
    both = lambda p, x, key: (x * chosen(p, x, key)) @ p["b"]
    assert jpfq.quantize(both, [(XS[0], jax.random.key(0))], RULE, params=params).tensors
    seeded = lambda p, x, seed: (x + jax.random.normal(jax.random.key(seed), x.shape)) @ p["b"]
    assert jpfq.quantize(seeded, [(XS[0], jnp.asarray(3))], RULE, params=params).tensors


def carried(params, x):
    """The key of the next step is made of what a layer gave at the last."""

    def step(carry, _):
        x, key = carry
        x = jnp.tanh(x @ params["c"]) + jax.random.normal(key, x.shape)
        return (x, jax.random.fold_in(key, jnp.int32(x[0, 0]))), None

    return jax.lax.scan(step, (x, jax.random.key(jnp.int32(x[0, 0]))), None, length=3)[0][0] @ params["b"]


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda p, x: (x + jax.random.normal(jax.random.key(0), x.shape)) @ p["b"], r"\(random_bits\), as dropout"),
        (lambda p, x: (x + jax.random.normal(p["key"], x.shape)) @ p["b"], "from 'key'.*batches \\(x, key\\)"),
        (
            lambda p, x: (y := x @ p["c"]) + jax.random.normal(jax.random.key(jnp.int32(y[0, 0])), y.shape),
            "depends on the output of a layer.*different noise",
        ),
        (carried, "depends on the output of a layer"),
    ],
)
def test_other_keys_are_refused(fn, message):
    params = {"b": PARAMS["b"], "c": zoo.normal(2, 8, 8), "key": jax.random.key(7)}
    with pytest.raises(ValueError, match=f"random numbers.*{message}"):
        jpfq.quantize(fn, [XS[0]], zoo.plain("b|c", bits=3), params=params)

"""Models in another form than `quantize` takes: one sentence with the line to write, and the line works."""

import collections
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import jpfq

X = jnp.arange(12.0).reshape(3, 4)


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(5)(x)


class NNX(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(4, 5, rngs=rngs)

    def __call__(self, x):
        return self.dense(x)


class TrainState(flax.struct.PyTreeNode):
    """The fields of Flax's own."""

    params: Any
    apply_fn: Any = flax.struct.field(pytree_node=False)


class NormedState(TrainState):
    batch_stats: Any = None


Transformed = collections.namedtuple("Transformed", "init apply")
TransformedWithState = collections.namedtuple("TransformedWithState", "init apply")
VARIABLES = Linen().init(jax.random.key(0), X)
PARAMS = VARIABLES["params"]
STATE = TrainState(PARAMS, Linen().apply)
CASES = {
    "a class of Linen": (Linen, {"variables": VARIABLES}, "model is the class Linen: pass an instance of it"),
    "a class of NNX": (NNX, {}, "model is the class NNX: pass an instance of it"),
    "a state": (STATE, {}, r"model is a TrainState, .*, variables=\{'params': state.params\}\)"),
    "a state of norms": (
        NormedState(PARAMS, Linen().apply),
        {},
        r"variables=\{'params': state.params, 'batch_stats': state.batch_stats\}",
    ),
    "variables that are a state": (Linen(), {"variables": STATE}, r"pass variables=\{'params': state.params\}"),
    "params that are a state": (lambda p, x: x, {"params": STATE}, "params is a TrainState: pass params=state.params"),
    "variables that are a list": (Linen(), {"variables": [PARAMS]}, "variables is a dict of collections.*got a list"),
    "apply of bare parameters": (STATE.apply_fn, {"params": PARAMS}, "method apply of Linen: pass the module itself"),
    "of Haiku": (Transformed(None, None), {"params": PARAMS}, r"forward = hk.without_apply_rng\(transformed\).apply"),
    "of Haiku, with state": (TransformedWithState(None, None), {}, r"transformed.apply\(params, state, None, x\)\[0\]"),
}


@pytest.mark.parametrize("name", CASES)
def test_another_form_is_refused_in_a_sentence(name):
    model, given, said = CASES[name]
    for call in (jpfq.plan, lambda model, x, rules, **given: jpfq.quantize(model, [x], rules, **given)):
        with pytest.raises(ValueError, match=said) as error:
            call(model, X, 4, **given)
        assert len(str(error.value)) < 320


def test_what_the_sentences_say_to_write_is_taken():
    kernels = lambda model, **given: {line.path for line in jpfq.plan(model, X, 4, **given).lines}
    assert kernels(Linen(), variables={"params": STATE.params}) == {"Dense_0/kernel"}
    assert kernels(STATE.apply_fn, params=VARIABLES) == {"params/Dense_0/kernel"}
    assert kernels(NNX(nnx.Rngs(0))) == {"dense/kernel"}


def test_models_of_equinox():
    eqx = pytest.importorskip("equinox", reason="takes equinox: pip install equinox")
    module = eqx.nn.MLP(4, 3, 8, 1, key=jax.random.key(0))
    params, static = eqx.partition(module, eqx.is_array)
    for given in ({}, {"params": params}):
        with pytest.raises(ValueError, match=r"params, static = eqx.partition\(module, eqx.is_array\)"):
            jpfq.plan(module, X, 4, **given)
    plan = jpfq.plan(lambda params, x: jax.vmap(eqx.combine(params, static))(x), X, 4, params=params)
    assert {line.path for line in plan.lines} == {"layers/0/weight", "layers/1/weight"}


def test_models_of_haiku():
    hk = pytest.importorskip("haiku", reason="takes haiku: pip install dm-haiku")
    for transform in (hk.transform, hk.transform_with_state):
        transformed = transform(lambda x: hk.nets.MLP([8, 3])(x))
        made = transformed.init(jax.random.key(0), X)
        params, state = made if transform is hk.transform_with_state else (made, {})
        with pytest.raises(ValueError, match="what Haiku's transform returns: forward = "):
            jpfq.plan(transformed, X, 4, params=params)
        forward = hk.without_apply_rng(transformed).apply
        if transform is hk.transform_with_state:
            forward = lambda params, x, of=transformed, state=state: of.apply(params, state, None, x)[0]
        assert len(jpfq.plan(forward, X, 4, params=params).lines) == 2


def test_models_of_penzai():
    pytest.importorskip("penzai", reason="takes penzai: pip install penzai")
    from penzai import pz

    model = pz.nn.Sequential([pz.nn.Linear.from_config("a", jax.random.key(0), {"f": 4}, {"g": 3})])
    with pytest.raises(ValueError, match=r"bare, params = pz.unbind_params\(model, freeze=True\)"):
        jpfq.plan(model, X, 4)
    bare, params = pz.unbind_params(model, freeze=True)
    run = lambda params, x: pz.bind_variables(bare, params)(pz.nx.wrap(x).tag("n", "f")).unwrap("n", "g")
    assert len(jpfq.plan(run, X, 4, params=params).lines) == 1

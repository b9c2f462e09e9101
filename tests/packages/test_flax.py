"""Layers and transforms of Flax itself that the zoo does not have, each before an ordinary layer named head."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx
from flax.nnx import bridge

from tests.packages import helpers

ROWS, SEQUENCE, IMAGE = (20, 6), (4, 7, 6), (3, 6, 6, 6)
GATES = {f"{cell}/{gate}/kernel" for cell in ("there", "back") for gate in ("hn", "hr", "hz", "in", "ir", "iz")}


class Headed(nn.Module):
    """A Linen layer, or several, and a head."""

    body: Callable

    @nn.compact
    def __call__(self, x):
        return nn.Dense(4, name="head")(self.body(x))


class Block(nn.Module):
    """Two layers and a way around them."""

    @nn.compact
    def __call__(self, x):
        return x + nn.Dense(6, name="down")(nn.gelu(nn.Dense(8, name="up")(x)))


def ensemble(x):
    """Four layers at once, each with weights and inputs of its own."""
    layer = nn.vmap(nn.Dense, variable_axes={"params": 0}, split_rngs={"params": True})
    return layer(8, name="layer")(x)


def pooled(x):
    """Attention of one learned query, whose own projection meets no data."""
    probe = nn.Embed(1, 6, name="probe").embedding[None].repeat(x.shape[0], 0)
    return nn.MultiHeadDotProductAttention(2, name="layer")(probe, x)[:, 0]


def turned(x):
    """A layer whose kernel is stored transposed."""
    turn = lambda tree: jax.tree.map(jnp.transpose, tree)
    layer = nn.map_variables(nn.Dense, "params", trans_in_fn=turn, trans_out_fn=turn, init=True)
    return layer(8, name="layer")(x)


def both_ways(x):
    """A recurrent layer in either direction."""
    return nn.Bidirectional(nn.RNN(nn.GRUCell(8, name="there")), nn.RNN(nn.GRUCell(8, name="back")))(x)


LINEN = {  # name: the layer, the shape of a batch, and the matrices that stay as they are
    "vmap": (ensemble, SEQUENCE, {"layer/bias"}),
    "remat_scan": (
        lambda x: nn.remat_scan(Block, lengths=(2, 2))(name="layer")(x),
        ROWS,
        {"layer/up/bias", "layer/down/bias"},
    ),
    "map_variables": (turned, ROWS, set()),
    "Einsum": (lambda x: nn.Einsum((6, 8), "...d,dh->...h", name="layer")(x), ROWS, set()),
    "DenseGeneral": (
        lambda x: nn.DenseGeneral(8, axis=-1, batch_dims=(0,), name="layer")(x),
        SEQUENCE,
        {"layer/bias"},
    ),
    "Conv-causal": (lambda x: nn.Conv(8, (3,), padding="CAUSAL", name="layer")(x), SEQUENCE, set()),
    "Conv-circular": (lambda x: nn.Conv(8, (3, 3), padding="CIRCULAR", name="layer")(x), IMAGE, set()),
    "Conv-3": (lambda x: nn.Conv(8, (2, 3, 2), strides=(1, 2, 1), name="layer")(x), (2, 4, 4, 4, 6), set()),
    "ConvLocal": (lambda x: nn.ConvLocal(8, (3,), name="layer")(x), SEQUENCE, {"layer/bias"}),
    "ConvTranspose": (
        lambda x: nn.ConvTranspose(8, (3, 3), strides=(2, 2), transpose_kernel=True, name="layer")(x),
        IMAGE,
        set(),
    ),
    "MultiHeadDotProductAttention": (
        lambda x: nn.MultiHeadDotProductAttention(2, name="layer")(x, mask=nn.make_causal_mask(x[..., 0])),
        SEQUENCE,
        {f"layer/{name}/bias" for name in ("query", "key", "value")},
    ),
    "learned-query": (
        pooled,
        SEQUENCE,
        {"probe/embedding", "layer/query/kernel"} | {f"layer/{name}/bias" for name in ("query", "key", "value")},
    ),
    "WeightNorm": (lambda x: nn.WeightNorm(nn.Dense(8, name="layer"))(x), ROWS, {"layer/kernel"}),
    "SpectralNorm": (
        lambda x: nn.SpectralNorm(nn.Dense(8, name="layer"))(x, update_stats=False),
        ROWS,
        {"layer/kernel"},
    ),
    "Bidirectional": (both_ways, SEQUENCE, GATES),
}


class Model(nnx.Module):
    """An NNX layer and a head."""

    def __init__(self, layer, width=8):
        self.layer, self.head = layer, nnx.Linear(width, 4, rngs=nnx.Rngs(9))

    def __call__(self, x):
        return self.head(self.layer(x))


def adapted(rngs):
    """A LoRA layer whose second factor is not zero."""
    layer = nnx.LoRALinear(6, 8, lora_rank=2, rngs=rngs)
    layer.lora.lora_b[...] = helpers.normal(3, 2, 8)
    return layer


def bridged(rngs):
    """A Linen layer as an NNX module."""
    return bridge.lazy_init(bridge.ToNNX(nn.Dense(8), rngs=rngs), helpers.normal(0, *ROWS))


NNX = {
    "Einsum": (lambda rngs: nnx.Einsum("bd,dh->bh", (6, 8), rngs=rngs), ROWS, set()),
    "Conv": (lambda rngs: nnx.Conv(6, 8, (3, 3), feature_group_count=2, rngs=rngs), IMAGE, set()),
    "ConvTranspose": (lambda rngs: nnx.ConvTranspose(6, 8, (3, 3), strides=(2, 2), rngs=rngs), IMAGE, set()),
    "MultiHeadAttention": (
        lambda rngs: nnx.MultiHeadAttention(2, 6, 8, out_features=8, decode=False, rngs=rngs),
        SEQUENCE,
        {f"layer/{name}/bias" for name in ("query", "key", "value")},
    ),
    "LoRALinear": (adapted, ROWS, set()),
    "WeightNorm": (
        lambda rngs: nnx.WeightNorm(nnx.Linear(6, 8, rngs=rngs), rngs=rngs),
        ROWS,
        {"layer/layer_instance/kernel"},
    ),
    "RNN": (
        lambda rngs: nnx.RNN(nnx.OptimizedLSTMCell(6, 8, rngs=rngs), rngs=rngs),
        SEQUENCE,
        {"layer/cell/dense_h/kernel", "layer/cell/dense_i/kernel"},
    ),
    "ToNNX": (bridged, ROWS, set()),
}


@pytest.mark.parametrize("name", LINEN)
def test_a_linen_layer(name):
    body, shape, left = LINEN[name]
    module, batches = Headed(body), [helpers.normal(seed, *shape) for seed in range(2)]
    variables = jax.jit(module.init)(jax.random.key(0), batches[0])
    helpers.check(helpers.linen_case(module, variables, {}, batches, left))


@pytest.mark.parametrize("name", NNX)
def test_an_nnx_layer(name):
    make, shape, left = NNX[name]
    model, batches = Model(make(nnx.Rngs(0))), [(helpers.normal(seed, *shape),) for seed in range(2)]
    model.eval()
    helpers.check(helpers.nnx_case(model, batches, left))

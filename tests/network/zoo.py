"""Small models of every kind the walk must take, with random weights, and batches for them."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import nnx

import jpfq

PLAIN = {"plain": True}  # one method by itself compiles in half the time of the recommended parts


def plain(pattern=".*", **settings):
    """A rule of plain GPFQ, but for what is named."""
    return jpfq.Rule(pattern, **PLAIN | settings)


class Case(NamedTuple):
    """A model, its variables (None for NNX), batches, and which kernels are to be found."""

    model: object
    variables: object
    batches: list
    kernels: set
    left: set = frozenset()  # parameters that must be listed with a reason

    @property
    def given(self):
        return {} if self.variables is None else {"variables": self.variables}

    def __call__(self, variables_or_model, batch):
        """The model's own output, compiled: one program in place of one for each operation."""
        if self.variables is None:
            return nnx.jit(lambda model, batch: model(batch))(variables_or_model, batch)
        return applied(self.model, variables_or_model, batch)


applied = jax.jit(lambda model, variables, batch: model.apply(variables, batch), static_argnums=0)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), float)


def batches(*shape, count=3):
    return [normal(seed, *shape) for seed in range(count)]


def convolve(x, W, strides=(1, 1), groups=1, padding="SAME", dilation=(1, 1)):
    """Channels last, kernels as Flax has them."""
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x, W, strides, padding, rhs_dilation=dilation, dimension_numbers=numbers, feature_group_count=groups
    )


class CNN(nn.Module):
    """Stride, dilation, depthwise and pointwise convolutions with BatchNorm."""

    @nn.compact
    def __call__(self, x, train=False):
        norm = partial(nn.BatchNorm, use_running_average=not train)
        x = nn.relu(norm()(nn.Conv(8, (3, 3), strides=(2, 2))(x)))
        x = nn.relu(norm()(nn.Conv(8, (3, 3), kernel_dilation=2)(x)))
        x = nn.Conv(8, (3, 3), feature_group_count=8, padding="VALID")(x)
        x = nn.Conv(8, (3, 3), feature_group_count=2)(x)
        x = nn.avg_pool(nn.Conv(8, (1, 1))(x), (2, 2), (2, 2))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


class MLP(nnx.Module):
    """NNX: a list of layers, one computing in bfloat16, dropout, BatchNorm, and a kernel of rank 3."""

    def __init__(self, rngs, dtype=jnp.bfloat16):
        self.layers = nnx.List([nnx.Linear(16, 32, rngs=rngs), nnx.Linear(32, 32, rngs=rngs, dtype=dtype)])
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.norm = nnx.BatchNorm(32, rngs=rngs)
        self.out = nnx.LinearGeneral((32,), (2, 5), rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.gelu(layer(x).astype(jnp.float32))
        return self.out(self.norm(self.drop(x)))


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, mask):
        x = x + nn.MultiHeadDotProductAttention(num_heads=4)(nn.LayerNorm()(x), mask=mask)
        return x + nn.Dense(32)(nn.gelu(nn.Dense(32)(nn.LayerNorm()(x))))


class LM(nn.Module):
    """A decoder with tied embeddings; blocks under remat. All its kernels have one shape, so that little is compiled."""

    depth: int = 2

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(50, 32)
        x, mask = embed(tokens), nn.make_causal_mask(tokens)
        for i in range(self.depth):
            x = nn.remat(Block)(name=f"block_{i}")(x, mask)
        return embed.attend(nn.LayerNorm()(x))


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(16)(nn.relu(nn.Dense(16)(x))), None


class Scanned(nn.Module):
    """Four layers stacked by nn.scan, under remat."""

    @nn.compact
    def __call__(self, x):
        layers = nn.scan(
            nn.remat(Layer, prevent_cse=False), variable_axes={"params": 0}, split_rngs={"params": True}, length=4
        )
        return nn.Dense(7, name="head")(layers(name="layers")(x, None)[0])


class Unrolled(nn.Module):
    """The same four layers one by one."""

    @nn.compact
    def __call__(self, x):
        for i in range(4):
            x, _ = Layer(name=f"layer_{i}")(x)
        return nn.Dense(7, name="head")(x)


class Stack(nnx.Module):
    """Layers made by nnx.vmap and run by nnx.scan."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return nnx.Linear(16, 16, rngs=rngs)

        self.layers = make(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, layer):
            return nnx.relu(layer(x))

        return run(x, self.layers)


class Experts(nn.Module):
    """A mixture of experts by einsum."""

    @nn.compact
    def __call__(self, x):
        gate = jax.nn.softmax(nn.Dense(4, use_bias=False, name="router")(x))
        up = self.param("up", nn.initializers.lecun_normal(batch_axis=0), (4, 16, 24))
        down = self.param("down", nn.initializers.lecun_normal(batch_axis=0), (4, 24, 16))
        hidden = nn.silu(jnp.einsum("bd,edf->ebf", x, up))
        return jnp.einsum("be,ebd->bd", gate, jnp.einsum("ebf,efd->ebd", hidden, down))


class Recurrent(nn.Module):
    """A loop over time."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.RNN(nn.SimpleCell(12))(x))


class Computed(nn.Module):
    """Weights that are computed from parameters, a weight inside a cond, a shared weight, and an ordinary one."""

    @nn.compact
    def __call__(self, x):
        kernel = lambda name: self.param(name, nn.initializers.lecun_normal(), (8, 8))
        raw, branch, shared = kernel("standardised"), kernel("branch"), kernel("shared")
        x = x @ ((raw - raw.mean(0)) / (raw.std(0) + 1e-5))
        x = jax.lax.cond(x.sum() > 0, lambda x: x @ branch, lambda x: x @ branch.T, x)
        x = nn.tanh(x @ shared) @ shared
        x = x @ jax.lax.dynamic_index_in_dim(
            self.param("picked", nn.initializers.normal(), (3, 8, 8)), jnp.argmax(x[0]) % 3, 0, False
        )
        return nn.Dense(4)(x)


def initial(model, batch):
    """Variables of a Linen module with random kernels: in a tenth of the time in which `init` is compiled."""
    rng = np.random.default_rng(7)

    def fill(path, x):
        if x.ndim > 1:
            values = rng.standard_normal(x.shape) / math.sqrt(math.prod(x.shape[:-1]))
        else:
            values = np.full(x.shape, path[-1].key in ("scale", "var"))
        return jnp.asarray(values, x.dtype)

    return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(model.init, jax.random.key(0), batch))


def _linen(model, batches, kernels, left=frozenset()):
    return Case(model, initial(model, batches[0]), batches, set(kernels), set(left))


def cnn():
    names = [f"Conv_{i}/kernel" for i in range(5)] + ["Dense_0/kernel"]
    return _linen(CNN(), batches(4, 16, 16, 3), names)


def mlp(dtype=jnp.bfloat16):
    model = MLP(nnx.Rngs(0), dtype)
    model.eval()
    return Case(model, None, batches(8, 16), {"layers/0/kernel", "layers/1/kernel", "out/kernel"}, {"out/bias"})


def lm(depth=2):
    tokens = [jax.random.randint(jax.random.key(i), (2, 12), 0, 50) for i in range(3)]
    attention = [f"MultiHeadDotProductAttention_0/{name}" for name in ("query", "key", "value", "out")]
    layers = [*attention, "Dense_0", "Dense_1"]
    kernels = {f"block_{i}/{layer}/kernel" for i in range(depth) for layer in layers}
    biases = {f"block_{i}/{layer}/bias" for i in range(depth) for layer in attention[:3]}
    return _linen(LM(depth), tokens, kernels, {"Embed_0/embedding"} | biases)


def scanned():
    stacked = [f"layers/Dense_{i}/" for i in (0, 1)]
    return _linen(
        Scanned(), batches(32, 16), {f"{s}kernel" for s in stacked} | {"head/kernel"}, {f"{s}bias" for s in stacked}
    )


def stack():
    return Case(Stack(nnx.Rngs(0)), None, batches(32, 16), {"layers/kernel"}, {"layers/bias"})


def experts():
    return _linen(Experts(), batches(32, 16), {"router/kernel", "up", "down"})


def recurrent():
    cell = {"SimpleCell_0/h/kernel", "SimpleCell_0/i/kernel"}
    return _linen(Recurrent(), batches(3, 5, 8), {"Dense_0/kernel"}, cell)


def computed():
    return _linen(Computed(), batches(6, 8), {"Dense_0/kernel"}, {"standardised", "branch", "shared", "picked"})


CASES = {f.__name__: f for f in (cnn, mlp, lm, scanned, stack, experts, recurrent, computed)}

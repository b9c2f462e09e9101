"""Networks that benchmarks share, with stored weights.

In Linen: GPFQ20's CNN and ResNet20, for CIFAR-10, a transformer that sorts, and EfficientNet-Lite0, for ImageNet, whose
weights are in a package. In NNX: the CNN once more, and a Llama of 260,000 parameters that tells stories.
"""

import itertools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from common import needed
from flax import nnx

LITE0 = (  # expansion, size, stride, width, blocks
    *((1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3)),
    *((6, 5, 1, 112, 3), (6, 5, 2, 192, 4), (6, 3, 1, 320, 1)),
)
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ResNet20's input


class CNN(nn.Module):
    """2x32C3-MP2-2x64C3-MP2-2x128C3-MP2-128-10 of GPFQ20: convolution, ReLU, BatchNorm. Input in [0, 1]."""

    @nn.compact
    def __call__(self, x):
        norm = lambda x: nn.BatchNorm(use_running_average=True, epsilon=1e-3)(nn.relu(x))
        for width in (32, 64, 128):
            x = norm(nn.Conv(width, (3, 3))(x))
            x = nn.max_pool(norm(nn.Conv(width, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.relu(nn.Dense(128)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


class Block(nn.Module):
    """Two convolutions beside a shortcut; one that widens halves the image, and its shortcut has no weights."""

    width: int

    @nn.compact
    def __call__(self, x):
        conv = lambda x, stride: nn.Conv(self.width, (3, 3), stride, padding=1, use_bias=False)(x)
        norm = lambda x: nn.BatchNorm(use_running_average=True, epsilon=1e-5)(x)
        more = self.width - x.shape[-1]
        stride = 2 if more else 1
        y = norm(conv(nn.relu(norm(conv(x, stride))), 1))
        x = jnp.pad(x[:, ::stride, ::stride], [(0, 0)] * 3 + [(more // 2, more // 2)])
        return nn.relu(x + y)


class ResNet20(nn.Module):
    """ResNet20 with shortcuts of option A. Input in [0, 1]."""

    @nn.compact
    def __call__(self, x):
        x = (x - jnp.asarray(MEAN, x.dtype)) / jnp.asarray(DEVIATION, x.dtype)
        x = nn.Conv(16, (3, 3), padding=1, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-5)(x))
        for width in (16, 32, 64):
            for _ in range(3):
                x = Block(width)(x)
        return nn.Dense(10)(x.mean((1, 2)))


class Inverted(nn.Module):
    """An inverted residual: wider by `expand`, a depthwise convolution, narrower again."""

    width: int
    expand: int
    size: int
    stride: int

    @nn.compact
    def __call__(self, x):
        norm = lambda x: nn.BatchNorm(use_running_average=True, epsilon=1e-3)(x)
        wide = x.shape[-1] * self.expand
        window = (self.size,) * 2
        y = x if self.expand == 1 else nn.relu6(norm(nn.Conv(wide, (1, 1), use_bias=False)(x)))
        y = nn.Conv(wide, window, (self.stride,) * 2, "SAME", feature_group_count=wide, use_bias=False)(y)
        y = norm(nn.Conv(self.width, (1, 1), use_bias=False)(nn.relu6(norm(y))))
        return x + y if x.shape == y.shape else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0: 49 convolutions, 16 of them depthwise, in 32 sizes. Input (batch, 224, 224, 3)."""

    @nn.compact
    def __call__(self, x):
        norm = lambda x: nn.BatchNorm(use_running_average=True, epsilon=1e-3)(x)
        x = nn.relu6(norm(nn.Conv(32, (3, 3), (2, 2), "SAME", use_bias=False)(x)))
        for expand, size, stride, width, count in LITE0:
            for i in range(count):
                x = Inverted(width, expand, size, 1 if i else stride)(x)
        x = nn.relu6(norm(nn.Conv(1280, (1, 1), use_bias=False)(x)))
        return nn.Dense(1000)(x.mean((1, 2)))


class NNXCNN(nnx.Module):
    """`CNN` in NNX."""

    def __init__(self, rngs: nnx.Rngs):
        widths = (3, 32, 32, 64, 64, 128, 128)
        pairs = list(itertools.pairwise(widths))
        self.convs = nnx.List([nnx.Conv(a, b, (3, 3), rngs=rngs) for a, b in pairs])
        self.norms = nnx.List([nnx.BatchNorm(b, epsilon=1e-3, rngs=rngs) for _, b in pairs])
        self.hidden, self.head = nnx.Linear(2048, 128, rngs=rngs), nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):
            x = norm(nnx.relu(conv(x)))
            x = nnx.max_pool(x, (2, 2), (2, 2)) if i % 2 else x
        return self.head(nnx.relu(self.hidden(x.reshape(len(x), -1))))


class LlamaBlock(nnx.Module):
    """Grouped attention with rotated positions, then SwiGLU; names as in Llama 2."""

    def __init__(self, width: int, hidden: int, heads: int, kv_heads: int, rngs: nnx.Rngs):
        linear = lambda a, b: nnx.Linear(a, b, use_bias=False, rngs=rngs)
        self.heads, self.kv_heads, kv = heads, kv_heads, width // heads * kv_heads
        self.attention_norm, self.ffn_norm = (nnx.RMSNorm(width, epsilon=1e-5, rngs=rngs) for _ in range(2))
        self.wq, self.wk, self.wv, self.wo = (linear(width, out) for out in (width, kv, kv, width))
        self.w1, self.w3, self.w2 = linear(width, hidden), linear(width, hidden), linear(hidden, width)

    def __call__(self, x):
        y = self.attention_norm(x)
        split = lambda y, heads: y.reshape(*y.shape[:2], heads, -1)
        q, k = rotated(split(self.wq(y), self.heads)), rotated(split(self.wk(y), self.kv_heads))
        y = jax.nn.dot_product_attention(q, k, split(self.wv(y), self.kv_heads), is_causal=True)
        x = x + self.wo(y.reshape(x.shape))
        y = self.ffn_norm(x)
        return x + self.w2(nnx.silu(self.w1(y)) * self.w3(y))


class Llama(nnx.Module):
    """stories260K, the smallest of the tinyllamas: five blocks, and an output tied to the embedding."""

    def __init__(self, rngs: nnx.Rngs):
        self.embedding = nnx.Embed(512, 64, rngs=rngs)
        self.blocks = nnx.List([LlamaBlock(64, 172, 8, 4, rngs) for _ in range(5)])
        self.norm = nnx.RMSNorm(64, epsilon=1e-5, rngs=rngs)

    def __call__(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.embedding.attend(self.norm(x))


def rotated(x: jax.Array) -> jax.Array:
    """(batch, position, head, coordinate) with neighbouring coordinates turned by an angle that grows with the position."""
    _, positions, _, size = x.shape
    angles = jnp.arange(positions)[:, None, None] * 10_000.0 ** (-jnp.arange(0, size, 2) / size)
    cos, sin, a, b = jnp.cos(angles), jnp.sin(angles), x[..., ::2], x[..., 1::2]
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x.shape)


class GPTBlock(nn.Module):
    """Attention with one kernel for queries, keys and values, then a perceptron; names as in minGPT."""

    heads: int

    @nn.compact
    def __call__(self, x):
        width = x.shape[-1]
        y = nn.Dense(3 * width, name="c_attn")(nn.LayerNorm(epsilon=1e-5, name="ln_1")(x))
        q, k, v = (part.reshape(*x.shape[:2], self.heads, -1) for part in jnp.split(y, 3, -1))
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
        x = x + nn.Dense(width, name="c_proj")(y)
        y = nn.Dense(4 * width, name="c_fc")(nn.LayerNorm(epsilon=1e-5, name="ln_2")(x))
        return x + nn.Dense(width, name="c_proj_2")(nn.gelu(y, approximate=True))


class Sorter(nn.Module):
    """minGPT that sorts: three blocks; six digits of {0, 1, 2} are continued with the same in order."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(3, 48, name="wte")(tokens) + nn.Embed(11, 48, name="wpe")(jnp.arange(tokens.shape[1]))
        for i in range(3):
            x = GPTBlock(3, name=f"h_{i}")(x)
        return nn.Dense(3, use_bias=False, name="lm_head")(nn.LayerNorm(epsilon=1e-5, name="ln_f")(x))


def pixels(images: np.ndarray) -> jax.Array:
    """Images of bytes as numbers in [0, 1]."""
    return jnp.asarray(images, jnp.float32) / 255


def cnn(data: Path) -> tuple[nn.Module, dict]:
    """GPFQ20's network and its variables."""
    a = np.load(needed(data, "cnn_cifar10.npz"))
    key = lambda name, i: f"{name}_{i}" if i else name
    layers = [("conv2d", "Conv", i) for i in range(6)] + [("dense", "Dense", i) for i in range(2)]
    norms = [(f"BatchNorm_{i}", key("batch_normalization", i)) for i in range(6)]
    linear = {f"{ours}_{i}": {k: a[f"{key(name, i)}.{k}"] for k in ("kernel", "bias")} for name, ours, i in layers}
    norm = {ours: {"scale": a[f"{name}.gamma"], "bias": a[f"{name}.beta"]} for ours, name in norms}
    stats = {ours: {"mean": a[f"{name}.moving_mean"], "var": a[f"{name}.moving_variance"]} for ours, name in norms}
    return CNN(), jax.tree.map(jnp.asarray, {"params": linear | norm, "batch_stats": stats})


def resnet20(data: Path) -> tuple[nn.Module, dict]:
    """ResNet20 and its variables."""
    a = np.load(needed(data, "resnet20_cifar10.npz"))
    conv = lambda name: {"kernel": a[f"{name}.weight"].transpose(2, 3, 1, 0)}
    norm = lambda name: {"scale": a[f"{name}.weight"], "bias": a[f"{name}.bias"]}
    stat = lambda name: {"mean": a[f"{name}.running_mean"], "var": a[f"{name}.running_var"]}
    params = {"Conv_0": conv("conv1"), "BatchNorm_0": norm("bn1")}
    params["Dense_0"] = {"kernel": a["linear.weight"].T, "bias": a["linear.bias"]}
    stats = {"BatchNorm_0": stat("bn1")}
    for i in range(9):
        name, twice = f"layer{i // 3 + 1}.{i % 3}", range(2)
        params[f"Block_{i}"] = {f"Conv_{j}": conv(f"{name}.conv{j + 1}") for j in twice}
        params[f"Block_{i}"] |= {f"BatchNorm_{j}": norm(f"{name}.bn{j + 1}") for j in twice}
        stats[f"Block_{i}"] = {f"BatchNorm_{j}": stat(f"{name}.bn{j + 1}") for j in twice}
    return ResNet20(), jax.tree.map(jnp.asarray, {"params": params, "batch_stats": stats})


def efficientnet_lite0(file: Path) -> dict:
    """The variables of EfficientNet-Lite0, from a state dict of PyTorch."""
    import torch

    a = {name: np.asarray(x) for name, x in torch.load(file, map_location="cpu", weights_only=True).items()}
    conv = lambda name: {"kernel": a[f"{name}.weight"].transpose(2, 3, 1, 0)}
    params = {"Conv_0": conv("_conv_stem"), "Conv_1": conv("_conv_head")}
    params["Dense_0"] = {"kernel": a["_fc.weight"].T, "bias": a["_fc.bias"]}
    stats: dict = {}

    def norm(params, stats, ours, name):
        params[ours] = {"scale": a[f"{name}.weight"], "bias": a[f"{name}.bias"]}
        stats[ours] = {"mean": a[f"{name}.running_mean"], "var": a[f"{name}.running_var"]}

    norm(params, stats, "BatchNorm_0", "_bn0")
    norm(params, stats, "BatchNorm_1", "_bn1")
    for i in range(sum(count for *_, count in LITE0)):
        parts = [("_depthwise_conv", "_bn1"), ("_project_conv", "_bn2")]
        parts = [("_expand_conv", "_bn0"), *parts] if i else parts  # the first block does not widen
        own, seen = params.setdefault(f"Inverted_{i}", {}), stats.setdefault(f"Inverted_{i}", {})
        for j, (convolution, batchnorm) in enumerate(parts):
            own[f"Conv_{j}"] = conv(f"_blocks.{i}.{convolution}")
            norm(own, seen, f"BatchNorm_{j}", f"_blocks.{i}.{batchnorm}")
    return jax.tree.map(jnp.asarray, {"params": params, "batch_stats": stats})


def nnx_cnn(data: Path) -> NNXCNN:
    """GPFQ20's network in NNX."""
    a, model = np.load(needed(data, "cnn_cifar10.npz")), NNXCNN(nnx.Rngs(0))
    for layers, name in ((model.convs, "conv2d"), ((model.hidden, model.head), "dense")):
        for i, layer in enumerate(layers):
            _fill(layer, a, f"{name}_{i}" if i else name, kernel="kernel", bias="bias")
    for i, norm in enumerate(model.norms):
        names = {"scale": "gamma", "bias": "beta", "mean": "moving_mean", "var": "moving_variance"}
        _fill(norm, a, f"batch_normalization_{i}" if i else "batch_normalization", **names)
    model.eval()
    return model


def _fill(layer: nnx.Module, arrays, prefix: str, **names: str) -> None:
    """Sets variables of a layer to stored arrays."""
    for ours, stored in names.items():
        getattr(layer, ours)[...] = jnp.asarray(arrays[f"{prefix}.{stored}"])


def llama(data: Path) -> Llama:
    """stories260K."""
    a, model = np.load(needed(data, "lm_stories260k.npz")), Llama(nnx.Rngs(0))
    model.embedding.embedding[...] = jnp.asarray(a["tok_embeddings"])
    model.norm.scale[...] = jnp.asarray(a["norm"])
    for i, block in enumerate(model.blocks):
        for name in ("attention_norm", "ffn_norm"):
            getattr(block, name).scale[...] = jnp.asarray(a[f"layers.{i}.{name}"])
        for name in ("wq", "wk", "wv", "wo", "w1", "w2", "w3"):
            getattr(block, name).kernel[...] = jnp.asarray(a[f"layers.{i}.{name}"].T)
    return model


def sorter(data: Path) -> tuple[nn.Module, dict]:
    """The sorting transformer and its variables."""
    a = np.load(needed(data, "gpt_nano_sort.npz"))
    dense = lambda name: {"kernel": a[f"{name}.weight"].T, "bias": a[f"{name}.bias"]}
    norm = lambda name: {"scale": a[f"{name}.weight"], "bias": a[f"{name}.bias"]}
    params = {name: {"embedding": a[f"transformer.{name}.weight"]} for name in ("wte", "wpe")}
    params |= {"ln_f": norm("transformer.ln_f"), "lm_head": {"kernel": a["lm_head.weight"].T}}
    for i in range(3):
        name = f"transformer.h.{i}"
        block = {ln: norm(f"{name}.{ln}") for ln in ("ln_1", "ln_2")}
        block |= {c: dense(f"{name}.attn.{c}") for c in ("c_attn", "c_proj")}
        params[f"h_{i}"] = block | {"c_fc": dense(f"{name}.mlp.c_fc"), "c_proj_2": dense(f"{name}.mlp.c_proj")}
    return Sorter(), jax.tree.map(jnp.asarray, {"params": params})

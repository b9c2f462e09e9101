"""Networks for CIFAR-10 that benchmarks share, with stored weights: GPFQ20's CNN and ResNet20."""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from common import needed

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
    """Two convolutions beside a shortcut; one that widens halves the picture, and its shortcut has no weights."""

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


def pixels(images: np.ndarray) -> jax.Array:
    """Pictures of bytes as numbers in [0, 1]."""
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

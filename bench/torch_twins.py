"""Two networks of networks.py written once more in PyTorch, with Brevitas' layers, for its quantizers to work on."""

from pathlib import Path

import numpy as np
import torch
from common import needed
from networks import DEVIATION, MEAN
from peers import Frozen, qnn
from torch.nn import functional as F


def conv(inputs: int, width: int, stride: int, bits: int | None) -> torch.nn.Module:
    """A convolution of 3 x 3, float without bits."""
    shape = (inputs, width, 3, stride, 1)
    if bits is None:
        return torch.nn.Conv2d(*shape, bias=False)
    return qnn.QuantConv2d(*shape, bias=False, weight_quant=Frozen, weight_bit_width=bits)


def linear(inputs: int, width: int, bits: int | None, bias: bool = False) -> torch.nn.Module:
    """A dense layer, float without bits."""
    if bits is None:
        return torch.nn.Linear(inputs, width, bias=bias)
    return qnn.QuantLinear(inputs, width, bias=bias, weight_quant=Frozen, weight_bit_width=bits)


class Block(torch.nn.Module):
    """Two convolutions beside a shortcut without weights."""

    def __init__(self, inputs: int, width: int, bits: int | None):
        super().__init__()
        self.stride, self.more = (1, 0) if inputs == width else (2, width - inputs)
        self.conv1, self.bn1 = conv(inputs, width, self.stride, bits), torch.nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv(width, width, 1, bits), torch.nn.BatchNorm2d(width)

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more // 2, self.more // 2))
        return F.relu(x + y)


class ResNet20(torch.nn.Module):
    """Takes images as the Flax model does: (batch, row, column, colour), in [0, 1]."""

    def __init__(self, bits: int | None):
        super().__init__()
        self.conv1, self.bn1 = conv(3, 16, 1, bits), torch.nn.BatchNorm2d(16)
        blocks = lambda inputs, width: torch.nn.Sequential(*(Block(i, width, bits) for i in (inputs, width, width)))
        self.layer1, self.layer2, self.layer3 = blocks(16, 16), blocks(16, 32), blocks(32, 64)
        self.linear = linear(64, 10, bits, bias=True)

    def forward(self, x):
        x = (x - torch.tensor(MEAN)) / torch.tensor(DEVIATION)
        x = F.relu(self.bn1(self.conv1(x.permute(0, 3, 1, 2))))
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


class LlamaBlock(torch.nn.Module):
    """Grouped attention with rotated positions, then SwiGLU."""

    def __init__(self, bits: int | None):
        super().__init__()
        self.attention_norm, self.ffn_norm = torch.nn.RMSNorm(64, eps=1e-5), torch.nn.RMSNorm(64, eps=1e-5)
        self.wq, self.wk, self.wv, self.wo = (linear(64, out, bits) for out in (64, 32, 32, 64))
        self.w1, self.w3, self.w2 = linear(64, 172, bits), linear(64, 172, bits), linear(172, 64, bits)

    def forward(self, x):
        y = self.attention_norm(x)
        q, k, v = (part(y).unflatten(-1, (-1, 8)).transpose(1, 2) for part in (self.wq, self.wk, self.wv))
        k, v = (part.repeat_interleave(2, 1) for part in (rotated(k), v))
        y = F.scaled_dot_product_attention(rotated(q), k, v, is_causal=True)
        x = x + self.wo(y.transpose(1, 2).flatten(2))
        y = self.ffn_norm(x)
        return x + self.w2(F.silu(self.w1(y)) * self.w3(y))


class Llama(torch.nn.Module):
    """stories260K; the output is tied to the embedding, which stays float."""

    def __init__(self, bits: int | None):
        super().__init__()
        self.tok_embeddings = torch.nn.Embedding(512, 64)
        self.layers = torch.nn.ModuleList(LlamaBlock(bits) for _ in range(5))
        self.norm = torch.nn.RMSNorm(64, eps=1e-5)

    def forward(self, tokens):
        x = self.tok_embeddings(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x) @ self.tok_embeddings.weight.T


RESNET20, STORIES = "resnet20_cifar10.npz", "lm_stories260k.npz"
PARALLEL = [  # layers of stories260K with a common input, which Brevitas then updates together
    [f"layers.{i}.{name}" for name in names] for i in range(5) for names in (("wq", "wk", "wv"), ("w1", "w3"))
]


def rotated(x: torch.Tensor) -> torch.Tensor:
    """(batch, head, position, coordinate) with neighbouring coordinates turned by an angle that grows with the position."""
    angles = torch.arange(x.shape[2])[:, None] * 10_000.0 ** (-torch.arange(0, x.shape[3], 2) / x.shape[3])
    cos, sin, a, b = torch.cos(angles), torch.sin(angles), x[..., ::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def filled(model: torch.nn.Module, data: Path, file: str) -> torch.nn.Module:
    """A model with stored weights, which are named as its own are, and the steps that follow from them."""
    arrays = np.load(needed(data, file))
    for key, tensor in model.state_dict().items():
        if "num_batches" not in key:
            tensor.copy_(torch.from_numpy(arrays[_stored(key, arrays)]))
    for _, layer in quantized_layers(model):
        layer.quant_weight()
    return model.eval()


def emptied(model: torch.nn.Module, data: Path, file: str, folder: Path) -> None:
    """Stores a model as its weights had been stored, with values at their levels."""
    arrays = dict(np.load(needed(data, file)))
    for name, layer in quantized_layers(model):
        arrays[_stored(f"{name}.weight", arrays)] = layer.quant_weight().value.numpy()
    np.savez(folder / file, **arrays)


def quantized_layers(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """Brevitas' layers, by name."""
    return [(k, m) for k, m in model.named_modules() if isinstance(m, (qnn.QuantConv2d, qnn.QuantLinear))]


def _stored(key, arrays):
    """The name under which a weight is stored."""
    return key if key in arrays else key.removesuffix(".weight")

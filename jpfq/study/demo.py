"""The demo: a Linen CNN and an NNX MLP, trained on handwritten digits in seconds, then quantized to a few bits.

The digits are the 1797 images of 8 x 8 pixels that are part of scikit-learn; nothing is downloaded.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx

from ..scalar import Integer, Ternary
from .compare import Subject

GRIDS = (Ternary(), Integer(2), Integer(3), Integer(4))
EPOCHS = 25
BATCH = 64


class CNN(linen.Module):
    """Two convolutions and two dense layers."""

    @linen.compact
    def __call__(self, x, train=False):
        for features in (32, 64):
            x = linen.Conv(features, (3, 3), use_bias=False)(x)
            x = linen.relu(linen.BatchNorm(use_running_average=not train)(x))
            x = linen.max_pool(x, (2, 2), (2, 2))
        x = linen.relu(linen.Dense(128)(x.reshape(x.shape[0], -1)))
        return linen.Dense(10)(x)


class MLP(nnx.Module):
    """Six dense layers."""

    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in ((64, 128), *[(128, 128)] * 4)])
        self.head = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return self.head(x)


def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training images and labels, then test images and labels. Images are (n, 8, 8, 1) in [0, 1]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError("The demo needs scikit-learn for its images: pip install 'jpfq[demo]'.") from error
    images, labels = map(np.asarray, load_digits(return_X_y=True))
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[:1024], order[1024:]
    return images[train], labels[train], images[test], labels[test]


def subjects() -> list[Subject]:
    """Both trained models, ready to be quantized."""
    images, labels, test, answers = digits()
    batches = [jnp.asarray(part) for part in np.split(images, 4)]
    share = lambda logits: 100 * float(np.mean(np.argmax(logits, -1) == answers))
    cnn, variables = train_cnn(images, labels)
    apply, call = jax.jit(cnn.apply), nnx.jit(lambda model, x: model(x))
    return [
        Subject("CNN (Linen)", cnn, variables, batches, lambda variables: share(apply(variables, test))),
        Subject("MLP (NNX)", train_mlp(images, labels), None, batches, lambda model: share(call(model, test))),
    ]


def train_cnn(images, labels) -> tuple[CNN, Any]:
    """The trained CNN and its variables."""
    model = CNN()
    variables = model.init(jax.random.key(0), images[:1])
    optimizer = _optimizer(len(labels))

    @jax.jit
    def step(variables, state, x, y):
        def loss(params):
            logits, updated = model.apply({**variables, "params": params}, x, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), updated

        gradient, updated = jax.grad(loss, has_aux=True)(variables["params"])
        change, state = optimizer.update(gradient, state, variables["params"])
        return {"params": optax.apply_updates(variables["params"], change), **updated}, state

    state = optimizer.init(variables["params"])

    def one(x, y):
        nonlocal variables, state
        variables, state = step(variables, state, x, y)

    _epochs(images, labels, one)
    return model, variables


def train_mlp(images, labels) -> MLP:
    """The trained MLP."""
    model = MLP(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, _optimizer(len(labels)), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x, y):
        loss = lambda model: optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()
        optimizer.update(model, nnx.grad(loss)(model))

    _epochs(images, labels, lambda x, y: step(model, optimizer, x, y))
    model.eval()
    return model


def _optimizer(samples):
    return optax.adam(optax.cosine_decay_schedule(3e-3, EPOCHS * (samples // BATCH)))


def _epochs(images, labels, step: Callable):
    generator = np.random.default_rng(0)
    for _ in range(EPOCHS):
        order = generator.permutation(len(labels))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            batch = order[start : start + BATCH]
            step(jnp.asarray(images[batch]), jnp.asarray(labels[batch]))

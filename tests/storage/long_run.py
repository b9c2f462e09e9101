"""A run that test_checkpoint.py kills and starts again: python -m tests.storage.long_run FOLDER."""

import sys
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np

import jpfq
from jpfq.storage import checkpoint as resume
from tests.network import zoo

LAYERS = 40
PAUSE = 0.05  # seconds after each layer, so that a kill meets a run that is far from its end, on a busy machine too


def network(params, x):
    """Layers of one shape, so that few programs are compiled."""
    for i in range(LAYERS):
        x = x + jnp.tanh(x @ params[f"w{i}"])
    return x


def given():
    """Parameters and batches."""
    rng = np.random.default_rng(0)
    params = {f"w{i}": jnp.asarray(rng.standard_normal((32, 32)) / 6, jnp.float32) for i in range(LAYERS)}
    return params, [jnp.asarray(rng.standard_normal((64, 32)), jnp.float32) for _ in range(2)]


def run(folder):
    """Quantizes the network."""
    params, batches = given()
    rule = zoo.plain(bits=3, rounding=jpfq.rounding.Stochastic(), activation_bits=8)
    return jpfq.quantize(
        network, batches, rule, params=params, key=jax.random.key(3), checkpoint=folder, progress=False
    )


def paced(*args):
    """Keeps a layer, and waits."""
    keep(*args)
    time.sleep(PAUSE)


if __name__ == "__main__":
    keep, resume.Checkpoint.write = resume.Checkpoint.write, paced
    made = run(sys.argv[1])  # what it prints is a checksum of the codes
    print(zlib.crc32(b"".join(np.asarray(tensor.codes).tobytes() for tensor in made.tensors.values())))

"""A process that test_one_run.py lets race with another: python -m tests.storage.racing BITS.

For each folder named on a line of the standard input it quantizes the network and answers a line of JSON: a checksum of the
codes, or why it was refused.
"""

import json
import sys
import zlib

import jax.numpy as jnp
import numpy as np

import jpfq
from tests.network import zoo

LAYERS = 4


def network(params, x):
    """Layers of one shape, so that few programs are compiled."""
    for i in range(LAYERS):
        x = x + jnp.tanh(x @ params[f"w{i}"])
    return x


def run(bits, folder=None, seed=0):
    """Quantizes the network."""
    rng = np.random.default_rng(seed)
    params = {f"w{i}": jnp.asarray(rng.standard_normal((8, 8)) / 3, jnp.float32) for i in range(LAYERS)}
    batches = [jnp.asarray(rng.standard_normal((16, 8)), jnp.float32)]
    rule = zoo.plain(bits=bits, activation_bits=8)
    return jpfq.quantize(network, batches, rule, params=params, checkpoint=folder, progress=False)


def checksum(quantized):
    """Of all codes."""
    return zlib.crc32(b"".join(np.asarray(tensor.codes).tobytes() for tensor in quantized.tensors.values()))


if __name__ == "__main__":
    for line in sys.stdin:
        try:
            answer = {"codes": checksum(run(int(sys.argv[1]), line.strip() or None))}
        except ValueError as error:
            answer = {"refused": str(error)}
        print(json.dumps(answer), flush=True)

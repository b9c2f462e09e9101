"""Several hosts that quantize one model together must be given the same: compared before anything is computed."""

import importlib.metadata
import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from .batches import Weighted
from .functional import Functional

PACKAGES = ("jax", "jaxlib", "jpfq", "flax", "numpy")


def spans_hosts(arrays: Iterable) -> bool:
    """Whether any array lies on devices of other processes too."""
    return any(isinstance(x, jax.Array) and not x.is_fully_addressable for x in arrays)


def check_hosts(functional: Functional, batches: Sequence, settings: dict[str, Any]) -> None:
    """Raises on every host where the hosts were not given the same; before anything that they must compute together.

    Of arrays that are split over hosts, shapes are compared; of those that each host holds whole, also values.
    """
    leaves = leaves_of(batches)
    parts = {
        f"versions of {', '.join(PACKAGES)}": [_version(name) for name in PACKAGES],
        "paths, shapes or types of parameters": [*zip(functional.paths, map(_shape, functional.leaves), strict=True)],
        "values of parameters": [_checksum(x) for x in functional.leaves],
        "number, shapes or types of batches": [len(batches), *map(_shape, leaves)],
        "values of batches": [_checksum(x) for x in leaves],
        **{name: (str(value), [_checksum(x) for x in jax.tree.leaves(value)]) for name, value in settings.items()},
    }
    prints = np.array([zlib.crc32(repr(part).encode()) for part in parts.values()], np.uint32)
    hosts = np.asarray(multihost_utils.process_allgather(prints)).reshape(-1, len(prints))
    apart = [name for name, column in zip(parts, hosts.T, strict=True) if (column != column[0]).any()]
    if apart:
        others = [int(host) for host in np.flatnonzero((hosts != hosts[0]).any(1))]
        raise ValueError(
            f"Hosts {others} differ from host 0 in: {'; '.join(apart)}. Every process must call quantize with the same "
            "arguments; what differs by host is given as one array of all hosts, by jax.make_array_from_process_local_data."
        )


def leaves_of(batches: Iterable) -> list:
    """The arrays of batches, and their weights."""
    return jax.tree.leaves([(x.batch, x.weights) if isinstance(x, Weighted) else x for x in batches])


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _shape(x):
    return (np.shape(x), str(getattr(x, "dtype", type(x).__name__)))


def _checksum(x) -> int:
    """Of the values of an array that this host holds whole; 0 for others."""
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if isinstance(x, jax.Array):
        if not (x.is_fully_addressable or x.is_fully_replicated):
            return 0
        x = x if x.is_fully_addressable else x.addressable_data(0)
        return int(_bits(x))
    return zlib.crc32(np.ascontiguousarray(x).tobytes()) if hasattr(x, "shape") else zlib.crc32(repr(x).encode())


@jax.jit
def _bits(x):
    """A number that changes with the bits of an array and with their places."""
    kind = f"uint{8 * min(x.dtype.itemsize, 4)}"  # 64 bits become two numbers
    bits = x if x.dtype == bool else jax.lax.bitcast_convert_type(x, kind)
    bits = bits.ravel().astype(jnp.uint32)
    return jnp.sum(bits * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1))

"""A check that all hosts of a run were given the same model, batches and settings, before anything is computed."""

import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ..model.functional import Functional
from .batches import Weighted
from .fingerprint import checksum, setting, shape_of, versions


def spans_hosts(arrays: Iterable) -> bool:
    """True if any array lies on devices of other processes too."""
    return any(isinstance(x, jax.Array) and not x.is_fully_addressable for x in arrays)


def check_hosts(functional: Functional, batches: Sequence, settings: dict[str, Any]) -> None:
    """Raises, on every host, if the hosts were given different arguments.

    Arrays that are split over hosts are compared by shape, those that each host holds whole also by value.
    """
    leaves = leaves_of(batches)
    own = versions()
    parts = {
        f"versions of {', '.join(own)}": own,
        "paths, shapes or types of parameters": [*zip(functional.paths, map(shape_of, functional.leaves), strict=True)],
        "values of parameters": [checksum(x) for x in functional.leaves],
        "number, shapes or types of batches": [len(batches), *map(shape_of, leaves)],
        "values of batches": [checksum(x) for x in leaves],
        **{name: setting(value) for name, value in settings.items()},
    }
    prints = np.array([zlib.crc32(repr(part).encode()) for part in parts.values()], np.uint32)
    hosts = np.asarray(multihost_utils.process_allgather(prints)).reshape(-1, len(prints))
    apart = [name for name, column in zip(parts, hosts.T, strict=True) if (column != column[0]).any()]
    if apart:
        others = [int(host) for host in np.flatnonzero((hosts != hosts[0]).any(1))]
        raise ValueError(
            f"Hosts {others} differ from host 0 in: {'; '.join(apart)}. Every process must call quantize with the same "
            "arguments. Data that differ by host must form one global array: jax.make_array_from_process_local_data."
        )


def leaves_of(batches: Iterable) -> list:
    """The arrays of batches and of their weights."""
    return jax.tree.leaves([(x.batch, x.weights) if isinstance(x, Weighted) else x for x in batches])

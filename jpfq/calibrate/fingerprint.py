"""Fingerprints of everything the codes depend on, to compare the model, data and settings of two runs."""

import importlib.metadata
import re
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PACKAGES = ("jax", "jaxlib", "jpfq", "flax", "numpy")


def versions() -> dict[str, str | None]:
    """The versions of the packages that results depend on; None for one that is not installed."""
    return {name: _version(name) for name in PACKAGES}


def shape_of(x: Any) -> list:
    """The shape and dtype of an array or of a placeholder."""
    return [list(np.shape(x)), str(getattr(x, "dtype", type(x).__name__))]


def checksum(x: Any) -> int:
    """A checksum of the values of an array; 0 if this host does not hold all of them."""
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if isinstance(x, jax.Array):
        if not (x.is_fully_addressable or x.is_fully_replicated):
            return 0
        x = x if x.is_fully_addressable else x.addressable_data(0)
        return int(_bits(x))
    return zlib.crc32(np.ascontiguousarray(x).tobytes()) if hasattr(x, "shape") else zlib.crc32(repr(x).encode())


def setting(value: Any) -> list:
    """The text of a setting and the checksums of its numbers, which the text may abbreviate."""
    return [steady(value), [checksum(x) for x in jax.tree.leaves(value)]]


def steady(value: Any) -> str:
    """The text of a value in one line, without the addresses of objects, which change from process to process."""
    return " ".join(re.sub(r" at 0x[0-9a-f]+", "", str(value)).split())


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The names of the entries, and of their parts, that differ between two fingerprints."""
    found = []
    for name in dict.fromkeys([*old, *new]):
        a, b = old.get(name), new.get(name)
        if a == b:
            continue
        if isinstance(a, dict) and isinstance(b, dict):
            parts = [_shown(part, a.get(part), b.get(part)) for part in sorted(a.keys() | b.keys(), key=str)]
            parts = [part for part in parts if part]
            found.append(f"{name}: {', '.join(parts[:4])}{f' and {len(parts) - 4} more' if len(parts) > 4 else ''}")
        else:
            found.append(_shown(name, a, b))
    return found


def _shown(name, a, b):
    """Describes a difference, with both values where they are short texts."""
    if a == b:
        return ""
    was, now = (x[0] if isinstance(x, list) and x and isinstance(x[0], str) else x for x in (a, b))
    short = was != now and all(x is None or (isinstance(x, str) and len(x) < 120) for x in (was, now))
    return f"{name} ({was}, now {now})" if short else str(name)


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@jax.jit
def _bits(x):
    """A checksum of the bits of an array and their positions."""
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag])
    elif jnp.issubdtype(x.dtype, jnp.integer) and jnp.iinfo(x.dtype).bits < 8:
        x = x.astype(jnp.int8)
    kind = f"uint{8 * min(x.dtype.itemsize, 4)}"  # 64 bits become two numbers
    bits = x if x.dtype == bool else jax.lax.bitcast_convert_type(x, kind)
    bits = bits.ravel().astype(jnp.uint32)
    return jnp.sum(_mixed(bits + _mixed(jnp.arange(bits.size, dtype=jnp.uint32))))


def _mixed(x):
    """A hash of each uint32 in which every bit depends on all bits of x: the last steps of MurmurHash3."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)

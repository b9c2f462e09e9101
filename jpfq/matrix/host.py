"""Work that only moves arrays or scales them: by NumPy where they are small and in this machine's memory, else compiled.

A program takes about a tenth of a second to compile for each shape it meets, and more to trace; a small array takes NumPy
less than a hundredth.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from .explicit_mesh import is_traced

LARGE = 2**22  # entries from which on an array is worth a program


def numpy_or_jit(*static: str, unless: Callable[..., bool] = lambda *args: False) -> Callable[[Callable], Callable]:
    """A decorator of a function of arrays that takes its operations from `namespace`: it runs on either kind.

    What comes out are arrays of JAX, on the device that those given lie on.

    Args:
        static: names of arguments that are no arrays.
        unless: takes the arguments, and tells where the function needs JAX.
    """

    def decorated(f):
        compiled = jax.jit(f, static_argnames=static)

        @functools.wraps(f)
        def run(*args):
            arrays = [x for x in jax.tree.leaves(args) if isinstance(x, jax.Array)]
            if not all(map(_is_near, arrays)) or unless(*args):
                return compiled(*args)
            home = next((x.sharding for x in arrays if x.committed), None)
            near = jax.tree.map(lambda x: np.asarray(x) if isinstance(x, jax.Array) else x, args)
            with np.errstate(all="ignore"):  # as in JAX
                found = f(*near)
            return jax.tree.map(lambda x: jax.device_put(x, home), found)

        return run

    return decorated


def namespace(x: Any) -> Any:
    """The module whose functions take an array: `jax.numpy` or `numpy`."""
    return x.__array_namespace__()


def _is_near(x):
    if is_traced(x) or x.size >= LARGE or len(x.sharding.device_set) > 1 or not x.is_fully_addressable:
        return False
    return all(device.platform == "cpu" for device in x.sharding.device_set)

"""`vmap` over a leading axis that is often of size one."""

from collections.abc import Callable

import jax


def each(f: Callable, *args):
    """`f` on each entry of the leading axis of `args`.

    An axis of one entry is dropped instead, which compiles to better loops than a batch of one.
    """
    if jax.tree.leaves(args)[0].shape[0] > 1:
        return jax.vmap(f)(*args)
    return jax.tree.map(lambda x: x[None], f(*jax.tree.map(lambda x: x[0], args)))

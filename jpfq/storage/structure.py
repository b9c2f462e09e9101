"""The structure of a pytree in terms of JSON: dicts, lists, tuples and None as they are, any other node as a dict.

A leaf is its number, a node is [kind, children], where the children of a dict are pairs with their keys.
"""

from collections.abc import Sequence
from typing import Any

import jax

from ..model.compat import key_name


def describe(tree: Any) -> Any:
    """The structure of a pytree."""
    numbers = iter(range(len(jax.tree.leaves(tree))))

    def node(x):
        if x is None:
            return None
        children = jax.tree_util.tree_flatten_with_path(x, is_leaf=lambda y: y is not x and y is not None)[0]
        if len(children) == 1 and not children[0][0]:
            return next(numbers)
        if len(children) == 1 and not key_name(children[0][0][0]):  # a box around one array, such as a variable
            return node(children[0][1])
        if type(x) in (list, tuple):
            return [type(x).__name__, [node(y) for y in x]]
        if type(x) is dict and all(type(key) in (str, int) for key in x):
            return ["dict", [[key, node(x[key])] for key in sorted(x)]]  # in the order that JAX flattens it
        keys = [key_name(path[0]) for path, _ in children]
        keys = keys if len(set(map(type, keys))) < 2 else list(map(str, keys))  # a dict of both could not be sorted
        return ["dict", [[key, node(y)] for key, (_, y) in zip(keys, children, strict=True)]]

    return node(tree)


def rebuild(structure: Any, leaves: Sequence) -> Any:
    """A pytree of that structure. Raises ValueError where it is none, or leaves are missing."""
    used = set()

    def node(x):
        if x is None:
            return None
        if type(x) is int and 0 <= x < len(leaves) and x not in used:
            used.add(x)
            return leaves[x]
        if isinstance(x, list) and len(x) == 2 and isinstance(x[1], list):
            kind, children = x
            if kind == "dict" and all(isinstance(c, list) and len(c) == 2 for c in children) and _keys(children):
                return {key: node(child) for key, child in children}
            if kind in ("list", "tuple"):
                return (list if kind == "list" else tuple)(map(node, children))
        raise ValueError(f"Expected the structure of a pytree; got {str(x)[:80]!r}.")

    tree = node(structure)
    if len(used) != len(leaves):
        raise ValueError(f"The structure holds {len(used)} of {len(leaves)} leaves.")
    return tree


def _keys(children):
    """True if children have keys that a dict can have, each another one, and that JAX can sort."""
    kinds = {type(key) for key, _ in children}
    return kinds in (set(), {str}, {int}) and len({key for key, _ in children}) == len(children)


def nested(paths: Sequence[str]) -> Any:
    """The structure that paths joined by '/' have if all nodes are dicts; None if they have none."""
    tree: dict = {}
    for number, path in enumerate(paths):
        *heads, last = path.split("/")
        here = tree
        for head in heads:
            here = here.setdefault(head, {})
            if not isinstance(here, dict):
                return None
        if last in here:
            return None
        here[last] = number

    def node(x):
        return ["dict", [[k, node(y)] for k, y in sorted(x.items())]] if isinstance(x, dict) else x

    return node(tree)

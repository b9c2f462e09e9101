"""Save and load: a folder of two files, quantized.json and arrays-*.safetensors.

The first says what there is: kinds, structure, settings, metrics, versions, and the checksums of both. The second holds all
arrays, those of quantized kernels packed at their storage bits. Reading runs nothing that a file says: arrays are numbers,
and settings are made from a fixed table (codec.py). How the folder is written and read is in store.py.
"""

import dataclasses
import importlib.metadata
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..calibrate.activation import ActivationQuantizer
from ..calibrate.output_error import OutputError
from ..matrix.explicit_mesh import anywhere, automatic
from ..model.adapters import adapt, adapter_of, phrase_of
from ..model.functional import Functional, numbered
from ..model.mesh import like
from ..network.learned import Learned
from ..network.quantized import Quantized
from . import leaves as one
from .codec import DTYPES, NOT_FINITE, decode, encode
from .info import SUFFIX, read_infos, read_noted, read_reach, write_infos
from .store import read, write
from .structure import describe, nested, rebuild


def save(
    quantized: Quantized, folder: str | os.PathLike, *, entropy_coded: bool = False, overwrite: bool = False
) -> int:
    """Writes a result into a folder of its own: see `Quantized.save`."""
    return write(folder, lambda: _document(quantized, entropy_coded), overwrite)


@anywhere
def load(
    folder: str | os.PathLike,
    model: Any = None,
    *,
    variables: Any = None,
    params: Any = None,
    kwargs: dict | None = None,
    shardings: Any = None,
) -> Quantized:
    """Reads a result that `Quantized.save` has written, dequantized weights and all.

    Args:
        folder: where it lies.
        model: what was quantized, for `quantized.apply`, and for NNX `quantized.model`. Without it there are `params`, and
            `variables` for Linen, as dicts, lists and tuples.
        variables: for a Linen module, variables or their shapes, which give the structure; left out, nested dicts.
        params: likewise for a function whose parameters are more than dicts, lists and tuples.
        kwargs: arguments of the model that are no data, as for `quantize`.
        shardings: of the parameters, as a pytree or its prefix, such as one sharding for all; left out, as those of
            `variables`, `params` or the NNX model, and on the default device without them.

    Returns:
        A `Quantized` whose parameters are those saved, to the bit.

    Raises:
        ValueError: there is no result, it is damaged or of another format, or the model is another one.

    Examples:
        >>> size = quantized.save("model-w4")  # in bytes
        >>> quantized = jpfq.load("model-w4", model)
    """
    document, arrays = read(folder)
    try:
        return made(document, arrays, model, variables=variables, params=params, kwargs=kwargs, shardings=shardings)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder} cannot be loaded: {error}") from error


def names(paths: Sequence[str]) -> list[str]:
    """A name for the arrays of each leaf: its path, numbered where two leaves have one path."""
    for path in paths:
        wrong = ".." in path.split("/") or path.startswith(("/", "__metadata__")) or "\0" in path or "\\" in path
        if wrong or any("\ud800" <= letter <= "\udfff" for letter in path):  # which no file can hold
            raise ValueError(f"A parameter cannot be saved or loaded under the name {path[:80]!r}.")
    return numbered(paths)


def check_leaves(functional: Functional) -> None:
    """Raises where a model has parameters or state that cannot be saved, whatever becomes of them. Computes nothing."""
    paths = names(functional.paths)
    for leaf in functional.leaves:
        one.kind_of(leaf)
    parts = {path + suffix for path in paths for suffix in (*one.SUFFIXES, SUFFIX)}
    if taken := parts & set(paths):
        raise ValueError(_taken(min(taken)))


def _document(quantized, entropy_coded):
    """The record, but for the checksums, and the arrays by name."""
    functional = quantized._functional
    kind = "nnx" if quantized._model is not None else "linen" if quantized._variables is not None else "function"
    paths, trainable, unique = functional.paths, functional.trainable, names(functional.paths)
    arrays, kernels, others = {}, {}, []
    figures, sums = write_infos([quantized.info[path] for path in quantized.tensors])
    sums = {path: sums[i] for i, path in enumerate(quantized.tensors) if i in sums}
    for name, path, leaf, ours in zip(unique, paths, functional.leaves, trainable, strict=True):
        if ours and path in quantized.tensors:
            record, parts = one.write_tensor(quantized.tensors[path], entropy_coded)
            kernels[path] = {"path": name} | record
            parts |= {SUFFIX: sums[path]} if path in sums else {}
        else:
            record, parts = one.write_plain(leaf)
            others += [{"path": name} | record] if record else []
        parts = {name + suffix: x for suffix, x in parts.items()}
        if taken := arrays.keys() & parts.keys():
            raise ValueError(_taken(min(taken)))
        arrays |= parts
    collections = sorted(set(quantized.variables) - {"params"}) if kind == "linen" else []
    implied = _order(unique, collections, kind) == (paths, trainable)
    structure = describe(quantized.variables if kind == "linen" else quantized.params)
    document = {
        "format": 2 if "reach" in figures else 1,
        "versions": {name: importlib.metadata.version(name) for name in ("jpfq", "jax", "flax", "numpy")},
        "model": kind,
        "leaves": [*(kernels[path] for path in quantized.tensors), *others],
        "order": None if implied else [[path, ours] for path, ours in zip(paths, trainable, strict=True)],
        "collections": collections,
        "structure": None if structure == nested(_full(paths, trainable, kind)) else structure,
        "info": figures,
        "skipped": quantized.skipped,
        "inputs": {path: encode(rounded) for path, rounded in quantized.inputs.items()},
        "biases": list(quantized.biases),
        **({"uses": quantized.uses} if quantized.uses else {}),
        **({"learned": encode(quantized.learned)} if quantized.learned else {}),
        **({"embeddings": quantized.embeddings} if quantized.embeddings else {}),
        "output_error": encode(float(quantized.output_error)),
        "peak_bytes": int(quantized.peak_bytes),
        "batch": _batch_record(quantized._shapes),
    }
    if quantized.output_error != quantized.output_error and quantized.outputs is not None:
        document["outputs"] = list(map(encode, quantized.outputs))
    if quantized.held_out is not None:
        document["held_out"] = list(map(encode, quantized.held_out))
    return document, arrays


def _taken(name):
    return f"Two parameters cannot both be saved: each has an array of the name {name}."


def _order(unique, collections, kind):
    """(paths, whether each is a parameter) as a model of nested dicts orders its leaves, which is by name."""
    ours = lambda name: kind != "linen" or name.partition("/")[0] not in collections
    full = lambda name: f"params/{name}" if kind == "linen" and ours(name) else name
    paths = tuple(sorted(unique, key=lambda name: full(name).split("/")))
    return paths, tuple(map(ours, paths))


def _ordered(document, unique):
    """Names, paths and whether each is a parameter, of all leaves in order."""
    if document["order"] is None:
        paths, trainable = _order(unique, document["collections"], document["model"])
    else:
        for entry in document["order"]:
            if not isinstance(entry, list) or [type(x) for x in entry] != [str, bool]:
                raise ValueError(f"Expected a path and whether it is a parameter; got {str(entry)[:80]!r}.")
        paths, trainable = (tuple(entry[i] for entry in document["order"]) for i in (0, 1))
    ordered = names(paths)
    if sorted(ordered) != sorted(unique):
        raise ValueError("The order of the parameters names others than there are.")
    return ordered, paths, trainable


def made(
    document: dict, arrays: dict, model: Any = None, *, variables=None, params=None, kwargs=None, shardings=None
) -> Quantized:
    """Builds a result from what `read` returned; `arrays` is used up. For the rest see `load`."""
    kind, records = document["model"], {one.check(record): record for record in document["leaves"]}
    if len(records) != len(document["leaves"]):
        raise ValueError("Two parameters have one name.")
    described = set().union(*(one.belongs(name, record) for name, record in records.items()))
    kernels = [name for name, record in records.items() if "grid" in record]
    bounded = {kernels[i]: noted for i, noted in read_noted(document["info"], len(kernels)).items()}
    described |= {name + SUFFIX for name in bounded}
    unique, paths, trainable = _ordered(document, [*records, *(arrays.keys() - described)])
    found, leaves, reaches = {}, [], {}
    for name, path in zip(unique, paths, strict=True):
        if "grid" in records.get(name, {}):
            found[name] = path, one.read_tensor(records[name], arrays, name)
            leaves.append(found[name][1].dequantize())
            if name in bounded:
                reaches[path] = read_reach(bounded[name], one.take(arrays, name + SUFFIX), found[name][1], name)
        else:
            leaves.append(one.read_plain(records.get(name, {}), arrays, name))
    if arrays:
        raise ValueError(f"Nothing says what the arrays {', '.join(sorted(arrays)[:3])} are.")
    tensors = dict(found[name] for name in kernels)

    functional = _unbound(document, paths, trainable, leaves)
    if model is not None:
        given = adapter_of(model).kind
        if given != kind:
            raise ValueError(f"It was made of {phrase_of(kind)}; got {phrase_of(given)}.")
        if kind == "linen" and variables is None:
            variables = functional.rebuild(leaves)["variables"]
        if kind == "function" and params is None:
            params = functional.rebuild(leaves)["params"]
        functional = adapt(model, variables, params, kwargs)
        _check_model(functional, paths, leaves)
        leaves = [
            like(new, old) if isinstance(old, jax.Array) else _placed(new, getattr(old, "sharding", None))
            for new, old in zip(leaves, functional.leaves, strict=True)
        ]
    elif variables is not None or params is not None or kwargs is not None:
        raise ValueError("variables, params and kwargs go with a model: jpfq.load(folder, model, ...).")
    if shardings is not None:
        own = iter(jax.tree.leaves(jax.tree.broadcast(shardings, functional.rebuild(leaves)["params"])))
        leaves = [_placed(leaf, next(own)) if ours else leaf for leaf, ours in zip(leaves, trainable, strict=True)]
    rebuilt = functional.rebuild(leaves)
    error = document["output_error"]
    return Quantized(
        params=rebuilt["params"],
        tensors=tensors,
        info=read_infos(document["info"], list(tensors), reaches),
        skipped={path: _text(reason) for path, reason in document["skipped"].items()},
        inputs={path: [_rounded(x) for x in _list(uses)] for path, uses in document["inputs"].items()},
        biases=tuple(map(_text, document["biases"])),
        output_error=NOT_FINITE.get(error, 0.0) if isinstance(error, str) else error,
        peak_bytes=document["peak_bytes"],
        _functional=dataclasses.replace(functional, leaves=tuple(map(automatic, leaves))),
        _model=rebuilt.get("model"),
        _variables=rebuilt.get("variables"),
        _shapes=_batch(document["batch"]),
        uses=_uses(document.get("uses", {}), tensors, 2),
        embeddings=_uses(document.get("embeddings", {}), tensors, 0),
        outputs=_outputs(document, "outputs"),
        held_out=_outputs(document, "held_out"),
        learned=_learned(document.get("learned")),
    )


def _uses(record, tensors, least):
    if not isinstance(record, dict) or not all(
        type(n) is int and n >= least and path in tensors for path, n in record.items()
    ):
        raise ValueError(f"Expected how many products share a kernel; got {str(record)[:80]!r}.")
    return record


def _learned(record):
    """The record of learning, if the result was learned."""
    if record is None:
        return None
    kinds = str, float, float, int, int, float
    values: list[Any] = [NOT_FINITE.get(x, x) if isinstance(x, str) else x for x in _list(record)]
    if [type(x) for x in values] != list(kinds):
        raise ValueError(f"Expected what learning did; got {str(record)[:80]!r}.")
    return Learned(*values)


def _batch_record(example):
    """The shapes of a batch, as JSON."""
    leaves = jax.tree.leaves(example)
    if not leaves or any(x.dtype.name not in DTYPES | one.key_dtypes() for x in leaves):
        return None
    return [describe(example), [[list(x.shape), x.dtype.name] for x in leaves]]


def _batch(record):
    """Restores the batch, as shapes, that `_batch_record` noted."""
    if record is None:
        return None
    if len(record) != 2:
        raise ValueError(f"Expected the shapes of a batch; got {str(record)[:80]!r}.")
    shapes, kinds = [], DTYPES | one.key_dtypes()
    for entry in _list(record[1]):
        pair = _list(entry)
        shape, name = (_list(pair[0]), _text(pair[1])) if len(pair) == 2 else ([None], "")
        if not all(type(n) is int and 0 <= n < 2**40 for n in shape) or name not in kinds:
            raise ValueError(f"Expected the shapes of a batch; got {str(entry)[:80]!r}.")
        shapes.append(jax.ShapeDtypeStruct(tuple(shape), kinds[name]))
    return rebuild(record[0], shapes)


def _unbound(document, paths, trainable, leaves):
    """A result without its model: trees of leaves, and nothing to run them."""
    kind = document["model"]
    full = _full(paths, trainable, kind)
    structure = nested(full) if document["structure"] is None else document["structure"]

    def rebuilt(leaves):
        tree = rebuild(structure, leaves[: len(full)])
        if kind != "linen":
            return {"params": tree}
        if not isinstance(tree, dict) or "params" not in tree:
            raise ValueError("The variables of a Linen module hold no params.")
        return {"variables": tree, "params": tree["params"]}

    def fn(leaves, batch):
        raise ValueError("This result was loaded without its model, so it cannot be run: jpfq.load(folder, model).")

    known = {name: document[name] for name in ("model", "structure")}
    origin = lambda: (_unbound, (known, paths, trainable, range(len(paths))))
    return Functional(fn, paths, tuple(leaves), trainable, rebuilt, origin=origin)


def _full(paths, trainable, kind):
    """Paths in the tree that a result offers: of Linen, the variables; of NNX, the parameters, which come first."""
    named = zip(paths, trainable, strict=True)
    return [f"params/{path}" if ours and kind == "linen" else path for path, ours in named if ours or kind != "nnx"]


def _check_model(functional, paths, leaves):
    """Raises where a model is not the one that was saved."""
    if functional.paths != paths:
        saved, here = set(paths), set(functional.paths)
        listing = lambda names: ", ".join(sorted(names)[:5]) or "none"
        raise ValueError(
            f"The model is another one. Only saved: {listing(saved - here)}. Only in the model: {listing(here - saved)}."
        )
    of = lambda x: (jnp.shape(x), getattr(x, "dtype", type(x)))
    for path, new, old in zip(paths, leaves, functional.leaves, strict=True):
        kinds = [x.dtype.name if hasattr(x, "dtype") else type(x).__name__ for x in (new, old)]
        if jnp.shape(new) == jnp.shape(old) and kinds[0] != kinds[1]:
            raise ValueError(
                f"{path} was saved in {kinds[0]}, and is of {kinds[1]} in what is given: loading changes no type. Load it "
                f"with the model, variables or params in {kinds[0]}, and convert its arrays afterwards, as by jax.tree.map("
                f"lambda x: x.astype({kinds[1]!r}), quantized.params); or quantize the {kinds[1]} model itself."
            )
        if of(new) != of(old):
            raise ValueError(f"The model is another one: {path} is {of(old)} in it, and was {of(new)}.")


def _placed(leaf, sharding):
    return jax.device_put(leaf, sharding) if sharding is not None and isinstance(leaf, jax.Array) else leaf


def _rounded(value):
    rounded = decode(value, ActivationQuantizer)
    one.check_layout(rounded.layout)
    return rounded


def _outputs(document, name):
    """The error of the outputs and why it is no number, where the record says so."""
    if name not in document:
        return None
    record = _list(document[name])
    if len(record) != 3 or type(record[0]) not in (float, str) or any(type(x) is not int or x < 0 for x in record[1:]):
        raise ValueError(f"Expected what is known of the outputs; got {str(record)[:80]!r}.")
    return OutputError(NOT_FINITE.get(record[0], 0.0) if isinstance(record[0], str) else record[0], *record[1:])


def _text(value):
    if not isinstance(value, str):
        raise ValueError(f"Expected a text; got {str(value)[:80]!r}.")
    return value


def _list(value):
    if not isinstance(value, list):
        raise ValueError(f"Expected a list; got {str(value)[:80]!r}.")
    return value

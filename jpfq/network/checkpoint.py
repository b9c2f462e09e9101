"""Save and load: a folder of two files, quantized.json and arrays-*.safetensors.

The first says what there is: kinds, structure, settings, figures, versions, and the checksums of both. The second holds all
arrays, those of quantized kernels packed at their storage bits. Reading runs nothing that a file says: arrays are numbers,
and settings are made from a fixed table (record.py). A result appears in one step, by renaming: whatever is killed when,
what loads is whole.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from ..matrix.automatic import anywhere, automatic
from . import leaves as one
from .activation import Rounded
from .disk import digest, to_disk
from .functional import Functional, numbered
from .infos import SUFFIX, read_infos, read_noted, read_reach, write_infos
from .linen import is_linen
from .mesh import like
from .nnx import is_nnx
from .quantize import adapt
from .quantized import Quantized
from .record import DTYPES, NOT_FINITE, decode, encode
from .structure import describe, nested, rebuild

FORMATS = 1, 2  # the second keeps how far sums go, and is written where there are such
MANIFEST = "quantized.json"
FIELDS = {  # of the record, besides its own checksum
    "format": int,
    "versions": dict,
    "arrays": dict,  # bytes and checksum of the other file
    "model": str,
    "leaves": list,  # those of which their arrays do not tell all; first the quantized kernels, in the order of the walk
    "order": (list, type(None)),  # of all leaves: [path, whether it is a parameter]; None where the names tell it
    "collections": list,  # of the variables of a Linen module, besides params
    "structure": (list, int, type(None)),  # None where the paths tell it
    "info": dict,  # by field, of all kernels; how far sums go, of those whose sums are bounded
    "skipped": dict,
    "inputs": dict,
    "biases": list,
    "output_error": (float, str),
    "peak_bytes": int,
    "batch": (list, type(None)),  # its structure, and shape and type of each array; None where it is not known
}
KINDS = {"linen": "a Linen module", "nnx": "an NNX model", "function": "a function"}


def save(
    quantized: Quantized, folder: str | os.PathLike, *, entropy_coded: bool = False, overwrite: bool = False
) -> int:
    """Writes a result into a folder of its own: see `Quantized.save`."""
    folder = Path(folder)
    there = folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
    ours = (folder / MANIFEST).is_file()
    if there and not (ours and overwrite):
        what = (
            "a saved result: pass overwrite=True to replace it" if ours else "something else: save into another folder"
        )
        raise ValueError(f"{folder} already holds {what}.")
    if not folder.absolute().parent.is_dir():
        raise ValueError(f"There is no folder {folder.absolute().parent} to save into.")
    document, arrays = _document(quantized, entropy_coded)
    parent = folder.absolute().parent
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", suffix=".tmp", dir=parent) as name:
        new = Path(name) / folder.name
        new.mkdir()
        safetensors.numpy.save_file(arrays, new / "arrays")
        document["arrays"] = {"bytes": (new / "arrays").stat().st_size, "sha256": digest(new / "arrays")}
        (new / "arrays").rename(new / arrays_name(document))
        (new / MANIFEST).write_text(seal(document))
        (new / arrays_name(document)).chmod((new / MANIFEST).stat().st_mode & 0o777)  # safetensors lets the owner only
        for path in (*new.iterdir(), new):
            to_disk(path)
        if there:  # arrays first, under a name of their own: the old result holds until the new record takes its place
            for file in (arrays_name(document), MANIFEST):
                (new / file).replace(folder / file)
            to_disk(folder)
            for old in folder.glob("arrays-*.safetensors"):
                if old.name != arrays_name(document):
                    old.unlink()
        else:
            new.replace(folder)
        to_disk(parent)
    return sum((folder / file).stat().st_size for file in (arrays_name(document), MANIFEST))


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

    Example:
        >>> size = quantized.save("model-w4")  # in bytes
        >>> quantized = jpfq.load("model-w4", model)
    """
    document, arrays = read(folder)
    try:
        return _quantized(document, arrays, model, variables, params, kwargs, shardings)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder} cannot be loaded: {error}") from error


def read(folder: str | os.PathLike) -> tuple[dict, dict[str, np.ndarray]]:
    """The record of a saved result, checked against both checksums, and its arrays by name."""
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ValueError(f"There is no saved result in {folder}: it has no {MANIFEST}.")
    try:
        document = unseal(path.read_bytes())
        file, expected = Path(folder) / arrays_name(document), document["arrays"]
        size = file.stat().st_size if file.is_file() else 0
        if size != expected["bytes"]:
            raise ValueError(f"{file.name} is to have {expected['bytes']} bytes and has {size}.")
        if digest(file) != expected["sha256"]:
            raise ValueError(f"{file.name} is damaged: its checksum differs.")
        with safetensors.safe_open(file, framework="np") as opened:
            return document, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, it is no dict
    except (ValueError, RecursionError, AttributeError, safetensors.SafetensorError) as error:
        raise ValueError(f"{folder} cannot be loaded: {error}") from error  # AttributeError: a type that NumPy has not


def seal(document: dict) -> str:
    """The text of a record, with its own checksum in it."""
    text = lambda x: json.dumps(x, sort_keys=True, separators=(",", ":"), allow_nan=False)
    bare = text({key: value for key, value in document.items() if key != "sha256"})
    return text({**document, "sha256": hashlib.sha256(bare.encode()).hexdigest()})


def unseal(text: bytes) -> dict:
    """The record, if the text is to the byte what `seal` makes of it and has all fields."""
    try:
        document = json.loads(text.decode())
    except ValueError as error:
        raise ValueError(f"{MANIFEST} is no JSON: {error}") from error
    if not isinstance(document, dict) or type(document.get("format")) is not int:
        raise ValueError(f"{MANIFEST} is no record of jpfq.")
    if document["format"] not in FORMATS:
        known = " and ".join(map(str, FORMATS))
        raise ValueError(
            f"It is of format {document['format']}, and this jpfq reads {known}: use the jpfq that wrote it."
        )
    if seal(document).encode() != text:
        raise ValueError(f"{MANIFEST} is damaged: its checksum differs.")
    wrong = [name for name, kind in FIELDS.items() if not isinstance(document.get(name, ...), kind)]
    arrays = {} if "arrays" in wrong else document["arrays"]
    digest = arrays.get("sha256")
    hexadecimal = isinstance(digest, str) and len(digest) == 64 and set(digest) <= set("0123456789abcdef")
    if wrong or not hexadecimal or type(arrays.get("bytes")) is not int or document["model"] not in KINDS:
        raise ValueError(f"{MANIFEST} is no record of jpfq: wrong {', '.join(wrong) or 'kind of model or of arrays'}.")
    return document


def arrays_name(document: dict) -> str:
    """The file of arrays, named by its content."""
    return f"arrays-{document['arrays']['sha256'][:16]}.safetensors"


def names(paths: Sequence[str]) -> list[str]:
    """A name for the arrays of each leaf: its path, numbered where two leaves have one path."""
    for path in paths:
        if ".." in path.split("/") or path.startswith(("/", "__metadata__")) or "\0" in path or "\\" in path:
            raise ValueError(f"A parameter cannot be saved or loaded under the name {path[:80]!r}.")
    return numbered(paths)


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
            raise ValueError(f"Two parameters cannot both be saved: each has an array of the name {min(taken)}.")
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
        "output_error": encode(float(quantized.output_error)),
        "peak_bytes": int(quantized.peak_bytes),
        "batch": _batch_record(quantized._shapes),
    }
    return document, arrays


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


def _quantized(document, arrays, model, variables, params, kwargs, shardings):
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
        given = "linen" if is_linen(model) else "nnx" if is_nnx(model) else "function"
        if given != kind:
            raise ValueError(f"It was made of {KINDS[kind]}; got {KINDS[given]}.")
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
    )


def _batch_record(example):
    """The shapes of a batch, as JSON."""
    leaves = jax.tree.leaves(example)
    if not leaves or any(jnp.issubdtype(x.dtype, jax.dtypes.extended) or x.dtype.name not in DTYPES for x in leaves):
        return None
    return [describe(example), [[list(x.shape), np.dtype(x.dtype).name] for x in leaves]]


def _batch(record):
    """What `_batch_record` noted."""
    if record is None:
        return None
    if len(record) != 2:
        raise ValueError(f"Expected the shapes of a batch; got {str(record)[:80]!r}.")
    shapes = []
    for entry in _list(record[1]):
        pair = _list(entry)
        shape, name = (_list(pair[0]), _text(pair[1])) if len(pair) == 2 else ([None], "")
        if not all(type(n) is int and 0 <= n < 2**40 for n in shape) or name not in DTYPES:
            raise ValueError(f"Expected the shapes of a batch; got {str(entry)[:80]!r}.")
        shapes.append(jax.ShapeDtypeStruct(tuple(shape), DTYPES[name]))
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
    rounded = decode(value, Rounded)
    one.check_layout(rounded.layout)
    return rounded


def _text(value):
    if not isinstance(value, str):
        raise ValueError(f"Expected a text; got {str(value)[:80]!r}.")
    return value


def _list(value):
    if not isinstance(value, list):
        raise ValueError(f"Expected a list; got {str(value)[:80]!r}.")
    return value

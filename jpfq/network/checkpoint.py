"""Save and load: a folder of two files, quantized.json and arrays-*.safetensors.

The first says what there is: kinds, structure, settings, figures, versions, and the checksums of both. The second holds all
arrays, those of quantized kernels packed at their storage bits. Reading runs nothing that a file says: arrays are numbers,
and settings are made from a fixed table (record.py). A result appears in one step, by renaming: whatever is killed when,
what loads is whole. Of several processes that save into one folder, one wins whole; who reads meanwhile reads again.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterator, Sequence
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
from .disk import HIDDEN, TURN, digest, hidden, read_limited, to_disk, turn, writing
from .functional import Functional, numbered
from .infos import SUFFIX, read_infos, read_noted, read_reach, write_infos
from .linen import is_linen
from .mesh import like
from .nnx import is_nnx
from .outputs import OutputError
from .quantize import adapt
from .quantized import Quantized
from .record import DTYPES, NOT_FINITE, decode, encode
from .structure import describe, nested, rebuild

FORMATS = 1, 2  # the second keeps how far sums go, and is written where there are such
MANIFEST = "quantized.json"
LARGEST = 2**26  # bytes of it, which are those of more than 100,000 kernels
BEGINNING = b'{"arrays":{"bytes":'  # of every record, whose keys are sorted
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
ATTEMPTS = 100  # at reading a result that is replaced again and again
KINDS = {"linen": "a Linen module", "nnx": "an NNX model", "function": "a function"}


def save(
    quantized: Quantized, folder: str | os.PathLike, *, entropy_coded: bool = False, overwrite: bool = False
) -> int:
    """Writes a result into a folder of its own: see `Quantized.save`."""
    with writing(folder, safetensors.SafetensorError), destination(folder, overwrite) as (home, new):
        document, arrays = _document(quantized, entropy_coded)
        safetensors.numpy.save_file(arrays, new / "arrays")
        document["arrays"] = {"bytes": (new / "arrays").stat().st_size, "sha256": digest(new / "arrays")}
        text = seal(document)
        if len(text) > LARGEST:
            raise ValueError(f"{MANIFEST} would have {len(text):,} bytes, and {LARGEST:,} at most are read.")
        (new / "arrays").rename(new / arrays_name(document))
        (new / MANIFEST).write_text(text)
        (new / arrays_name(document)).chmod((new / MANIFEST).stat().st_mode & 0o777)  # safetensors lets the owner only
        for path in (*new.iterdir(), new):
            to_disk(path)
        _put(new, home, arrays_name(document), lambda: check_free(folder, overwrite))
        return len(text) + document["arrays"]["bytes"]


@contextlib.contextmanager
def destination(folder: str | os.PathLike, overwrite: bool = False) -> Iterator[tuple[Path, Path]]:
    """(where a result goes, links followed; a new folder of that name to write it into), both on one file system.

    It is checked by doing: entered before the work, what cannot be written is known before it.

    Raises:
        ValueError: something is there that may not be replaced, or there is no folder to write into.
        OSError: it cannot be written there.
    """
    check_free(folder, overwrite)
    home = Path(os.path.realpath(folder))
    with hidden(home if home.is_dir() else home.parent) as beside:
        new = beside / home.name
        new.mkdir()
        to_disk(beside.parent)
        yield home, new


def check_free(folder: str | os.PathLike, overwrite: bool) -> None:
    """Raises where a result may not be written."""
    if found := occupied(folder):
        ours = found == "a saved result"
        if not (ours and overwrite):
            what = f"{found}: pass overwrite=True to replace it" if ours else f"{found}: save into another folder"
            raise ValueError(f"{folder} already holds {what}.")
    parent = Path(os.path.realpath(folder)).parent
    if not parent.is_dir():
        raise ValueError(f"There is no folder {parent} to save into.")


def occupied(folder: str | os.PathLike) -> str:
    """Describes the content of a folder: "a saved result", "something else", or "" where a result may be written."""
    home = Path(os.path.realpath(folder))
    if not home.is_dir():
        return "something else" if home.exists() else ""
    if (home / MANIFEST).is_file():
        with open(home / MANIFEST, "rb") as file:
            return "a saved result" if file.read(len(BEGINNING)) == BEGINNING else "something else"
    left = [
        path for path in home.iterdir() if path.name not in (TURN, "lost+found") and not HIDDEN.fullmatch(path.name)
    ]
    return "something else" if len(left) > len(_own_arrays(home)) else ""


def _put(new, home, name, check):
    """Puts a result in its place: a new folder by renaming it, or else its files, of which the record is the last."""
    if not home.exists():
        try:
            new.replace(home)
        except OSError:  # another process was quicker
            if not home.is_dir():
                raise
        else:
            return to_disk(home.parent)
    with turn(home):
        check()
        own = _own_arrays(home)
        for file in (
            name,
            MANIFEST,
        ):  # the arrays have a name of their own: until the record follows, the old one holds
            (new / file).replace(home / file)
        to_disk(home)
        for old in own - {name}:
            (home / old).unlink()
    return to_disk(home)


def _own_arrays(home) -> set[str]:
    """The files of arrays in a folder that are ours: the one that its record names, and others named by their content."""
    try:
        known = arrays_name(unseal(read_limited(home / MANIFEST, LARGEST)))  # whose content need not be read
    except (ValueError, RecursionError, FileNotFoundError):
        known = ""
    named = lambda path: path.name.removeprefix("arrays-").removesuffix(".safetensors")
    found = [path for path in home.glob("arrays-*.safetensors") if len(named(path)) == 16 and path.is_file()]
    return {path.name for path in found if path.name == known or digest(path).startswith(named(path))}


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
        return made(document, arrays, model, variables=variables, params=params, kwargs=kwargs, shardings=shardings)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder} cannot be loaded: {error}") from error


def read(folder: str | os.PathLike) -> tuple[dict, dict[str, np.ndarray]]:
    """The record of a saved result, checked against both checksums, and its arrays by name."""
    path, before = Path(folder) / MANIFEST, None
    for _ in range(ATTEMPTS):
        try:
            text = read_limited(path, LARGEST) if path.is_file() else None
        except FileNotFoundError:
            text = None
        except ValueError as error:
            raise ValueError(f"{folder} cannot be loaded: {error}") from error
        if text is None:
            raise ValueError(f"There is no saved result in {folder}: it has no {MANIFEST}.")
        if before is not None and text == before[0]:
            raise ValueError(f"{folder} cannot be loaded: {before[1]}") from before[1]
        try:
            return _read(folder, text)
        except (ValueError, RecursionError, AttributeError, FileNotFoundError, safetensors.SafetensorError) as error:
            before = text, error  # damaged, or replaced meanwhile; AttributeError: a type that NumPy has not
    raise ValueError(f"{folder} cannot be loaded: it was replaced {ATTEMPTS} times while it was read.")


def _read(folder, text):
    document = unseal(text)
    file, expected = Path(folder) / arrays_name(document), document["arrays"]
    size = file.stat().st_size if file.is_file() else 0
    if size != expected["bytes"]:
        raise ValueError(f"{file.name} is to have {expected['bytes']} bytes and has {size}.")
    if digest(file) != expected["sha256"]:
        raise ValueError(f"{file.name} is damaged: its checksum differs.")
    with safetensors.safe_open(file, framework="np") as opened:
        return document, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, it is no dict


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
        "output_error": encode(float(quantized.output_error)),
        "peak_bytes": int(quantized.peak_bytes),
        "batch": _batch_record(quantized._shapes),
    }
    if quantized.output_error != quantized.output_error and quantized.outputs is not None:
        document["outputs"] = list(map(encode, quantized.outputs))
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
        uses=_uses(document.get("uses", {}), tensors),
        outputs=_outputs(document),
    )


def _uses(record, tensors):
    if not isinstance(record, dict) or not all(
        type(n) is int and n > 1 and path in tensors for path, n in record.items()
    ):
        raise ValueError(f"Expected how many products share a kernel; got {str(record)[:80]!r}.")
    return record


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
    rounded = decode(value, Rounded)
    one.check_layout(rounded.layout)
    return rounded


def _outputs(document):
    """Why the error of the outputs is no number, where the record says so."""
    if "outputs" not in document:
        return None
    record = _list(document["outputs"])
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

"""The folder of a saved result: a record in JSON and a file of arrays, written in one step and checked when read.

A result appears by renaming, so a folder is whole whenever a process is killed. Of several processes that save into one
folder, one wins whole; who reads meanwhile reads again. What the record says is save.py's.
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from ..model.adapters import phrase_of
from .files import HIDDEN, TURN, digest, hidden, read_limited, to_disk, turn, writing

FORMATS = 1, 2  # the second has worst-case sums too, and is written where there are some
MANIFEST = "quantized.json"
LARGEST = 2**26  # bytes of it, which are those of more than 100,000 kernels
BEGINNING = b'{"arrays":{"bytes":'  # of every record, whose keys are sorted
FIELDS = {  # of the record, besides its own checksum
    "format": int,
    "versions": dict,
    "arrays": dict,  # bytes and checksum of the other file
    "model": str,
    "leaves": list,  # those of which their arrays do not tell all; first the quantized kernels, in the order of calibration
    "order": (list, type(None)),  # of all leaves: [path, whether it is a parameter]; None where the names tell it
    "collections": list,  # of the variables of a Linen module, besides params
    "structure": (list, int, type(None)),  # None where the paths tell it
    "info": dict,  # by field, of all kernels; worst-case sums, of those whose sums are bounded
    "skipped": dict,
    "inputs": dict,
    "biases": list,
    "output_error": (float, str),
    "peak_bytes": int,
    "batch": (list, type(None)),  # its structure, and shape and type of each array; None where it is not known
}
ATTEMPTS = 100  # at reading a result that is replaced again and again


def write(
    folder: str | os.PathLike, make: Callable[[], tuple[dict, dict[str, np.ndarray]]], overwrite: bool = False
) -> int:
    """Writes the record and the arrays that `make` returns into a folder of their own; the bytes that they take.

    Whether the folder can be written to is known before anything is made.
    """
    with writing(folder, safetensors.SafetensorError), destination(folder, overwrite) as (home, new):
        document, arrays = make()
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
    if wrong or not hexadecimal or type(arrays.get("bytes")) is not int or phrase_of(document["model"]) is None:
        raise ValueError(f"{MANIFEST} is no record of jpfq: wrong {', '.join(wrong) or 'kind of model or of arrays'}.")
    return document


def arrays_name(document: dict) -> str:
    """The file of arrays, named by its content."""
    return f"arrays-{document['arrays']['sha256'][:16]}.safetensors"

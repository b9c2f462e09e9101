"""Folders as Hugging Face has them: config.json, and model.safetensors or several files of it with an index.

`write` is the one loop over a model's parameters; a format (compressed_tensors.py, awq.py) says what a kernel becomes, and
what config.json says of it. Arrays are made parameter by parameter, and are in memory until the file they go to is full.
"""

import dataclasses
import functools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from ..model.sites import Site
from ..storage.files import HIDDEN, TURN, hidden, to_disk, writing
from ..storage.leaves import NATIVE
from .like import CONFIG, INDEX, Like, Part
from .matrix import operands_left, products

Arrays = dict[str, np.ndarray]
ONE = "model.safetensors"
OWN = re.compile(r"config\.json|model\.safetensors|model\.safetensors\.index\.json|model-\d{5}-of-\d{5}\.safetensors")
MARK = {"exported_by": "jpfq"}  # in config.json, by which a folder that may be replaced is known


@dataclasses.dataclass(frozen=True)
class Folder:
    """Where a model goes, and what goes with it: the options that all formats of folders share.

    Args:
        path: a new folder, or with `overwrite` one that jpfq exported.
        names: from the path of a parameter to its name; left out, parts joined by dots, with `weight` for `kernel`, `scale`
            and `embedding`. The names of a kernel end in `weight`.
        config: what else config.json is to hold, such as {"architectures": ["LlamaForCausalLM"], ..}.
        batch: an input, of the form calibrated on. It tells how each kernel is multiplied: those of attention heads, of rank
            3, are then held as matrices, too. Left out, kernels of rank 2 are.
        overwrite: whether to replace a folder that jpfq exported. It stays until the new one is complete, and files in it
            that jpfq did not write stay.
        like: the folder of the float model, as Hugging Face has it, that the model's weights came from. Its config, which
            `config` adds to, and its tokenizer are copied, and names and orders of axes are those of its tensors, found by
            value, or by `names`. Tensors that the model has not, or has as they are, are copied too.
        max_shard_size: bytes of arrays in a file. A result beyond it is written to several files and an index; the arrays
            of a layer lie in one of them, whatever their size.

    Raises:
        ValueError: the folder is in use, or an option is none of these.
    """

    path: Path
    names: Callable[[str], str] | None = None
    config: Mapping[str, Any] | None = None
    batch: Any = None
    overwrite: bool = False
    like: str | os.PathLike | None = None
    max_shard_size: int = 5 * 10**9

    @classmethod
    def of(cls, kind: str, path: str | os.PathLike, options: Mapping[str, Any], *more: str) -> "Folder":
        """The folder of a format that takes these options, and `more` that it has taken already."""
        known = [field.name for field in dataclasses.fields(cls)][1:]
        if unknown := sorted(options.keys() - set(known)):
            raise ValueError(f"export({kind!r}, ..) takes {', '.join((*more, *known))}; got {unknown[0]}.")
        found = cls(Path(path), **options)
        size = found.max_shard_size
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"max_shard_size is a number of bytes, such as 5 * 10**9; got {size!r}.")
        found.check()
        return found

    def check(self) -> None:
        """Raises where nothing may be written."""
        found = self.path
        if found.is_dir() and not _foreign(found) and not (found / CONFIG).exists():
            return
        if not os.path.lexists(found) or (self.overwrite and _is_ours(found)):
            return
        remedy = "give another, or overwrite=True to replace it" if _is_ours(found) else "export into a new folder"
        raise ValueError(f"{found} is already in use: {remedy}.")

    @contextmanager
    def entered(self) -> Iterator[Path]:
        """A new folder to write into, which is put in its place at the end."""
        home = Path(os.path.realpath(self.path))
        home.parent.mkdir(parents=True, exist_ok=True)
        empty = home.is_dir() and not _is_ours(home)  # which may be a mount, that cannot be renamed
        with hidden(home if empty else home.parent) as beside:
            new = beside / home.name
            new.mkdir()
            yield new
            for file in (*new.iterdir(), new):
                to_disk(file)
            self.check()
            _put(new, home)


def write(
    quantized: Any,
    to: Folder,
    held: Callable[[str, Site | None], tuple[Any, Arrays]],
    settings: Callable[[dict[str, Any], list[str]], dict],
) -> dict[str, str]:
    """Writes a model; by path, the reason for each quantized kernel that is written dequantized.

    Args:
        quantized: a result.
        to: where it goes.
        held: from the path of a quantized kernel and its product, its scheme, and its arrays by the end of their names; a
            ValueError says why the format has none.
        settings: `quantization_config`, from the schemes of layers by name and the names of those that are as they were.
    """
    schemes, plain = {}, []
    left = operands_left(quantized)
    sites = {} if to.batch is None else products(quantized._functional, to.batch)
    like = None if to.like is None else Like(to.like)
    config = {**({} if like is None else like.config), **(to.config or {}), **MARK}
    parts = _parts(quantized, to.names or _name) if like is None else like.parts(quantized, sites, to.names)
    with writing(to.path, safetensors.SafetensorError), to.entered() as new:
        shards = Shards(new, to.max_shard_size)
        for name, value, is_matrix, path, refused in parts:
            stem, made = name.removesuffix(".weight"), None
            if path is not None and path in quantized.tensors:
                try:
                    if path in quantized.embeddings:
                        raise ValueError("an embedding, which servers read as floating numbers")
                    scheme, arrays = held(path, sites.get(path))
                    if refused or stem == name:
                        raise ValueError(refused or f"its name {name} does not end in .weight")
                    schemes[stem] = scheme
                    made = {f"{stem}.{end}": np.ascontiguousarray(x) for end, x in arrays.items()}
                except ValueError as error:
                    left[path] = str(error)
            if made is None:
                made = {name: value()}
                plain += [stem] if is_matrix else []
            shards.add(made)
        if not schemes:
            listing = "\n".join(f"  {path}: {reason}" for path, reason in left.items())
            raise ValueError(f"The format holds none of the quantized kernels:\n{listing or '  there are none'}")
        shards.close()
        if config.get("tie_word_embeddings") and "lm_head" not in plain:
            plain.append("lm_head")  # which is the embedding, as it is
        if like is not None:
            like.copy_beside(new)
        config["quantization_config"] = settings(schemes, plain)
        (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return left


def _parts(quantized, names) -> Iterator[Part]:
    """The parameters and the state of a model."""
    functional = quantized._functional
    for path, leaf, ours in zip(functional.paths, functional.leaves, functional.trainable, strict=True):
        is_matrix = np.ndim(leaf) == 2 and path.rpartition("/")[2] == "kernel"
        value = functools.partial(_array, leaf, path, is_matrix)
        yield Part(names(path), value, is_matrix, path if ours else None)


class Shards:
    """Files of arrays: those of one `add` lie in one file, of at most so many bytes unless they alone are more."""

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = folder, limit
        self.files: list[list[str]] = []  # the names of the arrays in each
        self.waiting: Arrays = {}
        self.known: set[str] = set()
        self.size = 0

    def add(self, arrays: Arrays) -> None:
        """Takes the arrays of a layer."""
        if taken := self.known & arrays.keys():
            raise ValueError(f"Two parameters take the name {min(taken)}: tell them apart by names=.")
        self.known |= arrays.keys()
        if self.waiting and _bytes(self.waiting) + _bytes(arrays) > self.limit:
            self._flush()
        self.waiting |= arrays

    def close(self) -> None:
        """Writes what waits, and gives the files their names."""
        self._flush()
        count = len(self.files)
        if count == 1:
            self._part(0).rename(self.folder / ONE)
            return
        where = {}
        for number, names in enumerate(self.files):
            file = f"model-{number + 1:05}-of-{count:05}.safetensors"
            self._part(number).rename(self.folder / file)
            where |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self.size}, "weight_map": dict(sorted(where.items()))}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _flush(self):
        path = self._part(len(self.files))
        path.touch()
        mode = path.stat().st_mode & 0o777
        safetensors.numpy.save_file(self.waiting, path, metadata={"format": "pt"})
        path.chmod(mode)  # safetensors lets the owner only
        self.files.append(list(self.waiting))
        self.size, self.waiting = self.size + _bytes(self.waiting), {}

    def _part(self, number):
        return self.folder / f"part-{number}"


def _bytes(arrays):
    return sum(x.nbytes for x in arrays.values())


def _foreign(folder: Path) -> list[Path]:
    """The entries of a folder that belong to no export, nor to one that is being written."""
    return [x for x in folder.iterdir() if not (OWN.fullmatch(x.name) or HIDDEN.fullmatch(x.name) or x.name == TURN)]


def _is_ours(folder: Path) -> bool:
    try:
        return MARK.items() <= json.loads((folder / CONFIG).read_text()).items()
    except (OSError, ValueError, AttributeError):
        return False


def _put(new: Path, home: Path) -> None:
    """Puts a complete folder in its place."""
    if not home.exists():
        new.replace(home)
    elif not _is_ours(home):
        for file in sorted(new.iterdir(), key=lambda file: file.name == CONFIG):  # last, since it makes a model of them
            file.replace(home / file.name)
        return to_disk(home)
    else:
        for kept in _foreign(home):
            if not (new / kept.name).exists():
                _copy(kept, new / kept.name)
        old = new.parent / "old"
        home.rename(old)
        try:
            new.replace(home)
        except OSError:
            old.rename(home)
            raise
    return to_disk(home.parent)


def _copy(source: Path, target: Path) -> None:
    """A file or folder under a second name, without a copy of its content where the file system has that."""
    if source.is_dir() and not source.is_symlink():
        shutil.copytree(source, target, symlinks=True, copy_function=_link)
    else:
        _link(source, target)


def _link(source, target):
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(source, target, follow_symlinks=False)


def _name(path):
    *heads, last = path.split("/")
    return ".".join([*heads, "weight" if last in ("kernel", "scale", "embedding") else last])


def _array(leaf, path, is_matrix):
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    value = np.asarray(leaf)
    if value.dtype.name not in NATIVE:
        raise ValueError(f"{path} is of type {value.dtype.name}, which safetensors and NumPy do not both hold.")
    return np.ascontiguousarray(value.T if is_matrix else value).reshape(
        value.shape[::-1] if is_matrix else value.shape
    )

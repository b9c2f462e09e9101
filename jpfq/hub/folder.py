"""A Hugging Face folder: config.json, and *.safetensors in one file or several."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.numpy

from .config import Config, as_json, from_json

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"


def config_of(folder: Path) -> Config:
    """The config of a folder.

    Raises:
        ValueError: where there is no config.json, or it is not of a kind that is known.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json: give the folder of a Hugging Face model, or a GGUF file.")
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}.") from error
    try:
        return from_json(found)
    except KeyError as error:
        raise ValueError(f"{path} does not say {error}, which a decoder needs.") from error


def tensors_of(folder: Path) -> Iterator[tuple[str, Any]]:
    """Names and arrays of all files, one at a time.

    Raises:
        ValueError: where files are missing or cannot be read.
    """
    for path in _files(folder):
        try:
            with safetensors.safe_open(path, framework="flax") as opened:
                for name in opened.keys():  # noqa: SIM118
                    if not name.endswith(
                        "rotary_emb.inv_freq"
                    ):  # which old files hold, and which follow from the config
                        yield name, opened.get_tensor(name)
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read: {error}.") from error


def write(folder: Path, config: Config, tensors: dict) -> None:
    """A new folder with config.json and one file of tensors."""
    document = json.dumps(as_json(config), indent=2)
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} already holds something: save elsewhere.")
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file(tensors, folder / ONE, metadata={"format": "pt"})
    (folder / "config.json").write_text(document + "\n")


def _files(folder):
    """The files of tensors: those that the index names, or the only one."""
    if (folder / INDEX).is_file():
        named = sorted(set(json.loads((folder / INDEX).read_text())["weight_map"].values()))
        missing = [name for name in named if not (folder / name).is_file()]
        if missing:
            raise ValueError(f"{folder} lacks {', '.join(missing)}, which {INDEX} names.")
        return [folder / name for name in named]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        what = f"{len(found)} .safetensors files and no {INDEX}" if found else "no .safetensors file"
        raise ValueError(f"{folder} holds {what}: it takes {ONE}, or several files with an index.")
    return found

"""Folders of exports: files of limited size with an index, and replacement that is whole or does not happen."""

import itertools
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import jpfq
from tests.export.test_awq import half
from tests.network.saved import result
from tests.storage.test_save import linear

SHAPES = {f"layer{i}": (64, 8 * (1 + i % 3)) for i in range(7)}
FORMATS = ["compressed-tensors", "awq"]


@pytest.fixture(scope="module")
def quantized():
    tensors = {f"{name}/kernel": half(shape, (2, shape[1]), jpfq.Integer(4)) for name, shape in SHAPES.items()}
    params = {name: {"kernel": jnp.ones(shape), "bias": jnp.arange(shape[1])} for name, shape in SHAPES.items()}
    return result(linear, tensors, params=params | {"embed": {"embedding": jnp.ones((200, 8))}})


def everything(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


@pytest.mark.parametrize("kind", FORMATS)
def test_files_of_limited_size_hold_the_same_arrays(quantized, kind, tmp_path):
    quantized.export(kind, tmp_path / "one")
    assert {file.name for file in (tmp_path / "one").iterdir()} == {"config.json", "model.safetensors"}
    whole, limit = load_file(tmp_path / "one" / "model.safetensors"), 1500
    quantized.export(kind, tmp_path / "many", max_shard_size=limit)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))
    ]
    assert len(files) > 3
    assert index["weight_map"].keys() == whole.keys()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in whole.values())
    sizes = []
    for file in files:
        arrays = load_file(file)
        sizes.append(sum(x.nbytes for x in arrays.values()))
        with safe_open(file, "np") as opened:
            assert opened.metadata() == {"format": "pt"}
        for name, x in arrays.items():
            assert index["weight_map"][name] == file.name
            np.testing.assert_array_equal(x, whole[name])
    alone = [size for size in sizes if size > limit]
    assert alone == [200 * 8 * 4]  # the embedding, which is no less in a file of its own
    assert all(a + b > limit for a, b in itertools.pairwise(sizes))  # none could have joined the one before
    homes = {name.rpartition(".")[0]: set() for name in whole if ".q" in name or "weight_" in name}
    for name, file in index["weight_map"].items():
        if not name.endswith((".bias", ".weight")):
            homes[name.rpartition(".")[0]].add(file)
    assert all(len(files) == 1 for files in homes.values())
    assert (tmp_path / "one" / "config.json").read_text() == (tmp_path / "many" / "config.json").read_text()
    modes = {file.stat().st_mode & 0o777 for file in (tmp_path / "many").iterdir()}
    assert len(modes) == 1


def test_memory_is_that_of_a_file(quantized, tmp_path, monkeypatch):
    from jpfq.export import folder

    held, add = [], folder.Shards.add

    def watched(self, arrays):
        add(self, arrays)
        held.append((sum(x.nbytes for x in self.waiting.values()), sum(x.nbytes for x in arrays.values())))

    monkeypatch.setattr(folder.Shards, "add", watched)
    quantized.export("awq", tmp_path / "o", max_shard_size=1500)
    assert len(held) == 15
    assert all(size <= max(1500, last) for size, last in held)


@pytest.mark.parametrize("size", [0, -1, 1.5, "5GB"])
def test_sizes_that_are_none_are_refused(quantized, size, tmp_path):
    with pytest.raises(ValueError, match=r"max_shard_size is a number of bytes, such as 5 \* 10\*\*9; got"):
        quantized.export("awq", tmp_path / "o", max_shard_size=size)


@pytest.mark.parametrize("kind", FORMATS)
def test_overwrite_replaces_an_export_and_leaves_the_rest(quantized, kind, tmp_path):
    home = tmp_path / "o"
    quantized.export("compressed-tensors", home, max_shard_size=1500)
    (home / "tokenizer.json").write_text("{}")
    (home / "more").mkdir()
    (home / "more" / "notes").write_text("mine")
    before = everything(home)
    with pytest.raises(ValueError, match=r"already in use: give another, or overwrite=True to replace it"):
        quantized.export(kind, home)
    assert everything(home) == before
    quantized.export(kind, home, overwrite=True)
    quantized.export(kind, tmp_path / "fresh")
    assert everything(home) == everything(tmp_path / "fresh") | {"tokenizer.json": b"{}"}
    assert (home / "more" / "notes").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"o", "fresh"}


def test_what_is_no_export_is_never_replaced(quantized, tmp_path):
    float_model, file = tmp_path / "float", tmp_path / "file"
    float_model.mkdir()
    (float_model / "config.json").write_text('{"model_type": "llama"}')
    (float_model / "model.safetensors").write_text("weights")
    file.write_text("text")
    for taken in (float_model, file):
        with pytest.raises(ValueError, match="already in use: export into a new folder"):
            quantized.export("awq", taken, overwrite=True)
    assert (float_model / "model.safetensors").read_text() == "weights"
    assert file.read_text() == "text"
    (tmp_path / "empty").mkdir()
    quantized.export("awq", tmp_path / "empty")
    quantized.export("awq", tmp_path / "new" / "below")
    assert everything(tmp_path / "empty") == everything(tmp_path / "new" / "below")


@pytest.mark.parametrize("when", ["while it is written", "while it is put in its place"])
def test_an_export_that_fails_leaves_the_old_one(quantized, when, tmp_path, monkeypatch):
    home = tmp_path / "o"
    quantized.export("awq", home)
    before = everything(home)
    with monkeypatch.context() as patch:
        if when == "while it is written":

            def stop(*_, **__):
                raise KeyboardInterrupt

            patch.setattr("jpfq.export.awq.arrays", stop)
            expected = KeyboardInterrupt
        else:
            patch.setattr(pathlib.Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
            expected = OSError
        with pytest.raises(expected):
            quantized.export("awq", home, overwrite=True)
    assert everything(home) == before
    assert [path.name for path in tmp_path.iterdir()] == ["o"]

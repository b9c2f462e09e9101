"""Each room imports only from its left, and each outside package only where it belongs."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1] / "jpfq"
FILES = sorted(ROOT.rglob("*.py"))
LAYERS = ("scalar", "matrix", "model", "calibrate", "network", "storage", "export", "report", "study")
ASIDE = {  # what stands beside them, and all that it may import from; none imports from it, but for INSIDE
    "embed": {"scalar", "matrix"},
    "hub": set(),
}
INSIDE = {  # rooms on its right that a file imports from, inside the functions that need them
    "network/quantized.py": {"storage", "export", "report"},  # `save`, `export`, `to_qwix`, `report`
    "network/quantize.py": {"storage"},  # `checkpoint=`
    "study/cli/language.py": {"hub"},  # a model from its own files
}

ONLY_IN = {
    "flax": {"model/linen.py", "model/nnx.py", "hub/decoder.py", "study/demo.py"},
    "optax": {"network/learn.py", "study/demo.py"},
    "matplotlib": {"report/svg.py", "report/result_plots.py", "study/plot.py"},
    "safetensors": {"storage/store.py", "export/folder.py", "export/like.py", "storage/checkpoint.py", "hub/folder.py"},
    "constriction": {"storage/entropy.py"},
    "qwix": {"export/qwix.py"},
    "gguf": {"hub/gguf_file.py", "export/gguf.py"},
    "tokenizers": {"hub/tokens.py"},
}


def imported(path, inside=True):
    """Absolute dotted names of everything a file imports, wherever in the file or outside of functions only."""
    package = ("jpfq", *path.relative_to(ROOT).parent.parts)
    names, tree = set(), ast.parse(path.read_text())
    for node in ast.walk(tree):
        if not inside and getattr(node, "col_offset", 0):
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            names |= {".".join((*module, alias.name)) for alias in node.names}
    return names


def layer_of(name):
    """The layer a dotted name of jpfq lies in; None for other packages and the top."""
    parts = name.split(".")
    return parts[1] if parts[0] == "jpfq" and len(parts) > 1 and parts[1] in (*LAYERS, *ASIDE) else None


def may_import(here, layer, target, outside):
    """Whether a file of one room may import from another; `outside` of its functions or only within."""
    if not outside and target in INSIDE.get(here, ()):
        return True
    if layer in ASIDE or target in ASIDE:
        return layer == target or target in ASIDE.get(layer, ())
    return LAYERS.index(target) <= LAYERS.index(layer)


def wrong(path):
    """Complaints about the imports of a file."""
    here = path.relative_to(ROOT).as_posix()
    layer = here.split("/")[0] if "/" in here else None
    outside = imported(path, inside=False)
    for name in sorted(imported(path)):
        top = name.split(".")[0]
        if layer and top == "jpfq":
            target = layer_of(name)
            if target is None:
                yield f"{here} imports {name}, the whole package"
            elif not may_import(here, layer, target, name in outside):
                yield f"{here} imports {name}, to the right"
        if top in ONLY_IN and here not in ONLY_IN[top]:
            yield f"{here} imports {name}"
        if name.startswith("jax._src") or top == "jaxlib":
            yield f"{here} imports {name}, which is private to JAX"
        known = {"jax", "numpy", "jpfq"} | sys.stdlib_module_names
        if layer in ("scalar", "matrix", "embed") and top not in known:
            yield f"{here} imports {name}, neither jax, numpy nor the standard library"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_imports_only_from_the_left(path):
    assert list(wrong(path)) == []


@pytest.mark.parametrize("layer", ["scalar", "matrix", "embed"])
def test_settings_are_registered_so_that_their_class_counts(layer):
    """See jpfq/scalar/pytree.py: with JAX's own `register_dataclass` two classes may share a compiled program."""
    for path in (ROOT / layer).glob("*.py"):
        assert "jax.tree_util.register_dataclass" not in imported(path), path.name


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_names_nothing_private_of_jax(path):
    attributes = {ast.unparse(n) for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
    assert not {a for a in attributes if a.startswith("jax._src")}


def test_all_layers_are_there():
    assert {p.relative_to(ROOT).parts[0] for p in FILES if p.parent != ROOT} == {*LAYERS, *ASIDE}


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("scalar/x.py", "from ..matrix import solve", "to the right"),
        ("matrix/x.py", "import jpfq.calibrate.loop", "to the right"),
        ("matrix/x.py", "from jpfq import quantize", "whole package"),
        ("embed/x.py", "from ..network import quantize", "to the right"),
        ("network/x.py", "from ..embed import SigmaDelta", "to the right"),
        ("network/x.py", "def f():\n    from flax import nnx", "imports flax"),
        ("study/x.py", "import matplotlib.pyplot as plt", "imports matplotlib"),
        ("network/x.py", "from jax._src.core import Var", "private"),
        ("scalar/x.py", "import scipy.linalg", "neither"),
        ("matrix/x.py", "from ..scalar import Grid", None),
        ("embed/x.py", "from ..matrix import Recursion\nfrom .maps import Map", None),
        ("model/linen.py", "import flax.linen as nn", None),
        ("scalar/x.py", "import abc, math, numpy as np\nfrom jax import lax\nfrom .grid import Grid", None),
    ],
)
def test_the_check_itself_sees(tmp_path, monkeypatch, file, line, complaint):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / file
    path.parent.mkdir()
    path.write_text(line + "\n")
    found = list(wrong(path))
    assert any(complaint in c for c in found) if complaint else not found

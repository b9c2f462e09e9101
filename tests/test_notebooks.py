"""Notebooks: their code runs, and what they show was made by it."""

import json
from pathlib import Path

import jax
import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs(path, capsys):
    """Cell by cell, in order. What is printed has the words, if not the digits, of what is kept in the file."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    namespace: dict = {}
    words = lambda text: [word for word in text.split() if word.isalpha()]
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] != "code":
                continue
            exec(compile("".join(cell["source"]), f"{path.name}:{cell['id']}", "exec"), namespace)
            kept = [output for output in cell["outputs"] if output["output_type"] == "stream"]
            pictures = [output for output in cell["outputs"] if output["output_type"] == "display_data"]
            assert words(capsys.readouterr().out) == words("".join("".join(output["text"]) for output in kept))
            assert len(plt.get_fignums()) == len(pictures)
            plt.close("all")


def test_there_are_notebooks():
    assert [path.name for path in NOTEBOOKS if path.stat().st_size > 150_000] == []
    assert "embeddings.ipynb" in [path.name for path in NOTEBOOKS]

"""Notebooks: their code runs, and what they show was made by it."""

import json
from pathlib import Path

import jax
import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
BRIEF = ("01_one_matrix.ipynb",)  # the others run with -m slow
NAMES = (
    *BRIEF,
    "02_a_network.ipynb",
    "07_accumulators.ipynb",
    "09_sweeps.ipynb",
    "10_training_code.ipynb",
    "14_error_decays_with_width.ipynb",
    "16_random_features.ipynb",
    "22_random_networks.ipynb",
    "23_spatial_filters.ipynb",
)


def marked(path):
    return pytest.param(path, id=path.name, marks=() if path.name in BRIEF else pytest.mark.slow)


@pytest.mark.parametrize("path", [marked(path) for path in NOTEBOOKS])
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
    assert [path.name for path in NOTEBOOKS] == list(NAMES)


def test_notebooks_are_kept_as_they_ran_from_top_to_bottom():
    """And say nothing of the machine they ran on."""
    for path in NOTEBOOKS:
        notebook = json.loads(path.read_text())
        assert notebook["metadata"] == {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
        cells = notebook["cells"]
        assert len({cell["id"] for cell in cells}) == len(cells)
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)), path.name
        kinds = {(output["output_type"], output.get("name")) for cell in code for output in cell["outputs"]}
        assert kinds <= {("stream", "stdout"), ("display_data", None)}, path.name
        assert all(cell["metadata"] == {} for cell in cells), path.name

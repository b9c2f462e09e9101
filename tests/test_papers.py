"""The page of the papers is true: every name, file and figure on it exists, and no preset is left out."""

import json
import re
from pathlib import Path

import pytest

import jpfq
from tests.test_docs import names_of

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "notebooks" / "24_papers.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in PAGE.splitlines() if line.startswith("| ")]
PAPERS = {row[0].split(":")[0].strip("| "): row for row in ROWS[2:]}
FILE = re.compile(r"`((?:bench|notebooks|tests)/[\w./]+\.\w+)`")
FIGURE = re.compile(r"(?<![\w.])-?\d+\.\d+\b")
OF_OTHERS = {"rtn", "fewer_bits"}  # presets of baselines, which no paper of the line has


def found_in(path: str) -> str:
    """The text of a result, or what a notebook printed."""
    text = (ROOT / path).read_text()
    if not path.endswith(".ipynb"):
        return text
    outputs = [output for cell in json.loads(text)["cells"] for output in cell.get("outputs", [])]
    return "".join("".join(output.get("text", [])) for output in outputs)


@pytest.mark.parametrize("paper", PAPERS)
def test_every_name_and_file_exists(paper):
    row = PAPERS[paper]
    assert len(row) == 3
    names = re.findall(r"`(jpfq(?:\.\w+)+)`", " ".join(row))
    assert names
    for name in names:
        x = jpfq
        for part in name.split(".")[1:]:
            x = getattr(x, part)
    for path in FILE.findall(" ".join(row)):
        assert (ROOT / path).is_file(), path


@pytest.mark.parametrize("paper", PAPERS)
def test_every_figure_stands_in_a_file_beside_it(paper):
    """A figure belongs to the first file that is named after it; figures without one are none of ours."""
    cell = PAPERS[paper][2]
    start, seen = 0, 0
    for place in FILE.finditer(cell):
        figures = FIGURE.findall(cell[start : place.start()])
        text = found_in(place[1])
        assert [figure for figure in figures if figure not in text] == [], place[1]
        start, seen = place.end(), seen + len(figures)
    assert FIGURE.findall(cell[start:]) == []
    assert bool(seen) == (not cell.startswith("None"))


def test_no_preset_is_left_out():
    presets = {name for name in names_of(jpfq.paper) if name not in OF_OTHERS}
    assert {name for name in presets if f"`jpfq.paper.{name}`" not in PAGE} == set()


def test_all_papers_of_the_line_are_there():
    numbers = set(re.findall(r"arxiv\.org/abs/(\d{4}\.\d{5})", PAGE))
    ours = {"2010.15979", "2201.11113", "2309.10975", "2412.18184", "2409.17092", "2505.11695", "2508.04853"}
    assert numbers >= ours | {"2210.17323", "2106.02614", "2010.00712", "2007.15776", "2202.04542"}
    assert len(PAPERS) >= len(numbers)

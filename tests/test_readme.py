"""The README and the guides are true: their blocks of code run, in order, and every command and link is one that exists."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import jax
import pytest

from jpfq.scalar import grid_of_bits
from jpfq.study.cli import main

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
GUIDES = sorted((ROOT / "notebooks").glob("*.md"))
CLI = ROOT / "notebooks" / "12_command_line.md"
TEXTS = {page: page.read_text() for page in (README, *GUIDES)}
GOES_ON = (
    "The code goes on from the Linen example of the [README](../README.md): "
    "its imports, `model`, `variables` and `batches`."
)


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", TEXTS[page], re.DOTALL)


def run(page, namespace):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in blocks(page, "python"):
            exec(compile(block, page.name, "exec"), namespace)


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The names that the README's example makes, and what it prints."""
    namespace: dict = {}
    with contextlib.chdir(tmp_path_factory.mktemp("readme")), contextlib.redirect_stdout(io.StringIO()) as out:
        run(README, namespace)
    return namespace, out.getvalue()


@pytest.mark.slow
def test_the_example_runs(example):
    assert "kernels quantized to" in example[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "guide", [page for page in GUIDES if page != CLI and blocks(page, "python")], ids=lambda page: page.stem
)
def test_python_blocks_run_in_order(guide, tmp_path, monkeypatch, request):
    namespace = {}
    if GOES_ON in TEXTS[guide]:
        made = request.getfixturevalue("example")[0]
        namespace = {name: made[name] for name in ("nn", "jax", "jpfq", "model", "variables", "batches")}
    monkeypatch.chdir(tmp_path)
    run(guide, namespace)


@pytest.mark.slow
def test_the_commands_for_an_own_model_run_in_order(tmp_path, monkeypatch, capsys):
    (own,) = blocks(CLI, "python")
    assert own.startswith("# mymodel.py")
    (tmp_path / "mymodel.py").write_text(own)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    commands = [line for block in blocks(CLI, "sh") for line in block.splitlines()]
    assert commands[0].startswith("jpfq quantize")
    for number, command in enumerate(commands):
        assert command.startswith("jpfq ")
        assert main(shlex.split(command, comments=True)[1:]) == 0, command
        out = capsys.readouterr().out
        bits = re.search(r"--bits ((?:\w+ ?)+)", command)
        if number == 0:
            for name in bits[1].split() if bits else ("4",):
                assert f" {'Ternary()' if name == 'ternary' else grid_of_bits(int(name))} " in out
            assert ("kernels quantized to" in out) == ("--summary" in command)


def test_the_first_commands_are_those_of_ci_and_cli():
    commands = [line for block in blocks(README, "sh") for line in block.splitlines()]
    assert commands[0].endswith("&& jpfq demo")
    install_and_test = commands[1]
    assert install_and_test.split(" && ")[1] == "pytest"
    extra = re.search(r"'\.\[(\w+)\]'", install_and_test)
    assert extra
    assert f"-e '.[{extra[1]}]' && pytest" in (ROOT / ".ci" / "run").read_text()


def test_the_readme_is_short_and_links_every_guide():
    assert len(TEXTS[README].splitlines()) <= 180
    links = re.findall(r"\]\((notebooks/[^)]+\.md)\)", TEXTS[README])
    assert {ROOT / link for link in links} == set(GUIDES)


def headings(page):
    """The anchors that GitHub makes of the headings of a page."""
    prose = re.sub(r"```.*?```", "", TEXTS[page], flags=re.DOTALL)
    return {re.sub(r"[^\w\- ]", "", line).replace(" ", "-").lower() for line in re.findall(r"(?m)^#+ (.+)$", prose)}


@pytest.mark.parametrize("guide", GUIDES, ids=lambda page: page.stem)
def test_a_guide_begins_with_a_title_and_for_whom_it_is(guide):
    title, empty, whom, end = TEXTS[guide].splitlines()[:4]
    assert title.startswith("# ")
    assert not empty
    assert whom.startswith("For ")
    assert whom.endswith(".")
    assert not end


@pytest.mark.parametrize(
    ("page", "target"),
    [
        pytest.param(page, target, id=f"{page.stem}-{target}")
        for page, text in TEXTS.items()
        for target in sorted(set(re.findall(r"\]\((?!http)([^)]+)\)", text)))
    ],
)
def test_files_it_points_to_exist(page, target):
    file, _, anchor = target.partition("#")
    path = (page.parent / file).resolve() if file else page
    assert path.exists()
    assert not anchor or anchor in headings(path)


@pytest.mark.parametrize(
    "name", sorted({name for text in TEXTS.values() for name in re.findall(r"`((?:bench|notebooks)/[\w.]+)`", text)})
)
def test_scripts_it_names_exist(name):
    assert (ROOT / name).is_file()

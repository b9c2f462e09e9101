"""The README is true: every block of code in it runs, in order, and every command is one that exists."""

import re
import shlex
from pathlib import Path

import jax
import pytest

from jpfq.scalar import grid_of_bits
from jpfq.study.cli import main

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.slow
def test_python_blocks_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for block in blocks("python"):
            if not block.startswith("# mymodel.py"):
                exec(compile(block, "README.md", "exec"), namespace)
    assert "kernels quantized to" in capsys.readouterr().out


@pytest.mark.slow
def test_the_commands_for_an_own_model_run_in_order(tmp_path, monkeypatch, capsys):
    (own,) = [block for block in blocks("python") if block.startswith("# mymodel.py")]
    (tmp_path / "mymodel.py").write_text(own)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    commands = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("jpfq ")]
    assert commands[0].startswith("jpfq quantize")
    for number, command in enumerate(commands):
        assert main(shlex.split(command, comments=True)[1:]) == 0, command
        out = capsys.readouterr().out
        bits = re.search(r"--bits ((?:\w+ ?)+)", command)
        if number == 0:
            for name in bits[1].split() if bits else ("4",):
                assert f" {'Ternary()' if name == 'ternary' else grid_of_bits(int(name))} " in out
            assert ("kernels quantized to" in out) == ("--summary" in command)


def test_the_first_commands_are_those_of_ci_and_cli():
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    assert commands[0].endswith("&& jpfq demo")
    install_and_test = commands[1]
    assert install_and_test.split(" && ")[1] == "pytest"
    extra = re.search(r"'\.\[(\w+)\]'", install_and_test)
    assert extra
    assert f"-e '.[{extra[1]}]' && pytest" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("target", re.findall(r"\]\((?!http)([^)]+)\)", TEXT) + re.findall(r"`(bench/\w+\.py)`", TEXT))
def test_files_it_points_to_exist(target):
    assert (ROOT / target).exists()

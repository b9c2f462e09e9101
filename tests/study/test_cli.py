"""The command line: the demo's claim, a user's own model, and readable errors."""

import re
import sys

import pytest

from jpfq.study.cli import main

OWN = """
import jax, jax.numpy as jnp
X = jax.random.normal(jax.random.key(0), (64, 8))
PARAMS = {"a": jax.random.normal(jax.random.key(1), (8, 16)), "b": jax.random.normal(jax.random.key(2), (16, 3))}

def apply(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]

def scored():
    exact = apply(PARAMS, X)
    return apply, PARAMS, [X], lambda params: 100 * float((apply(params, X).argmax(1) == exact.argmax(1)).mean())

def plain():
    return apply, PARAMS, iter([X])

def wrong():
    return apply
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's in the working directory."""
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("own", None)


def test_the_demo_shows_gpfq_ahead_at_few_bits(tmp_path, capsys):
    picture = tmp_path / "digits.png"
    assert main(["demo", "--picture", str(picture)]) == 0
    out = capsys.readouterr().out
    rows = re.findall(r"(CNN|MLP) .*?(Ternary\(\)|Integer\(\d\)) +\S+ +\S+ +([\d.]+) +([\d.]+) +([\d.]+)", out)
    assert len(rows) == 8
    scores = {(model, grid): tuple(map(float, figures)) for model, grid, *figures in rows}
    for model in ("CNN", "MLP"):
        for grid in ("Ternary()", "Integer(2)"):
            exact, msq, gpfq = scores[model, grid]
            assert exact > 95
            assert msq + 1 < gpfq
    assert str(picture) in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_model_of_ones_own(own, capsys):
    arguments = ["quantize", "own:scored", "--bits", "2", "ternary", "--summary", "--picture", "own.png", "--skip", "b"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"function +(Integer\(2\)|Ternary\(\))", out)) == 2
    assert "rule 0 ('b') skips it" in out
    assert (own / "own.png").stat().st_size > 5000


def test_a_model_without_a_score(own, capsys):
    assert main(["quantize", "own:plain", "--bits", "4", "--method", "GPFQ"]) == 0
    assert "GPFQ error" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["own"], "MODULE:FACTORY"),
        (["absent:factory"], "Cannot import absent:factory"),
        (["own:absent"], "Cannot import own:absent"),
        (["own:wrong"], "must return"),
        (["own:plain", "--bits", "17"], "from 1 to 16"),
        (["own:plain", "--bits", "four"], "'four'"),
        (["own:plain", "--picture", "x.png"], "return evaluate"),
        (["own:scored", "--picture", "absent/x.png"], "no folder"),
        (["own:scored", "--picture", "x.doc"], "'x.doc'"),
        (["own:plain", "--skip", "c"], "matches no parameter. Kernels: a, b"),
    ],
)
def test_errors_are_one_line_and_status_2(own, capsys, arguments, message):
    assert main(["quantize", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("jpfq: ")
    assert message in error
    assert "Traceback" not in error


def test_debug_shows_the_traceback(own):
    with pytest.raises(ValueError, match="MODULE:FACTORY"):
        main(["--debug", "quantize", "own"])

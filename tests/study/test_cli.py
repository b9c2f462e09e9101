"""The command line: the demo's claim, a user's own model, and readable errors."""

import json
import re
import sys

import jax.numpy as jnp
import pytest

import jpfq
from jpfq import Rule, best
from jpfq.study import demo
from jpfq.study.cli import main
from jpfq.study.compare import METHODS, SHOWN
from tests.network.saved import result, tensor

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


@pytest.mark.slow
def test_the_demo_shows_gpfq_ahead_of_rounding_and_best_ahead_of_both(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "GRIDS", (jpfq.Ternary(), jpfq.Integer(2)))  # the hardest two, to save time
    picture = tmp_path / "digits.png"
    assert main(["demo", "--picture", str(picture)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"float +MSQ +GPFQ +best +MSQ error +GPFQ error +best error", out)
    figures = r" +([\d.]+)" * 4 + r" +([\d.]+)%" * 3
    rows = re.findall(rf"(CNN|MLP) .*?(Ternary\(\)|Integer\(\d\)) +\S+ +\S+{figures}", out)
    assert len(rows) == 4
    scores = {(model, grid): tuple(map(float, figures)) for model, grid, *figures in rows}
    for model in ("CNN", "MLP"):
        for grid in ("Ternary()", "Integer(2)"):
            exact, msq, gpfq, best, *_ = scores[model, grid]
            assert exact > 95
            assert msq + 1 < gpfq <= best + 1
    for *_, msq_error, gpfq_error, best_error in scores.values():
        assert best_error < gpfq_error < msq_error
    assert str(picture) in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_model_of_ones_own(own, capsys):
    arguments = ["quantize", "own:scored", "--bits", "2", "ternary", "--summary", "--picture", "own.png", "--skip", "b"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"function +(Integer\(2\)|Ternary\(\))", out)) == 2
    assert re.search(r"MSQ +GPFQ +best +MSQ error +GPFQ error +best error", out)
    assert "rule 0 ('b') skips it" in out
    assert (own / "own.png").stat().st_size > 5000


def test_a_model_without_a_score_by_methods_of_ones_choice(own, capsys):
    assert main(["quantize", "own:plain", "--bits", "4", "--method", "OPTQ", "Qronos", "--scale", "absmax"]) == 0
    assert re.search(r"size +OPTQ error +Qronos error +seconds", capsys.readouterr().out)


def test_methods_are_those_that_rules_know(capsys):
    assert list(METHODS) == ["MSQ", "GPFQ", "OPTQ", "Qronos", "best"]
    assert SHOWN == ("MSQ", "GPFQ", "best")
    recipes = {name: Rule(".*", bits=4, **settings).recipe() for name, settings in METHODS.items()}
    assert recipes.pop("best") == best(4)[0].recipe()
    for name, recipe in recipes.items():
        assert type(recipe.method).__name__ == name
        assert (recipe.finish, recipe.shrinkage) == (None, None)
    with pytest.raises(SystemExit):
        main(["quantize", "own:plain", "--method", "GPTQ"])
    assert "invalid choice: 'GPTQ'" in capsys.readouterr().err


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


@pytest.fixture
def kept(tmp_path):
    """A saved result."""
    kernel = tensor((12, 4), (1, 4), jpfq.Ternary())
    params = {"a": {"kernel": jnp.ones((12, 4)), "bias": jnp.ones(4)}}
    result(lambda params, x: x, {"a/kernel": kernel}, params=params).save(tmp_path / "kept")
    return tmp_path / "kept"


def test_inspect_prints_what_a_saved_result_holds(kept, capsys):
    assert main(["inspect", str(kept)]) == 0
    out = capsys.readouterr().out
    size = sum(path.stat().st_size for path in kept.iterdir())
    packed = 10 + 4 * 4  # 48 ternary codes, five to a byte, and four steps
    assert re.search(rf"a/kernel +12x4 +Ternary\(\) +{8 * packed / 48:.2f} +\S+% +{packed}\n", out)
    assert "rule 1 skips it" in out
    assert f"{size:,} bytes on disk" in out
    assert f"as given {4 * (48 + 4)}." in out
    assert main(["inspect", str(kept), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["bytes"] == size
    assert [(k["kernel"], k["shape"], k["bytes"]) for k in figures["kernels"]] == [("a/kernel", [12, 4], packed)]


def test_inspect_of_what_is_no_result_is_an_error_of_one_line(kept, tmp_path, capsys):
    for folder, message in ((tmp_path / "none", "no saved result"), (kept, "is no JSON")):
        if folder == kept:
            (kept / "quantized.json").write_text("{")
        assert main(["inspect", str(folder)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("jpfq: ")
        assert message in error
        assert "Traceback" not in error

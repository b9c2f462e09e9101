"""The command line: the demo's claim, a user's own model, what is kept of it, exit statuses, and readable errors."""

import json
import logging
import os
import re
import shlex
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from jpfq import Rule, best
from jpfq.study import compare, demo
from jpfq.study.cli import command, main
from jpfq.study.cli.answer import as_json
from jpfq.study.compare import METHODS, SHOWN
from tests.network.saved import result, tensor

OWN = """
import jax, jax.numpy as jnp
X = jax.random.normal(jax.random.key(0), (64, 8))
PARAMS = {"a": jax.random.normal(jax.random.key(1), (8, 16)), "b": jax.random.normal(jax.random.key(2), (16, 3))}

def apply(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]

def score(params):
    return 100 * (apply(params, X).argmax(1) == apply(PARAMS, X).argmax(1)).mean()

def scored():
    print("a word of the user's")
    return apply, PARAMS, [X[:32], X[32:]], score

def plain():
    return apply, PARAMS, iter([X])

def number():
    return apply, PARAMS, [X], lambda params: float(score(params))

def several():
    return apply, PARAMS, [X], lambda params: apply(params, X)

def wrong():
    return apply

def pair():
    return apply, PARAMS

def unread():
    return apply, PARAMS, lambda n: [X]

def empty():
    return apply, PARAMS, []

def untold():
    return apply, PARAMS, [X], 3

def bare():
    return apply, None, [X]

def fails():
    return PARAMS["c"]

def ends():
    return apply, PARAMS, [X], lambda params: params["c"]

def stops():
    return apply, PARAMS, (PARAMS["c"] for _ in range(2))

def narrow():
    return apply, PARAMS, [X[:, :3]]

def uncalled():
    raise AssertionError("the factory is called before the options are checked")
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with modules of the user's."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own.py").write_text(OWN)
    (folder / "unsound.py").write_text("import absent_package\n")
    (folder / "full").mkdir()
    (folder / "full" / "notes.txt").write_text("mine")
    (folder / "page.html").write_text("mine")
    return folder


@pytest.fixture
def own(place, monkeypatch):
    """That folder as the working directory."""
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(place)
    yield place
    for name in ("own", "unsound"):
        sys.modules.pop(name, None)


def answer(capsys, *arguments, status=0):
    """The document of a command, which is all that the standard output has."""
    assert main([*arguments, "--json"]) == status
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def w4a8(own, capsys):
    """A result with activations and an accumulator, made by the command."""
    if not (own / "w4a8").exists():
        made = "quantize own:scored --method MSQ --save w4a8 --activation-bits 8 --accumulator-bits 16 --tile 4"
        (own / "w4a8.json").write_text(json.dumps(answer(capsys, *made.split())))
    return jpfq.load(own / "w4a8")


@pytest.mark.slow
def test_the_demo_shows_gpfq_ahead_of_rounding_and_best_ahead_of_both(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo, "GRIDS", (jpfq.Ternary(), jpfq.Integer(2)))  # the hardest two, to save time
    picture = tmp_path / "digits.png"
    assert main(["demo", "--picture", str(picture)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"float +MSQ +GPFQ +best +MSQ error +GPFQ error +best error", out)
    figures = r" +([\d.]+)" * 4 + r" +([\d.]+)%" * 3
    sizes = r" +[\d.]+ +[\d.]+ +[\d.]+ \w+ of [\d.]+ \w+"  # bits of the kernels and of all; bytes
    rows = re.findall(rf"(CNN|MLP) .*?(Ternary\(\)|Integer\(\d\)){sizes}{figures}", out)
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


@pytest.mark.slow
def test_a_model_of_ones_own(own, capsys):
    arguments = ["quantize", "own:scored", "--bits", "2", "ternary", "--summary", "--picture", "own.png", "--skip", "b"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert len(re.findall(r"function +(Integer\(2\)|Ternary\(\))", out)) == 2
    assert re.search(r"MSQ +GPFQ +best +MSQ error +GPFQ error +best error", out)
    assert "rule 0 ('b') skips it" in out
    assert (own / "own.png").stat().st_size > 5000


@pytest.mark.slow
def test_a_model_without_a_score_by_methods_of_ones_choice(own, capsys):
    assert main(["quantize", "own:plain", "--bits", "4", "--method", "MSQ", "OPTQ", "--scale", "absmax"]) == 0
    assert re.search(r"size +MSQ error +OPTQ error +seconds", capsys.readouterr().out)


def test_methods_are_those_that_rules_know():
    assert list(METHODS) == ["MSQ", "GPFQ", "OPTQ", "Qronos", "best"]
    assert SHOWN == ("MSQ", "GPFQ", "best")
    recipes = {name: Rule(".*", bits=4, **settings).recipe() for name, settings in METHODS.items()}
    assert recipes.pop("best") == best(4)[0].recipe()
    for name, recipe in recipes.items():
        assert type(recipe.method).__name__ == name
        assert (recipe.finish, recipe.shrinkage) == (None, None)


FOUR = {"grid": jpfq.Integer(4)}


@pytest.mark.parametrize(
    ("options", "rules", "how"),
    [
        ("", [Rule(".*", **FOUR)], {}),
        ("--bits ternary --scale absmax", [Rule(".*", grid=jpfq.Ternary(), scale=jpfq.scale.AbsMax())], {}),
        ("--group 4", [Rule(".*", **FOUR, scale=jpfq.scale.MinError(jpfq.scale.AbsMax(per=jpfq.scale.PerGroup(4))))], {}),
        ("--scale minmse --group 8", [Rule(".*", **FOUR, scale=jpfq.scale.MinMSE(per=jpfq.scale.PerGroup(8)))], {}),
        (
            "--skip a --skip c/.* --rule b 8 --bits 2",
            [
                Rule("a", skip=True),
                Rule("c/.*", skip=True),
                Rule("b", grid=jpfq.Integer(8)),
                Rule(".*", grid=jpfq.Integer(2)),
            ],
            {},
        ),
        (
            "--activation-bits 8 --accumulator-bits 16 --tile 4",
            [Rule(".*", **FOUR, activation_bits=8, accumulator=jpfq.Accumulator(16, 4))],
            {},
        ),
        ("--rounding stochastic --seed 3", [Rule(".*", **FOUR, rounding=jpfq.rounding.Stochastic())], {"key": 3}),
        ("--reference block --offload", [Rule(".*", **FOUR)], {"reference": "block", "offload": True}),
        ("--format nvfp4", jpfq.formats.nvfp4(), {}),
        (
            "--format int4 --group 8 --method gpfq --skip a",
            [Rule("a", skip=True), *jpfq.formats.int4(8, plain=True, method=jpfq.GPFQ())],
            {},
        ),
        ("--strict", [Rule(".*", **FOUR)], {"strict": True}),
        ("--checkpoint kept", [Rule(".*", **FOUR)], {"checkpoint": "kept"}),
    ],
)  # fmt: skip
def test_options_are_those_of_quantize(own, monkeypatch, options, rules, how):
    def asked(model, batches, rules, *, params, **how):
        calls.append((rules, how))
        raise KeyboardInterrupt

    calls: list = []
    monkeypatch.setattr(compare, "quantize", asked)
    main(["quantize", "own:plain", "--method", "best", *options.split()])
    ((found, given),) = calls
    assert found == rules
    wanted = {"offload": False, "strict": False} | how
    assert given.keys() == wanted.keys()
    for name, value in wanted.items():
        same = jax.random.key(value) == given[name] if name == "key" else str(given[name]) == str(value)
        assert same


def test_a_result_is_saved_as_quantize_makes_it(own, w4a8, capsys):
    from own import PARAMS, X, apply

    made = json.loads((own / "w4a8.json").read_text())
    rule = Rule(".*", bits=4, activation_bits=8, accumulator=jpfq.Accumulator(16, 4), **METHODS["MSQ"])
    quantized = jpfq.quantize(apply, [X[:32], X[32:]], rule, params=PARAMS)
    for path, own_tensor in quantized.tensors.items():
        np.testing.assert_array_equal(w4a8.tensors[path].codes, own_tensor.codes)
    (trial,) = made["trials"]
    assert (trial["grid"], trial["method"], trial["nbytes"]) == ("Integer(4)", "MSQ", quantized.nbytes)
    assert trial["output_error"] == pytest.approx(quantized.output_error)
    assert made["float_scores"] == {"function": 100.0}
    assert made["saved"]["bytes"] == sum(path.stat().st_size for path in (own / "w4a8").iterdir())
    again = ["quantize", "own:uncalled", "--method", "MSQ", "--save", "w4a8"]
    assert main(again) == 2
    assert "--overwrite" in capsys.readouterr().err


@pytest.mark.slow
def test_the_log_goes_to_the_standard_error_and_nowhere_else(own, capsys, caplog):
    log = logging.getLogger("jpfq")
    before = log.level, log.propagate, list(log.handlers)
    caplog.set_level(logging.INFO)  # of somebody who listens to all logs
    answer(capsys, "quantize", "own:plain", "--method", "MSQ", "OPTQ")
    assert main(["quantize", "own:plain", "--method", "MSQ"]) == 0
    err = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"all layers done, 0:\d\d gone( \(.*\))?", err[-2])
    assert re.fullmatch(r"\[1/1\] function: Integer\(4\), MSQ: [\d.]+ s", err[-1])
    assert [record for record in caplog.records if record.name == "jpfq"] == []
    assert (log.level, log.propagate, log.handlers) == before


def test_evaluate_scores_a_result_beside_the_float_model(own, w4a8, capsys):
    from own import PARAMS, X, apply, score

    found = answer(capsys, "evaluate", "w4a8", "own:scored")
    exact = apply(PARAMS, X)
    assert found["float_score"] == 100
    assert found["score"] == pytest.approx(float(score(w4a8.params)))
    error = np.linalg.norm(apply(w4a8.params, X) - exact) / np.linalg.norm(exact)
    assert found["weights_error"] == pytest.approx(error, rel=1e-5)
    assert found["output_error"] == pytest.approx(w4a8.output_error, rel=1e-4)  # activations rounded, as calibrated
    assert found["output_error"] != pytest.approx(found["weights_error"], rel=1e-4)
    assert main(["evaluate", "w4a8", "own:plain"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"activations too +\d", out)
    assert "no evaluate" in out


def test_certify_says_by_its_status_whether_sums_fit(own, w4a8, capsys):
    from own import PARAMS, apply

    certificate = jpfq.certify(jpfq.load(own / "w4a8", apply, params=PARAMS), tile=4)
    needed = certificate.needed
    of = ["certify", "w4a8", "own:plain", "--tile", "4", "--bits"]
    fits, overflows = answer(capsys, *of, str(needed)), answer(capsys, *of, str(needed - 1), status=1)
    assert (fits["holds"], overflows["holds"]) == (True, False)
    assert fits["needed"] == overflows["needed"] == needed
    assert [site["kernel"] for site in fits["sites"]] == ["a", "b"]
    assert (
        sum(site["overflowing"] for site in fits["sites"])
        == 0
        < sum(site["overflowing"] for site in overflows["sites"])
    )
    assert main([*of, str(needed)]) == 0
    assert "no input overflows" in capsys.readouterr().out


def test_report_writes_a_page(own, w4a8, capsys):
    assert main(["report", "w4a8", "w4a8.html", "--title", "Four bits"]) == 0
    assert "w4a8.html" in capsys.readouterr().out
    assert "Four bits" in (own / "w4a8.html").read_text()
    assert main(["report", "w4a8", "w4a8.html"]) == 2
    assert main(["report", "w4a8", "w4a8.html", "--overwrite"]) == 0


SWEEP = ["sweep", "own:scored", "--method", "MSQ", "--bits", "2", "4", "--c", "0.7", "1.0"]


@pytest.mark.slow
def test_a_sweep_keeps_its_best_within_a_budget(own, capsys):
    found = answer(capsys, *SWEEP, "--save", "swept", "--bits-per-weight", "6.5", "--picture", "swept.png")
    records = found["records"]
    assert [(r["method"], r["bits"], r["c"]) for r in records] == [("MSQ", b, c) for b in (2, 4) for c in (0.7, 1.0)]
    assert found["loss"] == "-score"
    least = min(r["loss"] for r in records if r["bits_per_weight"] <= 6.5)
    kept = records[found["best"]]
    assert (kept["loss"], kept["bits"]) == (least, 2)
    assert (own / "swept.png").stat().st_size > 5000
    scores = answer(capsys, "evaluate", "swept", "own:scored")
    assert scores["score"] == pytest.approx(-least)
    assert scores["output_error"] == pytest.approx(kept["output_error"], rel=1e-4)


@pytest.mark.slow
def test_a_sweep_by_error_and_one_that_finds_nothing(own, capsys):
    found = answer(capsys, *SWEEP, "--by-error")
    assert found["loss"] == "output_error"
    assert all(r["loss"] == r["output_error"] for r in found["records"])
    few = [*SWEEP, "--by-error", "--save", "none", "--bits-per-weight", "1"]
    assert answer(capsys, *few, status=1)["front"] == found["front"]
    assert not (own / "none").exists()
    assert main(few) == 1
    out, error = capsys.readouterr()
    assert "The loss is the relative error of the outputs" in out
    assert "nothing is saved" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("quantise own:scored", "there is no command 'quantise'. Did you mean quantize?"),
        ("", "required: COMMAND"),
        ("quantize", "required: MODULE:FACTORY"),
        ("quantize --bits 2 own:scored", "before options of many values"),
        ("quantize own:uncalled --metod MSQ", "unrecognized arguments: --metod MSQ. Did you mean --method?"),
        ("quantize own", "MODULE:FACTORY"),
        ("quantize own.py:scored", "name the module: own:scored."),
        ("quantize ./own.py:scored", "./own.py:scored names a file; name the module: own:scored."),
        ("quantize ./own.py", "./own.py names a file; name the module: own:FACTORY."),
        ("quantize below/own.py:scored", "name the module: below.own:scored."),
        ("quantize ../own.py:scored", ", own:scored."),
        ("quantize absent:factory", "Cannot import absent:factory: there is no module absent"),
        ("quantize owm:scored", "Did you mean own?"),
        ("quantize own:scord", "Cannot import own:scord: the module own has no 'scord'. Did you mean own:scored?"),
        ("quantize own:wrong", "must return (model, variables, batches) or those and evaluate; got function"),
        ("quantize own:pair", "got 2 values"),
        ("quantize own:unread", "such as a list of arrays"),
        ("quantize own:empty", "no batches"),
        ("quantize own:untold", "must return a function, evaluate, as its fourth value; got 3"),
        ("quantize own:bare", "A function needs its parameters"),
        ("quantize own:uncalled --bits 17", "from 1 to 16"),
        ("quantize own:uncalled --bits four", "'four'"),
        ("quantize own:uncalled --bits 4 own:scored", "MODULE:FACTORY goes before the options"),
        ("quantize own:uncalled --method GPTQ", "--method OPTQ."),
        ("quantize own:uncalled --method qronoss", "Did you mean Qronos?"),
        ("quantize own:uncalled --scale absmx", "Did you mean absmax?"),
        ("quantize own:uncalled --rounding up", "nearest, stochastic"),
        ("quantize own:uncalled --rounding stochastic", "such as --seed 0"),
        ("quantize own:uncalled --seed 0", "--rounding stochastic"),
        ("quantize own:uncalled --seed none", "invalid int value: 'none'"),
        ("quantize own:uncalled --reference blok", "Did you mean block?"),
        ("quantize own:uncalled --group 0", "PerGroup takes a positive number"),
        ("quantize own:uncalled --format fp4", "--format is int4, "),
        ("quantize own:uncalled --format nvfp4 --scale absmax", "--format nvfp4 has steps of its own"),
        ("quantize own:uncalled --format int4 nvfp4 --group 8", "--format nvfp4 has groups of its own"),
        ("quantize own:uncalled --tile 4", "--tile needs --accumulator-bits"),
        ("quantize own:uncalled --accumulator-bits 16", "--accumulator-bits needs --activation-bits"),
        ("quantize own:uncalled --activation-bits 8 --accumulator-bits 99", "from 2 to 32"),
        ("quantize own:uncalled --activation-bits 8 --accumulator-bits 8", "holds no product"),
        ("quantize own:uncalled --rule b four", "--rule takes numbers from 1 to 16"),
        ("quantize own:uncalled --skip (", "a regular expression"),
        ("quantize own:uncalled --save new", "--save takes one result, but there are 3"),
        ("quantize own:uncalled --bits 2 3 --method MSQ --checkpoint new", "--checkpoint takes one result"),
        ("quantize own:uncalled --method MSQ --save absent/new", "There is no folder absent"),
        ("quantize own:uncalled --method MSQ --save full", "something else: save elsewhere"),
        ("quantize own:uncalled --method MSQ --save full --overwrite", "something else"),
        ("quantize own:uncalled --method MSQ --save own.py", "something else"),
        ("quantize own:uncalled --method MSQ --entropy-coded", "an option of --save DIR"),
        ("quantize own:uncalled --method MSQ --overwrite", "an option of --save DIR, --export DIR and --report"),
        ("quantize own:uncalled --export new", "--export takes one result, but there are 3"),
        ("quantize own:uncalled --method MSQ --export full --overwrite", "full is already in use: export into a new folder"),
        ("quantize own:uncalled --method MSQ --report new.htm", "The report is a .html file; got 'new.htm'"),
        ("quantize own:uncalled --method MSQ --report page.html", "--overwrite"),
        ("quantize own:uncalled --picture absent/x.png", "There is no folder absent"),
        ("quantize own:uncalled --picture x.doc", "a .png, .pdf or .svg file; got 'x.doc'"),
        ("quantize own:plain --picture x.png", "return evaluate"),
        ("quantize own:plain --skip c", "matches no parameter. Kernels: a, b"),
        ("quantize own:plain --group 3", "take a divisor by --group, or another format"),
        ("quantize own:plain --format awq", "Leave them out by --skip PATTERN."),
        ("demo --picture x.doc", "'x.doc'"),
        ("sweep own:uncalled --c 0.7 --scale minmse", "--c is the factor of --scale absmax"),
        ("sweep own:uncalled --c -1", "the factor c must be a positive number"),
        ("sweep own:uncalled --c x", "invalid float value: 'x'"),
        ("sweep own:uncalled --bits 2 99", "The setting (bits=99) does not give rules"),
        ("sweep own:uncalled --lanes 0", "--lanes takes a positive number"),
        ("sweep own:uncalled --bits-per-weight 4", "add --save DIR or --report"),
        ("sweep own:number", "evaluate of own:number converts arrays to Python numbers"),
        ("quantize own:several", "evaluate of own:several must return one number; got an array of shape (64, 3)"),
        ("sweep own:several", "got an array of shape (64, 3)"),
        ("evaluate w3a8 own:uncalled", "There is no saved result in w3a8"),
        ("evaluate full own:uncalled", "it has no quantized.json"),
        ("inspect absent", "no saved result"),
        ("report absent x.html", "no saved result"),
        ("certify absent own:uncalled --bits 16", "no saved result"),
        ("certify absent own:uncalled", "required: --bits"),
        ("certify absent own:uncalled --bits 1", "from 2 to 63"),
        ("certify absent own:uncalled --bits 16 --tile 0", "--tile is a positive number"),
    ],
)  # fmt: skip
def test_errors_are_one_line_and_status_2(own, capsys, arguments, message):
    assert main(arguments.split()) == 2
    out, error = capsys.readouterr()
    assert out in ("", "a word of the user's\n")
    assert error.startswith("jpfq: ")
    assert message in error
    assert "Traceback" not in error


def test_saved_results_of_another_kind(own, w4a8, capsys):
    """What is known only when the folder is read."""
    bare = result(lambda params, x: x, {"a": tensor((12, 4), (1, 4), jpfq.Ternary())}, params={"a": jnp.ones((12, 4))})
    if not (own / "w1").exists():
        bare.save(own / "w1")
    for arguments, message in (
        ("certify w1 own:plain --bits 16", "w1 cannot be loaded: The model is another one"),
        ("evaluate w1 own:plain", "The model is another one"),
        ("inspect w4a", "Did you mean w4a8?"),
        ("report w1 page.html", "--overwrite"),
        ("report w1 page.txt", "a .html file"),
    ):
        assert main(arguments.split()) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "whose", "line"),
    [
        ("quantize own:fails", "own:fails raised", 'PARAMS["c"]'),
        ("quantize own:ends", "evaluate, which own:ends returns, raised", 'params["c"]'),
        ("sweep own:ends", "evaluate, which own:ends returns, raised", 'params["c"]'),
        ("quantize own:stops", "batches, which own:stops returns, raised", 'PARAMS["c"]'),
        ("quantize own:narrow", "the model, which own:narrow returns, raised", 'params["a"]'),
        ("quantize unsound:scored", "the module unsound raised", "import absent_package"),
    ],
)
def test_errors_in_code_of_the_users_keep_their_traceback(own, capsys, arguments, whose, line):
    assert main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert line in error
    assert os.path.join("study", "cli") not in error
    assert error.splitlines()[-1].startswith(f"jpfq: {whose}")


@pytest.mark.parametrize("arguments", ["--debug quantize own", "quantize own --debug"])
def test_debug_shows_the_traceback(own, capsys, arguments):
    assert main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert "check_name" in error
    assert "MODULE:FACTORY" in error.splitlines()[-1]


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "jpfq: interrupted. The same command resumes from kept.\n"),
        (OSError(28, "No space left on device"), 2, "jpfq: [Errno 28] No space left on device\n"),
        (RuntimeError("odd"), 70, "jpfq: this is an error in the code of the model, or in jpfq: RuntimeError: odd\n"),
    ],
)
def test_statuses_of_runs_that_do_not_end_well(own, monkeypatch, capsys, raised, status, message):
    def run(*args, **kwargs):
        raise raised

    monkeypatch.setattr(compare, "quantize", run)
    assert main(["quantize", "own:plain", "--method", "MSQ", "--checkpoint", "kept"]) == status
    error = capsys.readouterr().err
    assert error.endswith(message)
    assert ("Traceback" in error) == (status == 70)


def test_interrupted_by_a_signal(own, monkeypatch, capsys):
    def run(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(compare, "quantize", run)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background ignores it
    try:
        assert main(["quantize", "own:plain", "--method", "MSQ"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "jpfq: interrupted.\n"


def test_stopped_by_sigterm_passes_through(own, monkeypatch):
    def run(*args, **kwargs):
        raise SystemExit(143)

    monkeypatch.setattr(compare, "quantize", run)
    with pytest.raises(SystemExit) as stopped:
        main(["quantize", "own:plain", "--method", "MSQ"])
    assert stopped.value.code == 143


@pytest.mark.parametrize("arguments", ["inspect kept", "--help"])
def test_nobody_reads_the_output(kept, monkeypatch, arguments, capfd):
    """As of `jpfq inspect DIR | head -1`: no traceback, now or when the interpreter ends."""
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.chdir(kept.parent)
    with open(writing, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert main(arguments.split()) == 141
        print("what comes after goes nowhere", file=out, flush=True)
    assert capfd.readouterr().err == ""


COMMANDS = ("demo", "quantize", "sweep", "evaluate", "inspect", "report", "certify")


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_help_has_examples_that_parse(name, capsys):
    with pytest.raises(SystemExit) as done:
        main([*([name] if name else []), "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    examples = re.findall(r"^  (jpfq .*)$", text, re.MULTILINE)
    assert examples
    for line in examples:
        options = command._parse(shlex.split(line)[1:])
        assert options.command == (name or "quantize")
    if name is None:
        assert all(re.search(rf"^    {each} ", text, re.MULTILINE) for each in COMMANDS)
        assert all(f"  {status} " in text for status in (0, 1, 2, 70, 130, 141, 143))


def test_version(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    assert re.fullmatch(r"jpfq \d+\.\d+\.\d+ \(jax .*, flax .*, Python 3\..*\)\n", capsys.readouterr().out)


def test_json_has_no_numbers_that_are_not_finite():
    document = {
        "a": [float("nan"), np.float32(0.5), np.int64(3)],
        "b": (float("-inf"), True, None),
        "c": jpfq.Ternary(),
    }
    assert json.loads(as_json(document)) == {"a": [None, 0.5, 3], "b": [None, True, None], "c": "Ternary()"}


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
    assert f"{size:,} bytes in files" in out
    assert f"{4 * (48 + 4)} before quantization." in out
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

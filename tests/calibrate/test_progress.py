"""Progress on a terminal, in Jupyter and in the log: what it says of the layers, of compilations and of the time left."""

import builtins
import contextlib
import logging
import os
import re
import sys
import threading
import types

import jax
import jax.numpy as jnp
import pytest

import jpfq
from jpfq.calibrate import progress as module
from jpfq.calibrate.progress import COMPILE, LEAST, Compiler, Progress, Step, clock, progress_of
from tests.network import zoo

X = jax.random.normal(jax.random.key(0), (16, 8))
PARAMS = {name: jax.random.normal(jax.random.key(i), (8, 8)) for i, name in enumerate("abc")}
RULE = zoo.plain(bits=4, method=jpfq.MSQ(), form="gram")
STEPS = [Step(f"layer {i} of 3", f"block_{i}/up", 1e9 * i, kind) for i, kind in ((1, "x"), (2, "x"), (3, "y"))]
TIMES = r"\d+:\d\d gone(, about \d+:\d\d left)?( \(compiling \d+:\d\d\))?"


def apply(params, x):
    """Three layers, of which the first is used twice."""
    left, right = (jnp.tanh(y @ params["a"]) for y in (x, 1 - x))
    return jnp.tanh(left @ params["b"] + right) @ params["c"]


@pytest.fixture
def now(monkeypatch):
    """A clock that stands still unless it is moved."""
    time = types.SimpleNamespace(at=100.0)
    monkeypatch.setattr(module, "time", types.SimpleNamespace(monotonic=lambda: time.at))
    return time


@pytest.fixture
def often(monkeypatch):
    """Everything that is told is shown."""
    for name in ("EVERY", "SILENT", "REDRAW"):
        monkeypatch.setattr(module, name, 0.0)


def begin():
    jax.monitoring.record_scalar(COMPILE + "of_a_test", 0.0)


def end():
    jax.monitoring.record_event_duration_secs(COMPILE + "of_a_test", 0.0)


def lines(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "jpfq"]


def run(steps=STEPS, errors=(0.25, None, 0.5), **how):
    """A run of some steps, the second of which compiles."""
    with progress_of(lambda: steps, how.get("show")) as report:
        for number, error in enumerate(errors):
            report.doing("gathering")
            if number == 1:
                begin()
                end()
            report.doing("solving")
            report.done(error)


def test_time_left_is_that_of_the_work_and_of_kinds_yet_to_compile(now):
    progress = Progress(STEPS, lambda progress, done: None)
    with progress.compiler:
        progress.doing("gathering")
        assert progress.left is None
        begin()
        now.at += 4
        end()
        now.at += 2
        progress.done(0.25)
        first, *others = (LEAST + step.work for step in STEPS)
        left = 2 * sum(others) / first + 4  # 2 s for the first, and one more kind that takes 4 s to compile
        assert progress.left == pytest.approx(left)
        now.at += 1
        assert progress.left == pytest.approx(left - 1)
        progress.doing("solving")
        assert progress.state == "solving"
        now.at += 100
        assert progress.left == 0
        progress.done()
        left = 103 / (first + others[0]) * others[1] + 4  # of 107 s, 4 were spent on compiling
        assert progress.left == pytest.approx(left)
        progress.done(0.5)
        assert progress.left == 0
        assert str(progress) == "layer 3 of 3, block_3/up: error 50.00%, 1:47 gone (compiling 0:04)"


def test_tracing_within_tracing_and_threads_at_a_time_count_once(now):
    changes = []
    with Compiler(lambda: changes.append(now.at)) as compiler:
        begin()
        now.at += 1
        begin()
        now.at += 1
        end()
        assert compiler.at_work
        beside = threading.Thread(target=lambda: (begin(), setattr(now, "at", now.at + 3), end()))
        beside.start()
        beside.join()
        now.at += 1
        end()
        assert not compiler.at_work
        assert compiler.seconds == 6
        alone = threading.Thread(target=lambda: (begin(), setattr(now, "at", now.at + 2), end()))
        alone.start()
        alone.join()
        end()  # of what began before anybody listened
        assert (compiler.seconds, changes) == (8, [100.0])
    begin()
    now.at += 9
    assert (compiler.seconds, compiler.at_work) == (8, False)
    with Compiler(lambda: None):
        jax.monitoring.clear_event_listeners()  # somebody else's right


def test_compilations_of_jax_are_seen():
    with Compiler(lambda: None) as compiler:
        jax.jit(lambda x: x * 3 + 1)(jnp.arange(7.0))
        seconds = compiler.seconds
        assert seconds > 0
        jnp.arange(7.0)
    assert not compiler.at_work


@pytest.mark.parametrize(("seconds", "text"), [(0.9, "0:00"), (61, "1:01"), (3600 * 2 + 59.9, "2:00:59")])
def test_clock(seconds, text):
    assert clock(seconds) == text


def test_the_log_has_every_layer_and_its_error(often, caplog):
    caplog.set_level(logging.INFO, "jpfq")
    quantized = jpfq.quantize(apply, [X], RULE, params=PARAMS)
    found = lines(caplog)
    order = list(quantized.tensors)
    assert len(order) == 3
    for number, path in enumerate(order, 1):
        error = float(quantized.info[path].relative_error)
        start = f"layer {number} of 3, {path}: "
        assert any(line.startswith(start + "solving, ") for line in found)
        assert number == 3 or any(line.startswith(f"{start}error {error:.2%}, ") for line in found)
    assert all(
        re.fullmatch(rf"layer \d of 3, \w: (gathering|solving|compiling|error .*?%), {TIMES}", x) for x in found[:-1]
    )
    assert re.fullmatch(rf"all layers done, {TIMES}", found[-1])


def test_the_log_is_brief(caplog, now):
    caplog.set_level(logging.INFO, "jpfq")
    with progress_of(lambda: STEPS, None) as report:
        report.doing("gathering")
        now.at += 14
        report.doing("solving")  # nothing yet: it may be done soon
        now.at += 2
        report.doing("solving")
        report.done(0.25)  # just told
        now.at += 6
        report.done(0.5)
        now.at += 60
        report.done(0.5)
    assert lines(caplog) == [
        "layer 1 of 3, block_1/up: solving, 0:16 gone",
        "layer 2 of 3, block_2/up: error 50.00%, 0:22 gone, about 0:20 left",
        "all layers done, 1:22 gone",
    ]


def test_a_run_that_fails_is_not_done(often, caplog):
    caplog.set_level(logging.INFO, "jpfq")
    with contextlib.suppress(ValueError), progress_of(lambda: STEPS, None) as report:
        report.doing("gathering")
        raise ValueError
    assert lines(caplog) == ["layer 1 of 3, block_1/up: gathering, 0:00 gone"]


def test_nobody_is_told_anything_that_they_do_not_ask_for(often, capsys, caplog):
    def steps():
        raise AssertionError("they are not asked for")

    caplog.set_level(logging.WARNING, "jpfq")
    for show in (None, False):
        with progress_of(steps, show) as report:
            report.doing("gathering")
            report.done(0.5)
    caplog.set_level(logging.INFO, "jpfq")
    with progress_of(steps, False) as report:
        report.done(0.5)
    with progress_of(lambda: [], None) as report:
        report.done(0.5)
    assert lines(caplog) == []
    run(show=True)
    out, err = capsys.readouterr()
    assert (out, lines(caplog)) == ("", [])
    assert "layer 2 of 3, block_2/up: compiling, 0:00 gone, about 0:00 left\n" in err
    assert err.endswith("all layers done, 0:00 gone\n")


@pytest.mark.parametrize("forced", [False, True])
def test_a_run_goes_on_where_nobody_reads(often, monkeypatch, tmp_path, forced):
    if forced:
        monkeypatch.setenv("FORCE_COLOR", "1")
    (closed := (tmp_path / "log").open("w")).close()
    for file in (None, closed):
        monkeypatch.setattr(sys, "stderr", file)
        run(show=True)
        run()
    assert (tmp_path / "log").read_text() == ""


def test_being_told_compiles_nothing(often, caplog, compilations):
    jpfq.quantize(apply, [X], RULE, params=PARAMS, progress=False)
    compilations.clear()
    caplog.set_level(logging.INFO, "jpfq")
    jpfq.quantize(apply, [X], RULE, params=PARAMS)
    assert len(lines(caplog)) > 6
    assert compilations == []


class Recorder(module.Reporter):
    """The layers as they were announced, and how many were done."""

    def __init__(self, steps):
        self.steps, self.errors, self.told = steps, [], []

    def doing(self, what):
        self.told.append(what)

    def done(self, error=None):
        self.errors.append(error)


@pytest.fixture
def recorded(monkeypatch):
    """The recorders of all runs."""
    found = []

    @contextlib.contextmanager
    def recording(steps, show):
        found.append(Recorder(steps()))
        yield found[-1]

    for home in ("jpfq.network.quantize", "jpfq.study.sweep", "jpfq.network.budget"):
        monkeypatch.setattr(sys.modules[home], "progress_of", recording)
    return found


def test_all_layers_that_are_announced_are_done(recorded, tmp_path):
    whole = jpfq.quantize(apply, [X, X[:9]], RULE, params=PARAMS, checkpoint=tmp_path / "run")
    (first,) = recorded
    assert [step.path for step in first.steps] == list(whole.tensors)  # in the order in which they are done
    assert first.errors == [pytest.approx(float(info.relative_error)) for info in whole.info.values()]
    assert {step.name for step in first.steps} == {f"layer {i} of 3" for i in (1, 2, 3)}
    plans = [jpfq.plan(apply, x, RULE, params=PARAMS) for x in (X, X[:9])]
    assert sum(step.work for step in first.steps) == pytest.approx(sum(plan.flops for plan in plans))
    jpfq.quantize(apply, [X, X[:9]], RULE, params=PARAMS, checkpoint=tmp_path / "run")
    again = recorded[-1]
    assert (len(again.steps), len(again.errors), again.told.count("solving")) == (3, 3, 0)
    for step, before in zip(again.steps, first.steps, strict=True):
        assert step.kind is None
        assert 0 < step.work < before.work


def test_fresh_batches_run_through_all_layers_before(recorded):
    jpfq.quantize(apply, [X], RULE, params=PARAMS)
    jpfq.quantize(apply, lambda number: [X], RULE, params=PARAMS)
    whole = [step.work for step in recorded[0].steps]
    fresh = [step.work for step in recorded[1].steps]
    product = 4.0 * 16 * 8 * 8  # in both networks; there are two of a, at stops of their own
    again = [product, 2 * product, 3 * product]  # what is passed once more before the second stop, and so on
    assert [a - b for a, b in zip(fresh, whole, strict=True)] == pytest.approx(again)


@pytest.mark.slow
def test_a_sweep_tells_of_each_program_at_each_layer(recorded):
    rules = lambda bits, finish: zoo.plain(bits=bits, method=jpfq.MSQ(), finish=jpfq.finish.Refit() if finish else None)
    jpfq.sweep(apply, [X], jpfq.Space(rules, bits=[2, 3, 4], finish=[False, True]), params=PARAMS, lanes=2)
    (one,) = recorded
    assert len(one.errors) == len(one.steps) == 4 * 3  # two programs of two chunks each
    assert {step.name for step in one.steps[:4]} == {"layer 1 of 3, 2 of 6 settings", "layer 1 of 3, 1 of 6 settings"}
    assert len({step.kind for step in one.steps}) == 2 * len({step.kind for step in one.steps[::4]})


@pytest.mark.slow
def test_a_budget_tells_of_its_layers(recorded):
    rules = jpfq.budget(apply, [X], 4, params=PARAMS, rule=RULE)
    (one,) = recorded
    assert len(one.errors) == len(one.steps) == len(rules) == 3


@contextlib.contextmanager
def terminal(monkeypatch, kind="xterm"):
    """A terminal of 100 columns as the standard error; a list of what it got."""
    ours, theirs = pytest.importorskip("pty").openpty()
    pytest.importorskip("termios").tcsetwinsize(theirs, (24, 100))
    got: list[bytes] = []

    def collect():
        with contextlib.suppress(OSError):  # which is how a terminal ends
            while chunk := os.read(ours, 65536):
                got.append(chunk)

    reader = threading.Thread(target=collect)
    reader.start()
    with monkeypatch.context() as patch:
        for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "COLUMNS", "LINES", "NO_COLOR"):
            patch.delenv(name, raising=False)
        patch.setenv("TERM", kind)
        with os.fdopen(theirs, "w") as file:
            patch.setattr(sys, "stderr", file)
            yield got
    reader.join()
    os.close(ours)


def test_a_bar_on_a_terminal(capsys, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "jpfq")
    draw = lambda: next(x for x in threading.enumerate() if hasattr(x, "live")).live.refresh()
    with terminal(monkeypatch) as got, progress_of(lambda: STEPS, None) as report:
        report.doing("gathering")
        report.done(0.25)
        report.doing("gathering")
        begin()
        draw()
        end()
        report.doing("solving")
        draw()
        report.done()
        report.done(0.5)
        print("of the model")
    written = b"".join(got).decode()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", written)
    assert re.search(r"layer 2 of 3 \S+ compiling, last error 25.00%, 0:0\d left block_2/up", text)
    assert re.search(r"layer 2 of 3 \S+ solving, last error 25.00%, 0:0\d left block_2/up", text)
    assert max(map(len, re.split(r"[\r\n]+", text))) <= 100
    assert written.rstrip().endswith("\x1b[2K")  # the bar is gone
    assert "\x1b[?25h" in written  # and the cursor is back
    assert lines(caplog) == []
    assert capsys.readouterr().out == "of the model\n"  # which is no terminal


def test_a_terminal_that_cannot_draw_leaves_it_to_the_log(caplog, monkeypatch):
    caplog.set_level(logging.INFO, "jpfq")
    with terminal(monkeypatch, "dumb") as got:
        run()
    assert lines(caplog)[-1].startswith("all layers done")
    assert got == []


def test_colours_that_are_forced_make_no_terminal(monkeypatch, capsys, caplog):
    monkeypatch.setenv("FORCE_COLOR", "1")
    caplog.set_level(logging.INFO, "jpfq")
    run()
    assert lines(caplog)[-1].startswith("all layers done")
    assert capsys.readouterr().err == ""


class ZMQInteractiveShell:
    """Stands for the shell of a notebook."""


@pytest.fixture
def notebook(monkeypatch):
    """The displays of a notebook: each a list of what stood there."""
    displays: list[list] = []

    def display(data, *, raw, display_id):
        assert (raw, display_id) == (True, True)
        place = [data]
        displays.append(place)
        return types.SimpleNamespace(update=lambda data, *, raw: place.append(data))

    fake = types.ModuleType("IPython.display")
    fake.display = display
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", fake)
    monkeypatch.setattr(builtins, "get_ipython", ZMQInteractiveShell, raising=False)
    return displays


def test_one_display_in_jupyter(often, notebook, caplog, capsys):
    caplog.set_level(logging.INFO, "jpfq")
    run([Step("layer 1 of 3", "<lambda>", 1.0, "x"), *STEPS[1:]])
    ((*shown, last),) = notebook
    texts = [data["text/plain"] for data in shown]
    assert texts[0] == "layer 1 of 3, <lambda>: gathering, 0:00 gone"
    assert "layer 2 of 3, block_2/up: compiling, 0:00 gone, about 0:00 left" in texts
    assert '<progress value="0" max="3"></progress> <code>layer 1 of 3, &lt;lambda&gt;: ' in shown[0]["text/html"]
    assert last["text/plain"] == "all layers done, 0:00 gone"
    assert (lines(caplog), capsys.readouterr()) == ([], ("", ""))


def test_short_runs_leave_nothing_in_a_notebook(notebook):
    run()
    assert notebook == []
    run(show=False)
    assert notebook == []


NOTEBOOK = """
import jax, jpfq
from jpfq.calibrate import progress
progress.REDRAW = 0
X, W = (jax.random.normal(jax.random.key(i), (8, 8)) for i in (0, 1))
quantized = jpfq.quantize(lambda p, x: x @ p["w"], [X], jpfq.Rule(".*", bits=4), params={"w": W})
print("after")
"""


@pytest.mark.slow
def test_a_notebook_shows_one_bar():
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(NOTEBOOK)])
    nbclient.NotebookClient(made, timeout=300).execute()
    shown, printed = made.cells[0].outputs
    assert shown.output_type == "display_data"
    assert re.fullmatch(rf"all layers done, {TIMES}", shown.data["text/plain"])
    assert '<progress value="1" max="1">' in shown.data["text/html"]
    assert (printed.name, printed.text) == ("stdout", "after\n")

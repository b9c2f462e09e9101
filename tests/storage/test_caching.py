"""Compiled programs on the disk: where they go, what of JAX's settings stays, and that a later process finds them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import jpfq
from jpfq.storage import caching

ROOT = Path(__file__).parents[2]


@pytest.fixture
def settings(cache_settings, monkeypatch):
    """Reads what JAX is told: the folder, and the seconds from which on it keeps a program."""
    monkeypatch.delenv(caching.LEAST_TIME.upper(), raising=False)
    return lambda: (getattr(jax.config, caching.FOLDER), getattr(jax.config, caching.LEAST_TIME))


def test_a_folder_of_ones_own(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert jpfq.cache_compilations("deep/programs") == str(tmp_path / "deep" / "programs")
    assert settings() == (str(tmp_path / "deep" / "programs"), 0)
    assert list((tmp_path / "deep" / "programs").iterdir()) == []
    if os.name == "posix":
        assert (tmp_path / "deep" / "programs").stat().st_mode & 0o777 == 0o700
    for again in (None, Path("deep/programs"), tmp_path / "deep" / "programs"):
        assert jpfq.cache_compilations(again) == str(tmp_path / "deep" / "programs")


@pytest.mark.parametrize(
    ("system", "variables", "folder"),
    [
        ("linux", {}, "~/.cache"),
        ("linux", {"XDG_CACHE_HOME": "/elsewhere"}, "/elsewhere"),
        ("linux", {"XDG_CACHE_HOME": "not/absolute"}, "~/.cache"),
        ("darwin", {"XDG_CACHE_HOME": "/elsewhere"}, "~/Library/Caches"),
        ("win32", {"LOCALAPPDATA": "/local"}, "/local"),
        ("win32", {}, "~/AppData/Local"),
    ],
)
def test_the_users_folder_for_caches(system, variables, folder, monkeypatch, tmp_path):
    for name in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": str(tmp_path), "USERPROFILE": str(tmp_path)} | variables).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(caching.sys, "platform", system)
    assert caching.user_cache() == Path(folder.replace("~", str(tmp_path)))


def test_what_jax_was_told_stays(settings, tmp_path, monkeypatch):
    theirs = str(tmp_path / "theirs")
    jax.config.update(caching.FOLDER, theirs)
    with pytest.raises(ValueError, match=r"in .*theirs already, .*; got folder='mine'. Leave folder out"):
        jpfq.cache_compilations("mine")
    assert settings() == (theirs, 1)
    assert jpfq.cache_compilations() == theirs
    assert settings() == (theirs, 0)
    assert not (tmp_path / "mine").exists()
    jax.config.update(caching.LEAST_TIME, 3.0)
    jpfq.cache_compilations()
    assert settings() == (theirs, 3)
    jax.config.update(caching.LEAST_TIME, 1.0)
    monkeypatch.setenv(caching.LEAST_TIME.upper(), "1")
    jpfq.cache_compilations()
    assert settings() == (theirs, 1)


def test_a_folder_that_cannot_be_used_is_refused(settings, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file/programs cannot be written: Not a directory"):
        jpfq.cache_compilations(tmp_path / "file" / "programs")
    monkeypatch.setenv("HOME", "")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(caching.os.path, "expanduser", lambda path: path)
    with pytest.raises(ValueError, match="no home folder"):
        jpfq.cache_compilations()
    jax.config.update(caching.SWITCH, False)
    with pytest.raises(ValueError, match="JAX_ENABLE_COMPILATION_CACHE"):
        jpfq.cache_compilations(tmp_path)
    assert settings() == (None, 1)


OWN = """
import json, sys, jax, jpfq

events = []
jax.monitoring.register_event_duration_secs_listener(lambda event, duration, **_: events.append(event))
X, W = (jax.random.normal(jax.random.key(i), (16, 8)) for i in (0, 1))


def trained():
    return lambda params, x: x @ params["w"].T, {"w": W}, [X[:, :8]]


if __name__ == "__main__":
    folder = jpfq.cache_compilations()  # after something was compiled
    model, params, batches = trained()
    events.clear()
    made = jpfq.quantize(model, batches, jpfq.Rule(".*", bits=4), params=params)
    count = lambda end: sum(event.endswith(end) for event in events)
    codes = jax.device_get(made.tensors["w"].codes).tolist()
    print(json.dumps([folder, count("backend_compile_duration"), count("cache_retrieval_time_sec"), codes]))
"""


@pytest.mark.slow
def test_a_later_process_compiles_nothing(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    own = {"HOME": str(tmp_path), "USERPROFILE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    unset = (
        "XDG_CACHE_HOME",
        "LOCALAPPDATA",
        caching.SWITCH.upper(),
        caching.FOLDER.upper(),
        caching.LEAST_TIME.upper(),
    )
    clean = {name: value for name, value in os.environ.items() if name not in unset} | own

    def run(*arguments, **variables):
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env=clean | variables,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout, done.stderr

    found = [json.loads(run("own.py")[0]) for _ in range(2)]
    (folder, compiled, read, codes), (again, compiled_again, read_again, codes_again) = found
    assert (again, compiled_again, codes_again) == (folder, compiled, codes)
    assert read < compiled / 2  # a program may serve twice
    assert read_again == compiled > 10
    assert Path(folder).is_relative_to(tmp_path)
    entry = "import sys; from jpfq.study.cli import main; sys.exit(main())"
    command = ("-c", entry, "quantize", "own:trained", "--method", "MSQ")
    count = lambda folder: len(list(folder.rglob("*-cache"))) if folder.exists() else 0
    before = count(Path(folder))
    run(*command, "--no-cache")
    run("-c", entry, "--no-cache", *command[2:])
    run(*command, **{caching.SWITCH.upper(): "false"})
    run(*command, **{caching.FOLDER.upper(): str(tmp_path / "theirs")})
    assert count(Path(folder)) == before
    assert count(tmp_path / "theirs") > 10
    _, told = run(*command)
    assert count(Path(folder)) > before
    assert "all layers done" in told  # the log, as this is no terminal

"""A checkpoint belongs to one run: what another run, another layer or another hand wrote is never taken for its own."""

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

from jpfq.storage import checkpoint as resume
from tests.storage import racing
from tests.storage.test_checkpoint import opened, put, site


def foreign(tmp_path):
    """Folders of runs that differ in one thing each, of a network whose layers have one shape."""
    for name, (bits, seed) in {"own": (3, 0), "bits": (4, 0), "grid": (2, 0), "data": (3, 1)}.items():
        racing.run(bits, tmp_path / name, seed)
    return tmp_path / "own", [tmp_path / name for name in ("bits", "grid", "data")]


def assert_none_is_accepted(tmp_path, count):
    """Layers swapped within a run, and taken from others, each under its own checksum: a ValueError that names one."""
    own, others = foreign(tmp_path)
    rng = np.random.default_rng(0)
    for number in range(count):
        folder = shutil.copytree(own, tmp_path / f"case{number}")
        a, b = map(int, rng.choice(racing.LAYERS, 2, replace=False))
        if number % 2:
            contents = site(folder, a).read_bytes(), site(folder, b).read_bytes()
            wrong = {put(folder, b, contents[0]).name, put(folder, a, contents[1]).name}
        else:
            other = others[rng.integers(len(others))]
            wrong = {put(folder, a, site(other, a if rng.integers(2) else b).read_bytes()).name}
        with pytest.raises(ValueError, match="is of another run or another layer") as refused:
            racing.run(3, folder)
        assert any(name in str(refused.value) for name in wrong)
        shutil.rmtree(folder)


@pytest.mark.slow
def test_of_400_swapped_and_foreign_layers_none_is_accepted(tmp_path):
    assert_none_is_accepted(tmp_path, 400)


def test_of_runs_that_race_for_a_folder_one_begins(tmp_path, monkeypatch):
    """All of what one run writes at its start, in threads: 40 times, three of different settings."""
    for number in range(40):
        folder, barrier, held = tmp_path / str(number), threading.Barrier(3), {}

        def race(which, folder=folder, barrier=barrier, held=held):
            barrier.wait()
            try:
                held[which] = resume.Checkpoint(folder, {"bits": which}, None)
            except ValueError as error:
                held[which] = str(error)

        threads = [threading.Thread(target=race, args=(which,)) for which in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (winner,) = (which for which, found in held.items() if isinstance(found, resume.Checkpoint))
        assert json.loads((folder / "run.json").read_text())["bits"] == winner
        assert [path.name for path in folder.iterdir()] == ["run.json"]
        assert all("another process is at the run" in x for which, x in held.items() if which != winner)
        held[winner].close()


@pytest.mark.slow
def test_of_400_races_of_two_processes_none_is_won_by_both(tmp_path):
    bits = (3, 4)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exact = [racing.checksum(racing.run(b)) for b in bits]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = lambda b: [sys.executable, "-m", "tests.storage.racing", str(b)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment}
    rng, won, ways = np.random.default_rng(0), [0, 0], set()
    with contextlib.ExitStack() as stack:
        runners = [stack.enter_context(subprocess.Popen(command(b), **pipes)) for b in bits]

        def both(lines, pauses=(0.0, 0.0)):
            for runner, line, pause in zip(runners, lines, pauses, strict=True):
                threading.Event().wait(pause)
                print(line, file=runner.stdin, flush=True)
            return [json.loads(runner.stdout.readline()) for runner in runners]

        assert both(["", ""]) == [{"codes": x} for x in exact]  # all is compiled
        for number in range(400):
            folder = tmp_path / str(number)
            answers = both([folder, folder], (0.0, float(rng.choice([0, rng.uniform(0, 0.03)]))))
            accepted = [i for i, answer in enumerate(answers) if "codes" in answer]
            assert len(accepted) == 1
            (i,) = accepted
            won[i] += 1
            assert answers[i]["codes"] == exact[i]
            told = re.search("another process is at the run|a run of something else", answers[1 - i]["refused"])
            assert told
            ways.add(told[0])
            manifest = json.loads((folder / "run.json").read_text())
            run_ = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
            sites = [opened(file)[0] for file in folder.glob("site-*")]
            assert [noted["run"] for noted in sites] == [run_] * racing.LAYERS
            shutil.rmtree(folder)
        for runner in runners:
            runner.stdin.close()
    assert min(won) > 0

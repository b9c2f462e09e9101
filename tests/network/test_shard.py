"""A model on a mesh, and on two hosts: the codes of one device, shardings as given. The programs are in many.py."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]


def run(*commands):
    """What each of some commands of many.py prints, all at once."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    start = [sys.executable, "-m", "tests.network.many"]
    started = [
        subprocess.Popen(
            [*start, *command], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for command in commands
    ]
    try:
        printed = [process.communicate(timeout=1200) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, errors) in zip(started, printed, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in printed]


def on_two_hosts(*cases):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return run(*(("host", ",".join(cases), str(rank), port) for rank in range(2)))


def assert_as_one(found, one):
    """Codes are those of one device, figures too, and every parameter lies as it did."""
    assert found["codes"] == one["codes"]
    np.testing.assert_allclose(list(found["error"].values()), list(one["error"].values()), rtol=1e-9)
    np.testing.assert_allclose(found["bias"], one["bias"], rtol=1e-9)
    assert abs(found["output"] - one["output"]) < 1e-9
    assert all(found["kept"].values())
    assert len(found["kept"]) == 5


@pytest.mark.slow
def test_eight_devices_quantize_a_model_as_one_does():
    (found,) = run(("eight", "few"))
    assert set(found["one"]["codes"]) == {"a", "b", "d", "e"}
    for mesh in ("auto", "explicit"):
        assert_as_one(found[mesh], found["one"])
    assert "mesh with Explicit axes" in found["refused"]
    assert "AxisType.Auto" in found["refused"]


@pytest.mark.slow
def test_eight_devices_under_a_mesh_set_with_a_gram_that_is_split_and_resumed():
    (found,) = run(("eight", "all"))
    for mesh in ("set_mesh", "split", "kept", "resumed"):
        assert_as_one(found[mesh], found["one"])
    assert found["resumed"] == found["kept"]
    assert max(found["usable"]) < 1e-9
    assert len(found["usable"]) == 6


@pytest.mark.slow
def test_the_settings_of_a_sweep_on_an_axis_of_the_mesh():
    (found,) = run(("sweep",))
    one = found["one"]
    assert one["codes"][1] != one["codes"][2]
    for name in ("settings", "settings and batches", "neurons and batches"):
        assert found[name]["codes"] == one["codes"], name
        np.testing.assert_allclose(found[name]["loss"], one["loss"], rtol=1e-9)
    assert found["settings"]["places"] == one["places"]
    assert not any("lanes" in place for place in found["settings and batches"]["places"])
    assert "lies on another mesh than the settings" in found["another mesh"]
    assert "the axis of the settings" in found["the same axis"]


@pytest.mark.slow
def test_hosts_find_what_they_were_given_differently():
    for host in on_two_hosts():
        for name, part in {
            "rules": "rules",
            "number": "number, shapes or types of batches",
            "values": "values of batches",
            "parameters": "values of parameters",
        }.items():
            assert f"Hosts [1] differ from host 0 in: {part}" in host[name]
        assert "checkpoint keeps what one process computes" in host["checkpoint"]


@pytest.mark.slow
def test_two_hosts_quantize_as_one():
    cases = ["plain", "recommended", "offload", "block"]
    (alone,) = run(("alone", ",".join(cases)))
    for host in on_two_hosts(*cases):
        for case in cases:
            assert_as_one(host[case], alone[case])

"""`quantize(checkpoint=..)`: stopped anywhere, a run goes on and ends as it would have; nothing else goes on with it."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jpfq
from jpfq.network import fingerprint, resume
from jpfq.network import walk as walk_module
from jpfq.network.record import DTYPES
from tests.network import long_run, zoo

SITES = 5


def network(params, x):
    y = jax.nn.relu(x @ params["a"]) @ params["b"] + params["bias"]
    return jax.nn.relu(jax.nn.relu(y @ params["c"]) @ params["d"]) @ params["e"]


def doubled(params, x):
    return 2 * network(params, x)


def given(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"a": (8, 12), "b": (12, 8), "bias": (8,), "c": (8, 8), "d": (8, 8), "e": (8, 4)}
    params = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    return params, [jnp.asarray(rng.standard_normal((32, 8)), jnp.float32) for _ in range(2)]


RULES = [  # everything that a site can leave behind: inputs of several grids, zero points, a bias, sums, a rotation
    zoo.plain("a", bits=3, rounding=jpfq.Stochastic()),
    zoo.plain("b", bits=3, correct_bias=True),
    zoo.plain("c", grid=jpfq.Asymmetric(4), scale=jpfq.MinMSE(per=jpfq.PerGroup(4)), activation_bits=6),
    zoo.plain("d", bits=4, activation_bits=8, accumulator=jpfq.Accumulator(14, tile=4)),
    zoo.plain(
        "e", grid=jpfq.Ternary(), rotation=jpfq.Hadamard(), activations=jpfq.Activations(jpfq.Integer(8), per="row")
    ),
]
PARAMS, BATCHES = given()


def run(folder=None, **changed):
    settings = {"rules": RULES, "key": jax.random.key(1), "params": PARAMS, "progress": False} | changed
    model, batches, rules = (
        settings.pop(k, v) for k, v in (("model", network), ("batches", BATCHES), ("rules", RULES))
    )
    return jpfq.quantize(model, batches, rules, checkpoint=folder, **settings)


@pytest.fixture(scope="module")
def expected():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return run()


def assert_same(made, expected):
    """All that was found, to the bit."""
    facts = lambda q: (q.params, q.tensors, q.info, q.inputs, q.output_error)
    a, b = (jax.tree.flatten(facts(q)) for q in (made, expected))
    assert jax.tree.map(np.shape, a[0]) == jax.tree.map(np.shape, b[0])
    for x, y in zip(a[0], b[0], strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))
    assert (made.biases, made.skipped) == (expected.biases, expected.skipped)
    assert made.summary().split("Peak")[0] == expected.summary().split("Peak")[0]


def stopped_after(count, how, monkeypatch, folder, **changed):
    """A run that `how` befalls once so many sites are kept."""
    write = resume.Kept.write

    def counted(self, *site):
        write(self, *site)
        if len(self.sites) == count:
            how()

    with monkeypatch.context() as patched:
        patched.setattr(resume.Kept, "write", counted)
        return run(folder, **changed)


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("count", range(1, SITES + 1))
def test_a_run_goes_on_and_solves_only_what_is_missing(count, expected, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        stopped_after(count, interrupt, monkeypatch, tmp_path / "run")
    (tmp_path / "run" / "jpfq-half.tmp").write_bytes(b"of a killed process")
    solved, solve = [], walk_module._solved
    monkeypatch.setattr(walk_module, "_solved", lambda *args: solved.append(1) or solve(*args))
    assert_same(run(tmp_path / "run"), expected)
    assert len(solved) == SITES - count
    assert len(list((tmp_path / "run").iterdir())) == SITES + 1


def test_weights_are_kept_where_codes_do_not_give_them_to_the_bit(expected, tmp_path):
    assert_same(run(tmp_path / "run"), expected)
    found = {}
    for file in (tmp_path / "run").glob("site-*"):
        with resume.safetensors.safe_open(file, framework="np") as opened:
            found[file.name[:9]] = set(opened.keys())
    kept = [
        ("q" in found[f"site-{i:04}"], "error" in found[f"site-{i:04}"], "reach" in found[f"site-{i:04}"])
        for i in range(5)
    ]
    assert kept[4][0]  # rotated back
    assert [k[1] for k in kept] == [False, True, False, False, False]
    assert [k[2] for k in kept] == [False, False, False, True, False]
    assert not any(k[0] for k in kept[:4])


def test_sigterm_lets_the_layer_at_work_end(expected, tmp_path, monkeypatch, caplog):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        stopped_after(2, lambda: os.kill(os.getpid(), signal.SIGTERM), monkeypatch, tmp_path / "run")
    assert stopped.value.code == 143
    assert "2 layers are kept" in caplog.text
    assert signal.getsignal(signal.SIGTERM) is before
    assert_same(run(tmp_path / "run"), expected)


def test_fresh_batches_are_asked_for_what_is_missing_only(tmp_path, monkeypatch):
    asked = []

    def fresh(number):
        asked.append(number)
        return given(number + 5)[1]

    exact = run(batches=fresh)
    assert asked == [0, 1, 2, 3, 4]
    with pytest.raises(KeyboardInterrupt):
        stopped_after(3, interrupt, monkeypatch, tmp_path / "run", batches=fresh)
    asked.clear()
    assert_same(run(tmp_path / "run", batches=fresh), exact)
    assert asked == [0, 3, 4]


def test_fresh_batches_that_are_read_again_must_be_the_same(tmp_path, monkeypatch):
    folder, solve = tmp_path / "run", walk_module._solved

    def fresh(number, other=()):
        return given(number + 5 + 100 * (number in other))[1]

    def killed(*args):
        if args[1] == 2:  # when the batches for the third stop are read
            raise KeyboardInterrupt
        return solve(*args)

    with monkeypatch.context() as patched:
        patched.setattr(walk_module, "_solved", killed)
        with pytest.raises(KeyboardInterrupt):
            run(folder, batches=fresh)
    with pytest.raises(ValueError, match="the batches for stop 2 are not those that the run in"):
        run(folder, batches=lambda number: fresh(number, other=(2, 3)))
    with pytest.raises(ValueError, match=r"calibration data: array 0, array 1\."):
        run(folder, batches=lambda number: fresh(number, other=(0,)))
    with pytest.raises(ValueError, match=r"fresh batches \(True, now False\)"):
        run(folder, batches=fresh(0))
    done = run(folder, batches=fresh)
    with pytest.raises(ValueError, match="the batches for stop 4"):
        run(folder, batches=lambda number: fresh(number, other=(4,)))
    assert_same(run(folder, batches=lambda number: fresh(number, other=(1, 2, 3))), done)  # which are not read again
    (folder / "data-0004.json").write_text("{")
    with pytest.raises(ValueError, match=r"data-0004\.json is damaged"):
        run(folder, batches=fresh)


def test_curvature_is_measured_for_what_is_missing_only(tmp_path, monkeypatch):
    """Of sites that are measured together for all of them, so that it is the same to the bit."""
    coupled = lambda path, samples: zoo.plain(path, bits=3, coupling=jpfq.Coupling(block=4, samples=samples))
    rules = [coupled("a", 1), coupled("c", 2), coupled("d", 2), jpfq.Rule(".*", skip=True)]
    measured = []

    def curvatures(program, leaves, batches, weights, sites, *rest):
        measured.append([site.path for site in sites.values()])
        return {i: jnp.eye(site.layout.dims[2])[None] + 0.1 * (i + 1) for i, site in sites.items()}

    monkeypatch.setattr(importlib.import_module("jpfq.network.quantize"), "curvatures", curvatures)
    exact = run(rules=rules, key=None)
    with pytest.raises(KeyboardInterrupt):
        stopped_after(2, interrupt, monkeypatch, tmp_path / "run", rules=rules, key=None)
    for _ in range(2):
        assert_same(run(tmp_path / "run", rules=rules, key=None), exact)
    assert measured == [["a", "c", "d"], ["a", "c", "d"], ["c", "d"]]  # "a" and "c" are known, then all


CHANGES = {
    "parameters: d$": {"params": PARAMS | {"d": PARAMS["d"].at[0, 0].add(1e-6)}},
    r"parameters: e$": {"params": PARAMS | {"e": jnp.ones((8, 5))}},
    "calibration data: array 1": {"batches": [BATCHES[0], BATCHES[1].at[3, 3].set(0)]},
    r"rules: bits of rule 1 \(3, now 2\)$": {
        "rules": [RULES[0], zoo.plain("b", bits=2, correct_bias=True), *RULES[2:]]
    },
    "key": {"key": jax.random.key(2)},
    r"reference \(float, now block\)": {"reference": "block"},
    "the model as a program": {"model": doubled},
}


def test_checksums_tell_values_of_every_type_apart():
    one, other = np.random.default_rng(0).integers(0, 2, (2, 40))
    flipped = np.concatenate([1 - one[:1], one[1:]])
    for dtype in DTYPES.values():
        if jax.dtypes.canonicalize_dtype(dtype) == dtype:
            sums = [fingerprint.checksum(jnp.asarray(x, dtype)) for x in (one, other, flipped, one[::-1])]
            assert len(set(sums)) == 4, dtype
            assert fingerprint.checksum(jnp.asarray(one, dtype)) == sums[0]
    z = jnp.asarray([1 + 2j, 3], jnp.complex64)
    assert fingerprint.checksum(z) != fingerprint.checksum(z.conj())


def test_nothing_else_goes_on_with_a_run(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        stopped_after(1, interrupt, monkeypatch, folder)
    before = {file: file.read_bytes() for file in folder.iterdir()}
    for what, changed in CHANGES.items():
        with pytest.raises(ValueError, match="holds a run of something else, by ") as refused:
            run(folder, **changed)
        named = re.search(r"something else, by (.*)\. Call quantize", str(refused.value))
        assert named
        assert re.search(what, named[1]), (what, named[1])
    monkeypatch.setattr(fingerprint, "_version", lambda name: "0.0")
    with pytest.raises(ValueError, match=r"versions: .*jax \([\d.]+, now 0\.0\)"):
        run(folder)
    assert before == {file: file.read_bytes() for file in folder.iterdir()}


def test_what_is_no_run_or_damaged_is_refused(expected, tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("notes.txt", "notes.tmp"):
        (tmp_path / "mine" / name).write_text("mine")
    for folder, message in (
        (tmp_path / "mine", "holds something else than a run"),
        (tmp_path / "mine" / "notes.txt", "is a folder, new or of a run"),
        (tmp_path / "none" / "run", "is a folder, new or of a run"),
    ):
        with pytest.raises(ValueError, match=message):
            run(folder)
    assert {file.name: file.read_text() for file in (tmp_path / "mine").iterdir()} == {
        "notes.txt": "mine",
        "notes.tmp": "mine",
    }
    folder = tmp_path / "run"
    run(folder)
    file = next(folder.glob("site-0002-000-*"))
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"site-0002-000-\w+\.safetensors is damaged.*Delete it"):
        run(folder)
    file.unlink()
    assert_same(run(folder), expected)
    for text in ("{", json.dumps([1]), json.dumps({"format": 0})):
        (folder / resume.MANIFEST).write_text(text)
        with pytest.raises(ValueError, match=r"is damaged|does not read"):
            run(folder)


@pytest.mark.slow
def test_killed_at_ten_random_moments(tmp_path):
    """By SIGKILL, in processes of their own: before the first layer, between layers, while one is written."""
    folder, rng = tmp_path / "run", np.random.default_rng(0)
    command = [sys.executable, "-m", "tests.network.long_run", str(folder)]
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    sites = lambda: {file.name for file in folder.glob("site-*.safetensors")} if folder.is_dir() else set()
    reached = []
    for moment in range(10):
        target = min(len(sites()) + (moment > 0), long_run.LAYERS - 1)
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as process:
            while process.poll() is None and len(sites()) < target:
                time.sleep(0.002)
            time.sleep(float(rng.uniform(0, 1.5 * long_run.PAUSE)))
            process.send_signal(signal.SIGKILL)
        reached.append(len(sites()))
        for name in sites():  # whatever is there is whole
            match = resume.SITE.fullmatch(name)
            assert match
            assert match[3] == resume.digest(folder / name)[:16]
    assert reached == sorted(reached)
    assert 0 < reached[-1] < long_run.LAYERS
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        made = long_run.run(None)
    codes = b"".join(np.asarray(tensor.codes).tobytes() for tensor in made.tensors.values())
    assert int(ended.stdout) == long_run.zlib.crc32(codes)

"""`quantize(checkpoint=..)`: stopped anywhere, a run goes on and ends as it would have; nothing else goes on with it."""

import contextlib
import errno
import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jpfq
from jpfq.calibrate import fingerprint
from jpfq.calibrate import loop as walk_module
from jpfq.calibrate.batches import read_batches
from jpfq.storage import checkpoint as resume
from jpfq.storage import files as disk
from jpfq.storage.codec import DTYPES
from tests.network import zoo
from tests.storage import long_run

SITES = 5
NASTY = [None, True, -1, 10**18, 1e300, "x", "nan", [], {}, [[]], [None, "x"], {"": "Integer"}, {"": "array"}]


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
    zoo.plain("a", bits=3, rounding=jpfq.rounding.Stochastic()),
    zoo.plain("b", bits=3, correct_bias=True),
    zoo.plain("c", grid=jpfq.Asymmetric(4), scale=jpfq.scale.MinMSE(per=jpfq.scale.PerGroup(4)), activation_bits=6),
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


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A whole run in a folder, its result, and how it asks for each of its sites."""
    folder, read, asks = tmp_path_factory.mktemp("done") / "run", resume.Checkpoint.read, {}

    def noted(kept, stop, position, asked):
        asks[stop, position] = asked
        asks["kept"] = kept
        return read(kept, stop, position, asked)

    standard = jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow")
    with pytest.MonkeyPatch.context() as patched, standard[0], standard[1]:
        patched.setattr(resume.Checkpoint, "read", noted)
        result = run(folder)
    return folder, result, asks.pop("kept"), asks


@pytest.fixture
def copied(done, tmp_path):
    return shutil.copytree(done[0], tmp_path / "run")


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
    write = resume.Checkpoint.write

    def counted(self, *site):
        write(self, *site)
        if len(self.sites) == count:
            how()

    with monkeypatch.context() as patched:
        patched.setattr(resume.Checkpoint, "write", counted)
        return run(folder, **changed)


def interrupt():
    raise KeyboardInterrupt


@pytest.mark.parametrize("count", range(1, SITES + 1))
def test_a_run_goes_on_and_solves_only_what_is_missing(count, expected, tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        stopped_after(count, interrupt, monkeypatch, tmp_path / "run")
    (tmp_path / "run" / "jpfq-half.tmp").write_bytes(b"of a killed process")
    solved, solve = [], walk_module._solve_site
    monkeypatch.setattr(walk_module, "_solve_site", lambda *args: solved.append(1) or solve(*args))
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
    folder, solve = tmp_path / "run", walk_module._solve_site

    def fresh(number, other=()):
        return given(number + 5 + 100 * (number in other))[1]

    def killed(*args):
        if args[0].index == 2:  # when the batches for the third stop are read
            raise KeyboardInterrupt
        return solve(*args)

    with monkeypatch.context() as patched:
        patched.setattr(walk_module, "_solve_site", killed)
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


def test_fresh_batches_of_another_stop_or_run_are_refused(tmp_path):
    (shaped,) = read_batches(BATCHES)
    with contextlib.closing(resume.Checkpoint(tmp_path / "run", {"of": "this"}, None)) as kept:
        kept.check_batches(4, shaped)
        record = tmp_path / "run" / "data-0004.json"
        known = json.loads(record.read_text())
        wrong = [known | {"stop": 3}, known | {"run": "0" * 64}, [], {}, {"arrays": known["arrays"]}, known | {"x": 1}]
        for text in ("{", "[" * 100_000, *map(json.dumps, wrong)):
            record.write_text(text)
            with pytest.raises(ValueError, match=r"data-0004\.json is damaged"):
                kept.check_batches(4, shaped)
        record.write_text(json.dumps(known | {"arrays": {}}))
        with pytest.raises(ValueError, match="the batches for stop 4 are not those"):
            kept.check_batches(4, shaped)
        record.write_text(json.dumps(known))
        kept.check_batches(4, shaped)


@pytest.mark.slow
def test_curvature_is_measured_for_what_is_missing_only(tmp_path, monkeypatch):
    """Of sites that are measured together for all of them, so that it is the same to the bit."""
    coupled = lambda path, samples: zoo.plain(path, bits=3, coupling=jpfq.Coupling(block=4, samples=samples))
    rules = [coupled("a", 1), coupled("c", 2), coupled("d", 2), jpfq.Rule(".*", skip=True)]
    measured = []

    def curvatures(program, leaves, batches, weights, sites, *rest):
        measured.append([site.path for site in sites.values()])
        return {i: jnp.eye(site.layout.dims[2])[None] + 0.1 * (i + 1) for i, site in sites.items()}

    monkeypatch.setattr(importlib.import_module("jpfq.network.analysis"), "curvatures", curvatures)
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


def site(folder, stop):
    (file,) = folder.glob(f"site-{stop:04}-000-*")
    return file


def put(folder, stop, content):
    """A site's file, of right checksum whatever is in it."""
    with contextlib.suppress(ValueError):
        site(folder, stop).unlink()
    file = folder / f"site-{stop:04}-000-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
    file.write_bytes(content)
    return file


def opened(file):
    """(metadata, arrays) of a file."""
    with safetensors.safe_open(file, framework="np") as held:
        return held.metadata(), {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118


def test_a_second_process_is_told_and_touches_nothing(done, tmp_path, monkeypatch):
    folder = tmp_path / "run"

    def meanwhile():
        (folder / "jpfq-live.tmp").write_bytes(b"half of a layer")
        before = {file.name: file.read_bytes() for file in folder.iterdir()}
        for rules in (RULES, [zoo.plain(bits=2)]):
            with pytest.raises(ValueError, match=r"another process is at the run in .* Wait until it ends"):
                run(folder, rules=rules)
        assert {file.name: file.read_bytes() for file in folder.iterdir()} == before

    assert_same(stopped_after(2, meanwhile, monkeypatch, folder), done[1])
    assert_same(run(folder), done[1])  # the lock is let go
    assert not (folder / "jpfq-live.tmp").exists()


def test_the_lock_dies_with_its_process(done, copied):
    text = f"import runpy, time; lock = runpy.run_path({disk.__file__!r})['Lock'].of({str(copied / 'run.json')!r})\n"
    command = [sys.executable, "-c", text + "print(lock.sure, flush=True); time.sleep(60)"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "True\n"
        with pytest.raises(ValueError, match="another process is at the run"):
            run(copied)
        other.kill()
    assert_same(run(copied), done[1])


def test_processes_of_one_distributed_run_share_a_folder(done, copied, monkeypatch):
    fingerprint = json.loads((copied / "run.json").read_text())
    del fingerprint["format"]
    begin = lambda: contextlib.closing(resume.Checkpoint(copied, fingerprint, None))
    (copied / "jpfq-live.tmp").write_bytes(b"of another host")
    with monkeypatch.context() as patched:
        patched.setattr(jax, "process_count", lambda: 2)
        with begin() as one, begin() as other:
            assert one.run == other.run
            assert len(one.sites) == len(other.sites) == SITES
            patched.setattr(jax, "process_count", lambda: 1)
            with pytest.raises(ValueError, match="another process"):
                begin()
            assert (copied / "jpfq-live.tmp").exists()
    with begin(), pytest.raises(ValueError, match="another process"):
        begin()


def test_without_locks_a_run_goes_on_and_says_so(done, tmp_path, monkeypatch, caplog):
    def none(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    if sys.platform != "win32":
        monkeypatch.setattr(disk.fcntl, "flock", none)
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "jpfq-other.tmp").write_bytes(b"perhaps of a live run")
        assert_same(run(tmp_path / "run"), done[1])
        assert "without locks" in caplog.text
        assert (tmp_path / "run" / "jpfq-other.tmp").exists()


def test_without_links_a_run_begins_all_the_same(done, tmp_path, monkeypatch):
    def none(*_):
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", none)
    assert_same(run(tmp_path / "run"), done[1])
    assert len(list((tmp_path / "run").iterdir())) == SITES + 1


@pytest.mark.parametrize("kind", ["here", "link", "dangling", "long", "lost+found"])
def test_a_run_is_kept_wherever_a_folder_can_be(kind, done, tmp_path, monkeypatch):
    folder = tmp_path / ("r" * 250 if kind == "long" else "run")
    home = tmp_path / "there" if kind in ("link", "dangling") else folder
    if kind in ("here", "link", "lost+found"):
        home.mkdir()
    if kind == "lost+found":  # as of a file system that is mounted there
        (folder / "lost+found").mkdir()
    if home != folder:
        folder.symlink_to(home)
    if kind == "here":
        monkeypatch.chdir(folder)
    with pytest.raises(KeyboardInterrupt):
        stopped_after(1, interrupt, monkeypatch, "." if kind == "here" else folder)
    assert site(home, 0).is_file()


def test_a_full_disk_is_said_plainly_and_the_run_goes_on_later(done, tmp_path, monkeypatch):
    folder, write = tmp_path / "run", resume.to_disk

    def full(path):
        if len(list(folder.glob("site-*"))) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path)

    with monkeypatch.context() as patched:
        patched.setattr(resume, "to_disk", full)
        with pytest.raises(OSError, match=r"site-0001.* cannot be written: No space left on device") as raised:
            run(folder)
    assert raised.value.errno == errno.ENOSPC
    assert not list(folder.glob("*.tmp"))
    assert_same(run(folder), done[1])


def test_a_run_of_an_earlier_format_is_refused_by_name(copied):
    manifest = copied / "run.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 1}))
    with pytest.raises(
        ValueError, match=r"of another format, that this jpfq does not read\. End it with the jpfq that"
    ):
        run(copied)
    for content in (b"[" * 100_000, b"\xff", b"9" * 5000):
        manifest.write_bytes(content)
        with pytest.raises(ValueError, match=r"run\.json is damaged"):
            run(copied)
    with open(manifest, "r+b") as file:
        file.truncate(2**33)
    with pytest.raises(ValueError, match=r"run\.json is damaged: .* 8,589,934,592 bytes"):
        run(copied)


def test_swapped_and_foreign_layers_are_refused(done, tmp_path):
    """Layers swapped within a run, and taken from runs that differ in one thing, each under its own checksum."""
    others = {
        "bits": {"rules": [zoo.plain("a", bits=4, rounding=jpfq.rounding.Stochastic()), *RULES[1:]]},
        "key": {"key": jax.random.key(2)},
        "data": {"batches": [BATCHES[1], BATCHES[0]]},
    }
    for name, changed_ in others.items():
        run(tmp_path / name, **changed_)
    contents = {stop: site(done[0], stop).read_bytes() for stop in range(SITES)}
    cases = [({0: 2, 2: 0}, None), ({3: 4}, None), *(({stop: stop}, name) for stop, name in enumerate(others))]
    for number, (moved, name) in enumerate(cases):
        folder = shutil.copytree(done[0], tmp_path / f"case{number}")
        for at, source in moved.items():
            wrong = put(folder, at, contents[source] if name is None else site(tmp_path / name, source).read_bytes())
        with pytest.raises(ValueError, match="is of another run or another layer") as refused:
            run(folder)
        assert any(site(folder, at).name in str(refused.value) for at in moved)
        wrong.unlink()


def places(tree, at=()):
    """Where every value of a record is."""
    yield at
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in children:
        yield from places(value, (*at, key))


def changed(tree, at, value):
    """A copy with another value at a place."""
    tree = json.loads(json.dumps(tree))
    inner = tree
    for key in at[:-1]:
        inner = inner[key]
    inner[at[-1]] = value
    return tree


def shapes(solved):
    return jax.tree.map(lambda x: (np.shape(x), getattr(x, "dtype", x)), solved)


def read_put(kept, folder, stop, asked, noted, arrays):
    """What is read of such a file."""
    kept.sites[stop, 0] = put(folder, stop, safetensors.numpy.save(arrays, metadata=noted))
    return kept.read(stop, 0, asked)


def damaged(x):
    """Arrays that are not this one: of another shape, type, or with values that cannot be."""
    yield "flat", x.reshape(-1) if x.ndim > 1 else x[None, None]
    yield "longer", np.concatenate([x.reshape(1, -1)] * 2, 1)
    yield "empty", np.zeros((0, *x.shape[1:]), x.dtype)
    for dtype in (np.float16, np.float64, np.int64, np.int16, np.bool_, np.complex64):
        with np.errstate(over="ignore"):
            yield dtype.__name__, x.astype(dtype)
    if x.dtype.kind == "f":
        yield "nan", np.full_like(x, np.nan)
    elif x.dtype.kind == "i":
        yield "off", np.full_like(x, np.iinfo(x.dtype).max)
        yield "below", np.full_like(x, np.iinfo(x.dtype).min)


@pytest.mark.parametrize("stop", range(SITES))
def test_a_layer_of_right_checksum_and_wrong_content_is_refused(done, copied, stop):
    """Every array in another shape or type, missing, or too many; nothing but ValueError, and it names the file."""
    _, _, kept, asks = done
    asked, (noted, arrays) = asks[stop, 0], opened(site(copied, stop))
    exact = shapes(read_put(kept, copied, stop, asked, noted, arrays))
    for name, x in arrays.items():
        others = dict(damaged(x)) | {"missing": None}
        if name.startswith("info."):
            others = {
                kind: y for kind, y in others.items() if kind not in ("off", "below") and not (kind == "nan" and name)
            }
        for kind, y in others.items():
            wrong = {k: v for k, v in arrays.items() if k != name} | ({} if y is None else {name: y})
            if name == "q" and kind == "missing":
                continue
            with pytest.raises(ValueError, match=rf"site-000{stop}-000-\w+\.safetensors is damaged: "):
                read_put(kept, copied, stop, asked, noted, wrong)
    for name in ("q", "error", "reach", "other", "info.other"):
        if name not in arrays and name != "q":
            with pytest.raises(ValueError, match="is damaged"):
                read_put(kept, copied, stop, asked, noted, arrays | {name: np.zeros((1, 8), np.float32)})
    assert shapes(read_put(kept, copied, stop, asked, noted, arrays)) == exact


@pytest.mark.parametrize("stop", range(SITES))
def test_a_layer_whose_record_lies_is_refused_or_is_one_of_its_kind(done, copied, stop):
    """Any value of its JSON replaced by another."""
    _, _, kept, asks = done
    asked, (noted, arrays) = asks[stop, 0], opened(site(copied, stop))
    record, refused, as_before, count = json.loads(noted["record"]), 0, 0, 0
    exact = shapes(read_put(kept, copied, stop, asked, noted, arrays))
    for at in [at for at in places(record) if at]:
        for value in NASTY:
            count += 1
            text = json.dumps(changed(record, at, value))
            try:
                found = read_put(kept, copied, stop, asked, noted | {"record": text}, dict(arrays))
            except ValueError as error:
                refused += f"site-{stop:04}-000-" in str(error)
            else:
                as_before += shapes(found.solution) == exact.solution
    assert refused + as_before == count
    assert refused > 0.8 * count
    for text in ("", "null", "[]", "[" * 100_000, "{", "\ud7ff", "9" * 5000, "NaN"):
        with pytest.raises(ValueError, match="is damaged"):
            read_put(kept, copied, stop, asked, noted | {"record": text}, arrays)
    for wrong in ({}, {"record": noted["record"]}, noted | {"run": "x"}, noted | {"site": "9 0"}, noted | {"site": ""}):
        with pytest.raises(ValueError, match="another run or another layer"):
            read_put(kept, copied, stop, asked, wrong, arrays)


@pytest.mark.slow
def test_killed_at_ten_random_moments(tmp_path):
    """By SIGKILL, in processes of their own: before the first layer, between layers, while one is written."""
    folder, rng = tmp_path / "run", np.random.default_rng(0)
    command = [sys.executable, "-m", "tests.storage.long_run", str(folder)]
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

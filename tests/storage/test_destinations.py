"""Where results go: what cannot be written is known before the work, and nothing is half-written, lost, or another's."""

import contextlib
import errno
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors

import jpfq
from jpfq.storage import files as disk
from jpfq.storage import store
from jpfq.study import compare
from jpfq.study.cli import main
from tests.network.saved import assert_same, result, tensor

DATA = pathlib.Path(__file__).parent / "data"
TMPFS = shutil.which("mount") is not None and hasattr(os, "geteuid") and os.geteuid() == 0


def linear(params, x):
    return x @ params["w"]


def small(seed=0):
    """A result of one kernel; seeds tell results apart."""
    return result(linear, {"w": tensor((12, 4), (1, 4), jpfq.Integer(4), seed=seed)}, params={"w": jnp.ones((12, 4))})


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@contextlib.contextmanager
def tmpfs(folder, size):
    """A small file system of its own."""
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if made.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("kind", ["new", "empty", "long", "here", "link", "dangling", "left"])
def test_a_result_goes_wherever_a_folder_can_be(kind, tmp_path, monkeypatch):
    folder = tmp_path / ("r" * 250 if kind == "long" else "r")
    home = tmp_path / "there" if kind in ("link", "dangling") else folder
    if kind in ("empty", "here", "link", "left"):
        home.mkdir(mode=0o750)
    if home != folder:
        folder.symlink_to(home)
    if kind == "here":
        monkeypatch.chdir(folder)
        folder = pathlib.Path(".")
    if kind == "left":  # by a save that was killed between its two files
        small().save(home)
        (home / store.MANIFEST).unlink()
        (home / "lost+found").mkdir()  # of a file system
    inode = home.stat().st_ino if home.exists() else None
    size = small(1).save(folder)
    assert_same(jpfq.load(folder).params, small(1).params)
    found = [name for name in names(home) if name != "lost+found"]
    assert len(found) == 2
    assert size == sum((home / name).stat().st_size for name in found)
    assert inode in (None, home.stat().st_ino)  # what was there stays, with its permissions
    with pytest.raises(ValueError, match="already holds a saved result"):
        small(2).save(folder)
    small(2).save(folder, overwrite=True)
    assert_same(jpfq.load(folder).params, small(2).params)
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_a_folder_that_cannot_be_replaced_is_written_into(tmp_path, monkeypatch):
    """As a mount point is: not to be renamed, and on a file system of its own."""
    folder, replace = tmp_path / "r", os.replace
    folder.mkdir()

    def mounted(source, target, **kwargs):
        if os.fspath(target) == str(folder):
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        if not os.fspath(source).startswith(f"{folder}{os.sep}"):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return replace(source, target, **kwargs)

    for name in ("replace", "rename"):
        monkeypatch.setattr(os, name, mounted)
    for seed in (0, 1):
        small(seed).save(folder, overwrite=bool(seed))
        assert_same(jpfq.load(folder).params, small(seed).params)
        assert len(names(folder)) == 2


@pytest.mark.slow
@pytest.mark.skipif(not TMPFS, reason="only root mounts")
def test_a_mount_point_and_a_full_disk(tmp_path):
    with tmpfs(tmp_path / "disk", "256k") as folder:
        small().save(folder)
        assert_same(jpfq.load(folder).params, small().params)
        large = result(linear, {}, params={"w": jnp.ones((300, 300))})
        for target in (folder, folder / "new"):
            with pytest.raises(OSError, match="cannot be written: No space left on device") as raised:
                large.save(target, overwrite=True)
            assert raised.value.errno == errno.ENOSPC
            assert len(names(folder)) == 2
        assert_same(jpfq.load(folder).params, small().params)
        params, batches = {"w": jnp.ones((12, 400)), "v": jnp.ones((400, 800))}, [jnp.eye(12)]
        fn = lambda params, x: (x @ params["w"]) @ params["v"]
        with pytest.raises(OSError, match=r"site-.* cannot be written: No space left on device"):
            jpfq.quantize(fn, batches, 8, params=params, checkpoint=folder / "run", progress=False)
        assert not [name for name in names(folder / "run") if name.endswith(".tmp")]


def error_of(do):
    """The OSError that something raises; None where it raises none."""
    try:
        do()
    except OSError as error:
        return error
    return None


class Full:
    """A disk that is full from the n-th write on; what libraries raise then is what they do raise."""

    def __init__(self, left):
        self.left = left

    def __call__(self, do, error):
        def write(*args, **kwargs):
            self.left -= 1
            if self.left < 0:
                raise error
            return do(*args, **kwargs)

        return write


def fill(monkeypatch, left):
    full, none = Full(left), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    serialized = "Error while serializing: I/O error: No space left on device (os error 28)"
    for owner, name, error in (
        (safetensors.numpy, "save_file", safetensors.SafetensorError(serialized)),
        (pathlib.Path, "write_text", none),
        (pathlib.Path, "mkdir", none),
        (disk.tempfile, "mkdtemp", none),
        (store, "to_disk", none),
    ):
        monkeypatch.setattr(owner, name, full(getattr(owner, name), error))
    return full


def test_a_full_disk_is_said_plainly_and_leaves_what_was_there(tmp_path, monkeypatch):
    folder, errors = tmp_path / "old", []
    small().save(folder)
    while True:
        with monkeypatch.context() as patched:
            full = fill(patched, len(errors))
            error = error_of(lambda: small(1).save(folder, overwrite=True))
        if error is None:
            break
        assert full.left == -1
        assert error.errno == errno.ENOSPC
        assert str(error).endswith("old cannot be written: No space left on device")
        loaded = jpfq.load(folder)
        errors.append(np.array_equal(loaded.tensors["w"].codes, small(1).tensors["w"].codes))
        assert_same(loaded.params, small(errors[-1]).params)
    assert errors == sorted(errors)  # the old one, until the new one is in its place
    assert errors.count(False) >= 7
    assert len(names(folder)) == 2


OWN = r"""
import jax.numpy as jnp

PARAMS = {"a": jnp.ones((4, 3)), "b\\c": jnp.ones((3, 2))}

def odd():
    return (lambda params, x: x @ params["a"] @ params["b\\c"]), PARAMS, [jnp.eye(4)]

def even():
    return (lambda params, x: x @ params["a"]), {"a": jnp.ones((4, 3))}, [jnp.eye(4)]

def twice():
    return (lambda params, x: x @ params["a"]), {"a": jnp.ones((4, 3)), "a.step": jnp.ones(3)}, [jnp.eye(4)]

def uncalled():
    raise AssertionError("the factory is called before the destination is tried")
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "owned.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("owned", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (f"quantize owned:uncalled --method MSQ --save {'r' * 256}", "cannot be written: File name too long"),
        (f"sweep owned:uncalled --method MSQ --save {'r' * 256}", "cannot be written: File name too long"),
        (f"quantize owned:uncalled --method MSQ --report {'r' * 251}.html", "cannot be written: File name too long"),
        ("quantize owned:uncalled --method MSQ --save /proc/r", "/proc/r cannot be written: "),
        ("quantize owned:uncalled --method MSQ --report /proc/r.html", "/proc/r.html cannot be written: "),
        ("quantize owned:uncalled --method MSQ --picture /proc/r.png", "/proc/r.png cannot be written: "),
        ("quantize owned:odd --method MSQ --save r", r"cannot be saved or loaded under the name 'b\\\\c'"),
        ("sweep owned:odd --method MSQ --save r", r"cannot be saved or loaded under the name 'b\\\\c'"),
        ("quantize owned:twice --method MSQ --save r", "Two parameters cannot both be saved: .* a.step"),
    ],
)
def test_the_command_finds_out_before_the_work(own, capsys, monkeypatch, arguments, message):
    if "/proc" in arguments and not pathlib.Path("/proc").is_dir():
        pytest.skip("there is no folder that nobody can write to")
    monkeypatch.setattr(compare, "quantize", lambda *args, **kwargs: pytest.fail("the work has begun"))
    assert main(arguments.split()) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert "Traceback" not in error
    assert names(own)[-1] == "owned.py"


def test_a_disk_that_is_full_at_the_end_is_no_error_of_the_model(own, capsys, monkeypatch):
    raised = safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def full(*args, **kwargs):
        raise raised

    params = {"a": jnp.ones((4, 3))}
    quantized = result(lambda params, x: x @ params["a"], {"a": tensor((4, 3), (1, 3), jpfq.Integer(4))}, params=params)
    monkeypatch.setattr(compare, "quantize", lambda *args, **kwargs: quantized)
    monkeypatch.setattr(safetensors.numpy, "save_file", full)
    assert main(["quantize", "owned:even", "--method", "MSQ", "--save", "r"]) == 2
    assert capsys.readouterr().err.endswith("jpfq: [Errno 28] r cannot be written: No space left on device\n")
    assert not (own / "r").exists()


ALONE = f"""
import importlib.util, os, sys, time
spec = importlib.util.spec_from_file_location("disk", {disk.__file__!r})
disk = importlib.util.module_from_spec(spec)
spec.loader.exec_module(disk)
from pathlib import Path
"""


@contextlib.contextmanager
def process(text, *arguments):
    """Another process, once it has said something; killed at the end."""
    command = [sys.executable, "-c", ALONE + text, *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            yield other.stdout.readline().strip()
        finally:
            other.send_signal(signal.SIGKILL)


SAVING = """
with disk.hidden(Path(sys.argv[1])) as new:
    (new / "arrays").write_bytes(bytes(1000))
    print(new, flush=True)
    time.sleep(60)
"""


def test_what_a_killed_save_left_goes_with_the_next_and_never_while_it_lives(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / ".jpfq-mine.tmp").mkdir()
    (tmp_path / ".jpfq-mine.tmp" / "notes").write_text("mine")  # no lock in it: not ours
    for parent, folder in ((tmp_path, tmp_path / "r"), (inside, inside)):
        with process(SAVING, parent) as left:
            small().save(folder)
            assert (pathlib.Path(left) / "arrays").is_file()
            assert_same(jpfq.load(folder).params, small().params)
        assert pathlib.Path(left).is_dir()
        if folder == inside:
            small(1).save(folder, overwrite=True)
        else:
            small(1).save(tmp_path / "other")
        assert not pathlib.Path(left).exists()
    assert (tmp_path / ".jpfq-mine.tmp" / "notes").read_text() == "mine"
    assert names(tmp_path) == [".jpfq-mine.tmp", "inside", "other", "r"]


HOLDING = """
lock = disk.Lock.of(sys.argv[1])
if os.fork() == 0:
    print("forked", flush=True)
    time.sleep(3)
    os._exit(0)
time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes do not fork here")
def test_a_lock_dies_with_its_process_and_not_with_its_forks(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with process(HOLDING, file):
        assert disk.Lock.of(file) is None
        assert disk.Lock.of(file, shared=True) is None
    lock = disk.Lock.of(file)  # while the fork sleeps
    assert lock is not None
    assert lock.sure
    assert disk.Lock.of(file) is None
    lock.close()
    with disk.Lock.of(file, shared=True), disk.Lock.of(file, shared=True):
        assert disk.Lock.of(file) is None
    disk.Lock.of(file).close()


@pytest.mark.parametrize("at", ["digest", "safe_open"])
def test_a_reader_reads_again_what_is_replaced_meanwhile(at, tmp_path, monkeypatch):
    folder, count = tmp_path / "r", [0]
    small().save(folder)
    owner = store if at == "digest" else safetensors
    do = getattr(owner, at)

    def replaced(*args, **kwargs):
        if count[0] < 3 and threading.current_thread() is threading.main_thread():
            count[0] += 1
            other = threading.Thread(target=small(count[0]).save, args=(folder,), kwargs={"overwrite": True})
            other.start()
            other.join()
        return do(*args, **kwargs)

    monkeypatch.setattr(owner, at, replaced)
    assert_same(jpfq.load(folder).params, small(3).params)
    assert count == [3]
    monkeypatch.setattr(store, "ATTEMPTS", 2)
    count[0] = 0
    with pytest.raises(ValueError, match="replaced 2 times while it was read"):
        jpfq.load(folder)
    monkeypatch.undo()
    next(folder.glob("arrays-*")).unlink()
    with pytest.raises(ValueError, match=r"is to have .* bytes and has 0"):
        jpfq.load(folder)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("there", [False, True])
def test_of_many_writers_one_wins_whole_or_is_told(overwrite, there, tmp_path):
    writers = 6
    made = [small(seed) for seed in range(writers)]
    for turn in range(3):
        folder, barrier = tmp_path / f"r{turn}", threading.Barrier(writers)
        if there:
            folder.mkdir()

        def write(quantized, folder=folder, barrier=barrier):
            barrier.wait()
            try:
                return str(quantized.save(folder, overwrite=overwrite))
            except ValueError as error:
                return str(error)

        with ThreadPoolExecutor(writers) as pool:
            said = list(pool.map(write, made))
        done = [not text.endswith("already holds a saved result: pass overwrite=True to replace it.") for text in said]
        assert all(text.isdigit() for text, saved in zip(said, done, strict=True) if saved)
        assert sum(done) == (writers if overwrite else 1)
        codes = np.asarray(jpfq.load(folder).tensors["w"].codes)
        winners = [i for i, q in enumerate(made) if np.array_equal(codes, q.tensors["w"].codes)]
        assert len(winners) == 1
        assert done[winners[0]]
        assert len(names(folder)) == 2
    assert names(tmp_path) == ["r0", "r1", "r2"]


def test_overwriting_takes_only_what_is_ours(tmp_path):
    folder = tmp_path / "r"
    small().save(folder)
    (old,) = folder.glob("arrays-*")
    small(1).save(tmp_path / "other")
    (orphan,) = (tmp_path / "other").glob("arrays-*")
    shutil.copy(orphan, folder)  # as a killed save leaves it
    mine = {"arrays-mine.safetensors", "arrays-0123456789abcdef.safetensors", "arrays-.safetensors", "notes.txt"}
    for name in mine:
        (folder / name).write_text("mine")
    small(2).save(folder, overwrite=True)
    assert_same(jpfq.load(folder).params, small(2).params)
    assert not {old.name, orphan.name} & set(names(folder))
    assert {name for name in mine if (folder / name).read_text() == "mine"} == mine
    assert len(names(folder)) == 2 + len(mine)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / store.MANIFEST).write_text('{"model": "of another program"}')
    with pytest.raises(ValueError, match="holds something else"):
        small().save(tmp_path / "foreign", overwrite=True)
    assert names(tmp_path / "foreign") == [store.MANIFEST]


@pytest.mark.parametrize(
    "keys", [["a", 1], [1, "a"], ["a", "a"], [1, 1], [True, "a"], [None, "a"], [[], "a"], [1.0, 2]]
)
def test_a_structure_that_jax_cannot_flatten_is_refused(keys, tmp_path):
    params = {"a": jnp.ones(2), "b": {"c": jnp.zeros(3)}}
    result(linear, {}, params=params).save(tmp_path / "r")
    document, _ = store.read(tmp_path / "r")
    deep = ["dict", [["x", ["dict", [[key, i] for i, key in enumerate(keys)]]]]]
    for structure in (["dict", [[key, i] for i, key in enumerate(keys)]], deep):
        (tmp_path / "r" / store.MANIFEST).write_text(store.seal(document | {"structure": structure}))
        with pytest.raises(ValueError, match="cannot be loaded: Expected the structure of a pytree"):
            jpfq.load(tmp_path / "r")
    whole = ["dict", [[1, 0], [5, 1]]]
    (tmp_path / "r" / store.MANIFEST).write_text(store.seal(document | {"structure": whole}))
    assert jax.tree.structure(jpfq.load(tmp_path / "r").params) == jax.tree.structure({1: 0, 5: 0})


def test_a_record_of_absurd_size_is_refused_unread(tmp_path):
    small().save(tmp_path / "r")
    with open(tmp_path / "r" / store.MANIFEST, "r+b") as file:
        file.truncate(2**33)  # of which the disk holds only the beginning
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"cannot be loaded: quantized\.json has 8,589,934,592 bytes"):
        jpfq.load(tmp_path / "r")
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()
    small(1).save(tmp_path / "r", overwrite=True)  # it is ours, and goes
    assert_same(jpfq.load(tmp_path / "r").params, small(1).params)
    assert len(names(tmp_path / "r")) == 2


@pytest.mark.parametrize("form", [1, 2])
def test_results_that_earlier_versions_saved_load_to_the_bit(form, tmp_path):
    """Written by version 0.1.0 as it was before records had a size limit, with the weights that it had in memory."""
    loaded = jpfq.load(DATA / f"format-{form}")
    assert json.loads((DATA / f"format-{form}" / store.MANIFEST).read_text())["format"] == form
    with np.load(DATA / f"format-{form}.npz") as expected:
        assert loaded.output_error == float(expected["output_error"])
        for name, x in loaded.params.items():
            assert np.asarray(x).dtype == expected[name].dtype
            np.testing.assert_array_equal(x, expected[name])
    assert len(loaded.tensors) == {1: 3, 2: 5}[form]
    loaded.save(tmp_path / "again")
    assert_same(jpfq.load(tmp_path / "again").params, loaded.params)


def test_reports_and_exports_are_whole_or_not_there(tmp_path, monkeypatch):
    page = tmp_path / f"{'r' * 245}.html"
    small().report(page)
    assert names(tmp_path) == [page.name]
    raised = safetensors.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    def full(*args, **kwargs):
        pathlib.Path(args[1]).write_bytes(b"half")
        raise raised

    with monkeypatch.context() as patched:
        patched.setattr(safetensors.numpy, "save_file", full)
        with pytest.raises(OSError, match="vllm cannot be written: No space left"):
            small().export("compressed-tensors", tmp_path / "vllm", names=lambda path: f"{path}.weight")
    assert not (tmp_path / "vllm").exists()
    small().export("compressed-tensors", tmp_path / "vllm", names=lambda path: f"{path}.weight")
    assert names(tmp_path / "vllm") == ["config.json", "model.safetensors"]

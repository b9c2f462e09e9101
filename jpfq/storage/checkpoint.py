"""Resume: a run of `quantize` saved site by site, which continues where it was stopped.

A folder holds run.json, the fingerprint of all that the codes depend on, and a safetensors file for each site that is
done; of batches that are fresh at each stop, a file of their checksums too. A file appears whole or not at all, by renaming,
and the name of a site's has the checksum of its content. It also says of which run it is and which site of it, so that none
is taken for another. A live run holds a lock on run.json, so that no second one goes on with it; the processes of one
distributed run share it. Reading runs nothing. A resumed run goes once more through the float and the quantized network,
and solves only what is missing.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import re
import signal
import tempfile
import threading
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from ..calibrate.batches import Shaped
from ..calibrate.fingerprint import checksum, differences, setting, shape_of, steady, versions
from ..calibrate.hosts import spans_hosts
from ..calibrate.site_result import SiteRequest, SiteResult
from ..matrix import Devices
from ..model.canonical import by_code
from ..model.functional import Functional, numbered
from ..model.program import Program, form
from ..network.rules import Rule
from .files import Lock, digest, read_limited, to_disk, writing
from .solved import read_solved, write_solved

FORMAT = 2  # 1, which cannot be resumed, had sites without the name of their run
MANIFEST = "run.json"
LARGEST = 2**26  # bytes of what is kept as JSON
SITE = re.compile(r"site-(\d{4,})-(\d{3,})-([0-9a-f]{16})\.safetensors")
HALF = re.compile(r"jpfq-\w+\.tmp")  # a file that is being written
WRONG = ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError, safetensors.SafetensorError
TERMINATED = 128 + 15  # the exit status after SIGTERM


def fingerprint(
    functional: Functional,
    programs: Sequence[Program],
    shaped: Sequence[Shaped],
    devices: Devices | None,
    rules: Sequence[Rule],
    **settings: Any,
) -> dict[str, Any]:
    """Everything that the codes depend on, as JSON; arrays by their checksums."""
    named = zip(numbered(functional.paths), functional.leaves, strict=True)
    return {
        "versions": versions(),
        "where it is computed": {
            "device": jax.devices()[0].device_kind,
            "widest floats": jax.dtypes.canonicalize_dtype(np.float64).name,
            "mesh": str(devices and dict(devices.mesh.shape)),
        },
        "the model as a program": zlib.crc32(steady([by_code(form(program)) for program in programs]).encode()),
        "parameters": {path: _array(leaf) for path, leaf in named},
        "calibration data": _data(shaped),
        "rules": {
            f"{field.name} of rule {number}": setting(getattr(rule, field.name))
            for number, rule in enumerate(rules)
            for field in dataclasses.fields(rule)
        },
        **{name: setting(value) for name, value in settings.items()},
    }


class Checkpoint:
    """The sites of a run in a folder, and the lock on it: to be closed at the end."""

    def __init__(self, folder: str | os.PathLike, fingerprint: dict[str, Any], devices: Devices | None):
        """Begins a run in a new or empty folder, or resumes the one in it.

        Raises:
            ValueError: the folder is of something else, of another run, of one that another process runs, or damaged.
        """
        self.folder, self.devices, self.asked = Path(os.path.realpath(folder)), devices, False
        self.sites: dict[tuple[int, int], Path] = {}
        own = json.loads(json.dumps({"format": FORMAT, **fingerprint}))  # tuples become lists, as what is read has them
        self.run = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
        self._shared = jax.process_count() > 1
        if self.folder.is_file() or not self.folder.parent.is_dir():
            raise ValueError(f"checkpoint is a folder, new or of a run, in one that exists; got {folder}.")
        self._lock = self._begun(own)
        try:
            self._check(own)
            for file in sorted(self.folder.iterdir()):
                if match := SITE.fullmatch(file.name):
                    self.sites[int(match[1]), int(match[2])] = file
                elif HALF.fullmatch(file.name) and self._lock.sure and not self._shared:
                    self._clear(file)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Releases the lock, so that another process may resume the run."""
        self._lock.close()

    def _begun(self, own) -> Lock:
        """The lock on run.json, which is made where there is none."""
        manifest, lock = self.folder / MANIFEST, None
        while lock is None:
            if not manifest.exists():
                files = self.folder.iterdir() if self.folder.is_dir() else ()
                if any(not HALF.fullmatch(file.name) and file.name not in (MANIFEST, "lost+found") for file in files):
                    raise ValueError(
                        f"checkpoint: {self.folder} holds something else than a run of jpfq. Give a new folder."
                    )
                with writing(self.folder):
                    self.folder.mkdir(exist_ok=True)
                    lock = self._make(json.dumps(own, indent=1).encode())
            else:
                lock = Lock.of(manifest, shared=self._shared)
                if lock is None:
                    raise ValueError(
                        f"checkpoint: another process is at the run in {self.folder} now. Wait until it ends, or stop it "
                        "and call again to go on from there; or give a new folder."
                    )
        if not lock.sure:
            logging.getLogger("jpfq").warning(
                "checkpoint: %s is on a file system without locks. Let no other process go on with this run.",
                self.folder,
            )
        return lock

    def _make(self, content) -> Lock | None:
        """run.json, locked before anybody can see it; None where another process made one first."""
        half, manifest = self._half(content), self.folder / MANIFEST
        try:
            lock = Lock.of(half, shared=self._shared)
            if lock is None:
                return None
            try:
                os.link(half, manifest)  # which fails where there is one
            except BaseException:
                lock.close()
                raise
            to_disk(self.folder)
            return lock
        except (FileExistsError, FileNotFoundError):  # or took it for one that was left
            return None
        except OSError:  # a file system without links, or a full one
            with contextlib.suppress(FileExistsError), open(manifest, "xb") as file:
                file.write(content)
            return None  # and the file is there, to be locked
        finally:
            with contextlib.suppress(OSError):
                os.unlink(half)

    def _clear(self, file):
        """Removes a half-written file that no process holds."""
        with contextlib.suppress(OSError):
            if (lock := Lock.of(file)) is not None:
                with lock:
                    file.unlink()

    @classmethod
    def of(
        cls, folder: str | os.PathLike, functional: Functional, programs: Sequence[Program], *given, **settings
    ) -> "Checkpoint":
        """The run of `fingerprint(functional, programs, *given, **settings)`."""
        shaped, devices, _ = given
        if spans_hosts([*functional.leaves, *jax.tree.leaves([group.leaves for group in shaped])]):
            raise ValueError(
                "checkpoint keeps what one process computes, and these arrays lie on several. Leave it out."
            )
        return cls(folder, fingerprint(functional, programs, *given, **settings), devices)

    def _check(self, own):
        try:
            found = json.loads(read_limited(self.folder / MANIFEST, LARGEST))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"checkpoint: {self.folder / MANIFEST} is damaged: {error}") from error
        if not isinstance(found, dict) or found.get("format") != FORMAT:
            raise ValueError(
                f"checkpoint: {self.folder} holds a run of another format, that this jpfq does not read. End it with the "
                "jpfq that began it, or give a new folder."
            )
        if found != own:
            apart = "; ".join(differences(found, own)) or "fields that are missing"
            raise ValueError(
                f"checkpoint: {self.folder} holds a run of something else, by {apart}. Call quantize with what it was begun "
                "with, or give a new folder."
            )

    def ask(self, *_: Any) -> None:
        """Asks the run to stop; a handler of signals."""
        self.asked = True

    def leave(self) -> None:
        """Stops the run, if it is asked to."""
        if self.asked:
            done = f"{len(self.sites)} layers are kept in {self.folder}"
            logging.getLogger("jpfq").warning("Stopped by SIGTERM; %s. The same call goes on from there.", done)
            raise SystemExit(TERMINATED)

    def check_batches(self, stop: int, fresh: Shaped) -> None:
        """Saves the checksums of the batches of a stop, or raises where they differ from those of an earlier run."""
        file, own = self.folder / f"data-{stop:04}.json", {"run": self.run, "stop": stop, "arrays": _data([fresh])}
        if not file.is_file():
            self._write(file.name, json.dumps(own).encode())
        try:
            found = json.loads(read_limited(file, LARGEST))
            if not isinstance(found, dict) or found.keys() != own.keys():
                raise ValueError("it is no record of batches")
            if (found["run"], found["stop"]) != (self.run, stop):
                raise ValueError("it is of another run or another stop")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"checkpoint: {file} is damaged: {error}. Give a new folder.") from error
        if found != own:
            raise ValueError(
                f"checkpoint: the batches for stop {stop} are not those that the run in {self.folder} read for it. Make the "
                "function give the same for the same number, or give a new folder."
            )

    def read(self, stop: int, position: int, asked: SiteRequest) -> SiteResult | None:
        """A site that was solved before, with its arrays where they were."""
        self.leave()
        file = self.sites.get((stop, position))
        if file is None:
            return None
        try:
            if digest(file)[:16] != SITE.fullmatch(file.name)[3]:  # pyright: ignore[reportOptionalSubscript]
                raise ValueError("its checksum differs")
            with safetensors.safe_open(file, framework="np") as opened:
                noted = opened.metadata() or {}
                arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, it is no dict
            if noted.get("run") != self.run or noted.get("site") != _site(stop, position):
                raise ValueError("it is of another run or another layer")
            return read_solved(json.loads(noted["record"]), arrays, asked, self.devices)
        except (*WRONG, IsADirectoryError) as error:
            raise ValueError(
                f"checkpoint: {file} is damaged: {error}. Delete it, and its layer is solved again."
            ) from error

    def write(self, stop: int, position: int, solved: SiteResult) -> None:
        """Saves a site; then stops if that was asked for."""
        record, arrays = write_solved(solved)
        noted = {"run": self.run, "site": _site(stop, position), "record": json.dumps(record)}
        content = safetensors.numpy.save(arrays, metadata=noted)
        name = f"site-{stop:04}-{position:03}-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
        self._write(name, content)
        self.sites[stop, position] = self.folder / name
        self.leave()

    def _write(self, name, content):
        with writing(self.folder / name):
            os.replace(self._half(content), self.folder / name)
            to_disk(self.folder)

    def _half(self, content) -> str:
        """A file of this content, which has no name of its own yet."""
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix="jpfq-", suffix=".tmp", delete=False) as file:
            try:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # not by its name, which a run that begins at the same time may clear away
            except BaseException:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(file.name)
                raise
        return file.name


@contextlib.contextmanager
def stoppable(kept: Checkpoint | None) -> Iterator[None]:
    """On SIGTERM the current site finishes and is saved; the exit status is 143.

    Only the main thread of a process can handle signals; elsewhere, where others than Python handle SIGTERM, and where
    nothing is saved, the signal does what it did before.
    """
    here = kept if threading.current_thread() is threading.main_thread() else None
    old = signal.getsignal(signal.SIGTERM)
    if here is None or old is None:
        yield
        return
    signal.signal(signal.SIGTERM, here.ask)
    try:
        yield
        here.leave()
    finally:
        signal.signal(signal.SIGTERM, old)


def _site(stop, position):
    return f"{stop} {position}"


def _array(x) -> list:
    return [*shape_of(x), checksum(x)]


def _data(shaped: Sequence[Shaped]) -> dict[str, list]:
    """Shapes and checksums of all batches, and of the weights of their rows."""
    leaves = [x for group in shaped for x in jax.tree.leaves((group.leaves, group.weights))]
    return {f"array {number}": _array(x) for number, x in enumerate(leaves)}

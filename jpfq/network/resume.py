"""Resume: a run of `quantize` kept on disk, site by site, which goes on where it was stopped.

A folder holds run.json, the fingerprint of all that the codes depend on, and a safetensors file for each site that is
done; of batches that are fresh at each stop, a file of their checksums too. A file appears whole or not at all, by renaming,
and the name of a site's has the checksum of its content. Reading runs nothing. A resumed run goes once more through the
float and the quantized network, and solves only what is missing.
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
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.sharding import NamedSharding, PartitionSpec

from ..matrix import Devices, Info, Solution
from ..scalar import Reach, Sums
from .activation import Rounded
from .batches import Shaped
from .disk import digest, to_disk
from .fingerprint import checksum, differences, setting, shape_of, steady, versions
from .functional import Functional, numbered
from .hosts import spans_hosts
from .program import Program, form
from .record import decode, encode
from .rules import Rule
from .walk import Solved

FORMAT = 1
MANIFEST = "run.json"
SITE = re.compile(r"site-(\d{4,})-(\d{3,})-([0-9a-f]{16})\.safetensors")
HALF = re.compile(r"jpfq-\w+\.tmp")  # a file that is being written
TERMINATED = 128 + 15  # the exit status of what SIGTERM ended


def fingerprint(
    functional: Functional,
    programs: Sequence[Program],
    shaped: Sequence[Shaped],
    devices: Devices | None,
    rules: Sequence[Rule],
    **settings: Any,
) -> dict[str, Any]:
    """What the codes depend on, in terms of JSON; of arrays a checksum each."""
    named = zip(numbered(functional.paths), functional.leaves, strict=True)
    return {
        "versions": versions(),
        "where it is computed": {
            "device": jax.devices()[0].device_kind,
            "widest floats": jax.dtypes.canonicalize_dtype(np.float64).name,
            "mesh": str(devices and dict(devices.mesh.shape)),
        },
        "the model as a program": zlib.crc32(steady([form(program) for program in programs]).encode()),
        "parameters": {path: _array(leaf) for path, leaf in named},
        "calibration data": _data(shaped),
        "rules": {
            f"{field.name} of rule {number}": setting(getattr(rule, field.name))
            for number, rule in enumerate(rules)
            for field in dataclasses.fields(rule)
        },
        **{name: setting(value) for name, value in settings.items()},
    }


class Kept:
    """The sites of a run in a folder."""

    def __init__(self, folder: str | os.PathLike, fingerprint: dict[str, Any], devices: Devices | None):
        """Begins a run in a new or empty folder, or goes on with the one in it.

        Raises:
            ValueError: the folder is of something else, of another run, or damaged.
        """
        self.folder, self.devices, self.asked = Path(folder), devices, False
        self.sites: dict[tuple[int, int], Path] = {}
        own = json.loads(json.dumps(fingerprint))  # tuples become lists, as what is read has them
        parent = self.folder.absolute().parent
        if self.folder.is_file() or not parent.is_dir():
            raise ValueError(f"checkpoint is a folder, new or of a run, in one that exists; got {folder}.")
        files = sorted(self.folder.iterdir()) if self.folder.is_dir() else []
        for file in [file for file in files if HALF.fullmatch(file.name)]:  # what a killed process of ours has left
            file.unlink()
            files.remove(file)
        if self.folder / MANIFEST in files:
            self._check(own)
        elif files:
            raise ValueError(f"checkpoint: {folder} holds something else than a run of jpfq. Give a new folder.")
        else:
            self.folder.mkdir(exist_ok=True)
            self._write(MANIFEST, json.dumps({"format": FORMAT, **own}, indent=1).encode())
        for file in files:
            if match := SITE.fullmatch(file.name):
                self.sites[int(match[1]), int(match[2])] = file

    @classmethod
    def of(
        cls, folder: str | os.PathLike, functional: Functional, programs: Sequence[Program], *given, **settings
    ) -> "Kept":
        """The run of `fingerprint(functional, programs, *given, **settings)`."""
        shaped, devices, _ = given
        if spans_hosts([*functional.leaves, *jax.tree.leaves([group.leaves for group in shaped])]):
            raise ValueError(
                "checkpoint keeps what one process computes, and these arrays lie on several. Leave it out."
            )
        return cls(folder, fingerprint(functional, programs, *given, **settings), devices)

    def _check(self, own):
        try:
            found = json.loads((self.folder / MANIFEST).read_text())
        except ValueError as error:
            raise ValueError(f"checkpoint: {self.folder / MANIFEST} is damaged: {error}") from error
        if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
            raise ValueError(f"checkpoint: {self.folder} holds a run that this jpfq does not read. Give a new folder.")
        if apart := differences(found, own):
            raise ValueError(
                f"checkpoint: {self.folder} holds a run of something else, by {'; '.join(apart)}. Call quantize with what "
                "it was begun with, or give a new folder."
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

    def meet(self, stop: int, fresh: Shaped) -> None:
        """Notes the fresh batches of a stop; a run before that read them must have met the same."""
        file, own = self.folder / f"data-{stop:04}.json", _data([fresh])
        if not file.is_file():
            self._write(file.name, json.dumps(own).encode())
        try:
            found = json.loads(file.read_text())
        except ValueError as error:
            raise ValueError(f"checkpoint: {file} is damaged: {error}. Give a new folder.") from error
        if found != own:
            raise ValueError(
                f"checkpoint: the batches for stop {stop} are not those that the run in {self.folder} read for it. Make the "
                "function give the same for the same number, or give a new folder."
            )

    def read(self, stop: int, position: int) -> Solved | None:
        """A site that was solved before, with its arrays where they were."""
        self.leave()
        file = self.sites.get((stop, position))
        if file is None:
            return None
        try:
            if digest(file)[:16] != SITE.fullmatch(file.name)[3]:  # pyright: ignore[reportOptionalSubscript]
                raise ValueError("its checksum differs")
            with safetensors.safe_open(file, framework="np") as opened:
                record = json.loads(opened.metadata()["record"])
                arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, it is no dict
            return _solved(record, arrays, self.devices)
        except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            raise ValueError(
                f"checkpoint: {file} is damaged: {error}. Delete it, and its layer is solved again."
            ) from error

    def write(self, stop: int, position: int, solved: Solved) -> None:
        """Keeps a site; what is asked to stop stops here."""
        record, arrays = _record(solved)
        content = safetensors.numpy.save(arrays, metadata={"record": json.dumps(record)})
        name = f"site-{stop:04}-{position:03}-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
        self._write(name, content)
        self.sites[stop, position] = self.folder / name
        self.leave()

    def _write(self, name, content):
        with tempfile.NamedTemporaryFile(dir=self.folder, prefix="jpfq-", suffix=".tmp", delete=False) as file:
            file.write(content)
        to_disk(file.name)
        os.replace(file.name, self.folder / name)
        to_disk(self.folder)


@contextlib.contextmanager
def stoppable(kept: Kept | None) -> Iterator[None]:
    """Within it SIGTERM lets the site at work end and be kept, and then exits with status 143.

    Only the main thread of a process can be told so; elsewhere, where others than Python handle the signal, and where
    nothing is kept, it does what it did.
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


def _array(x) -> list:
    return [*shape_of(x), checksum(x)]


def _data(shaped: Sequence[Shaped]) -> dict[str, list]:
    """Shapes and checksums of all batches, and of the weights of their rows."""
    leaves = [x for group in shaped for x in jax.tree.leaves((group.leaves, group.weights))]
    return {f"array {number}": _array(x) for number, x in enumerate(leaves)}


def _record(solved: Solved) -> tuple[dict, dict[str, np.ndarray]]:
    """What is solved, as JSON and arrays by name."""
    solution, reach = solved.solution, solved.solution.info.reach
    figures = {f"info.{name}": x for name, x in vars(solution.info).items() if name != "reach" and x is not None}
    found = {"codes": solution.codes, "step": solution.step, "zero": solution.zero, **figures}
    if solved.error is not None:
        found["error"] = solved.error
    if reach is not None:
        found["reach"] = reach.ends
    arrays = {name: np.ascontiguousarray(x).reshape(x.shape) for name, x in found.items()}
    q = np.asarray(solution.q)
    if not np.array_equal(
        _values(arrays, q.dtype), q
    ):  # where a rotation came after, or products were rounded otherwise
        found["q"], arrays["q"] = solution.q, np.ascontiguousarray(q)
    record = {
        "q": q.dtype.name,
        "places": {name: _place(x) for name, x in {**found, "q": solution.q}.items()},
        "rounded": None if solved.rounded is None else encode(solved.rounded),
        "sums": None if reach is None else encode(jax.tree.map(jnp.asarray, reach.sums)),
    }
    return record, arrays


def _solved(record: dict, arrays: dict[str, np.ndarray], devices: Devices | None) -> Solved:
    """The inverse of `_record`."""
    if "q" not in arrays:
        arrays["q"] = _values(arrays, np.dtype(record["q"]))
    placed = {name: _at(record["places"][name], x, devices) for name, x in arrays.items()}
    reach = Reach(decode(record["sums"], Sums), placed["reach"]) if record["sums"] is not None else None
    figures = {name.removeprefix("info."): x for name, x in placed.items() if name.startswith("info.")}
    info = Info(**figures, reach=reach)
    solution = Solution(placed["codes"], placed["q"], placed["step"], placed["zero"], info)
    rounded = None if record["rounded"] is None else decode(record["rounded"], Rounded)
    return Solved(solution, placed.get("error"), rounded)


def _values(arrays, dtype):
    """The weights that codes stand for: step * (code - zero), by groups of inputs."""
    codes, step, zero = (arrays[name] for name in ("codes", "step", "zero"))
    n = codes.shape[1]
    spread = lambda x: np.repeat(x, n // x.shape[1], 1)
    return (spread(step) * (codes.astype(step.dtype) - spread(zero))).astype(dtype)


def _place(x) -> list | None:
    """How an array is split over the axes of its mesh; None for one that is on no mesh."""
    if not isinstance(x.sharding, NamedSharding):
        return None
    return [list(entry) if isinstance(entry, tuple) else entry for entry in x.sharding.spec]


def _at(place, x, devices):
    """An array where it was."""
    if place is None or devices is None:
        return jnp.asarray(x)
    spec = PartitionSpec(*(tuple(entry) if isinstance(entry, list) else entry for entry in place))
    return jax.device_put(x, NamedSharding(devices.mesh, spec))

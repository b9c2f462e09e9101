"""Files that are whole or not there, and locks that die with their process."""

import contextlib
import hashlib
import os
import re
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

HIDDEN = re.compile(r"\.jpfq-\w+\.tmp")  # a folder of what is being written
LOCK = "lock"  # the file in it that its process holds
TURN = ".jpfq.lock"  # the file that whoever changes a folder holds meanwhile
_held: "weakref.WeakSet[Lock]" = weakref.WeakSet()  # those of this process, which its forks must not keep alive


def digest(path: str | os.PathLike) -> str:
    """The SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def to_disk(path: str | os.PathLike) -> None:
    """Waits until a file, or the names in a folder, are on the disk, where the system can tell."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_limited(path: Path, limit: int) -> bytes:
    """The content of a file, which is refused unread where it is larger than anything we write."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"{path.name} has {size:,} bytes, and jpfq writes no such file of more than {limit:,}.")
        return file.read()


@contextlib.contextmanager
def writing(path: str | os.PathLike, *others: type[Exception]) -> Iterator[None]:
    """Raises an error with the path that could not be written; `others` are errors of a library for it."""
    try:
        yield
    except (OSError, *others) as error:
        found = re.search(r"\(os error (\d+)\)|code: (\d+)", str(error))
        number = getattr(error, "errno", None) or (found and int(found[1] or found[2]))
        reason = os.strerror(number) if number else str(error)
        message = f"{os.fspath(path)} cannot be written: {reason}"
        raise (OSError(number, message) if number else OSError(message)) from error


class Lock:
    """A lock on a file, held until it is closed or its process ends, however that ends.

    By flock, which Linux passes on to the server of a network file system (NFS, CIFS), so that other hosts see it. `sure` is
    False where the file system has no locks, and nobody is kept out. Windows has none that several share.
    """

    def __init__(self, handle: int, sure: bool):
        self.handle, self.sure = handle, sure
        _held.add(self)

    @classmethod
    def of(
        cls, path: str | os.PathLike, *, create: bool = False, shared: bool = False, wait: bool = False
    ) -> "Lock | None":
        """The lock on a file; None where another holds it.

        Raises:
            OSError: there is no such file, or it cannot be opened.
        """
        while True:
            try:
                handle = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o666)
            except PermissionError:
                handle = os.open(path, os.O_RDONLY)
            got = _try(handle, shared, wait)
            if got is not False and _is_at(handle, path):  # and not a file that was removed meanwhile
                return cls(handle, bool(got))
            os.close(handle)
            if got is False:
                return None

    def close(self) -> None:
        """Releases the lock."""
        handle, self.handle = self.handle, -1
        if handle >= 0:
            os.close(handle)

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _try(handle, shared, wait) -> bool | None:
    """True if a lock was acquired; None where there are no locks."""
    if sys.platform == "win32":
        if shared:
            return None
        try:
            os.lseek(handle, 2**30, os.SEEK_SET)  # behind the content, which others may read
            msvcrt.locking(handle, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
            return True
        except OSError:
            return False
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
        return True
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        return None


def _is_at(handle, path):
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False


def _after_fork():
    for lock in list(_held):
        lock.close()  # of the copy alone: the process that took it holds it on


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextlib.contextmanager
def hidden(parent: Path) -> Iterator[Path]:
    """A new hidden folder in another one, to write into. It goes at the end, and what killed processes left, before."""
    with contextlib.suppress(PermissionError):  # a folder that one may write to and not list
        for old in parent.iterdir():
            if HIDDEN.fullmatch(old.name):
                _clear(old)
    path = lock = None
    try:
        while path is None or lock is None:  # again where another took it for one that was left
            path = Path(tempfile.mkdtemp(prefix=".jpfq-", suffix=".tmp", dir=parent))
            with contextlib.suppress(FileNotFoundError):
                lock = Lock.of(path / LOCK, create=True)
        yield path
    finally:
        if lock is not None:
            lock.close()
        if path is not None:
            shutil.rmtree(path, ignore_errors=True)  # where that fails, the next one finds it left


@contextlib.contextmanager
def turn(folder: Path) -> Iterator[None]:
    """One process at a time changes a folder; others wait."""
    path = folder / TURN
    while (lock := Lock.of(path, create=True, wait=True)) is None:  # where waiting has an end of its own
        pass
    with lock:
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.unlink(path)


def _clear(path):
    """Removes a hidden folder whose process lives no more."""
    with contextlib.suppress(OSError):  # another user's, or gone meanwhile: left as it is
        if path.is_symlink() or not path.is_dir():
            return
        if not (path / LOCK).exists():
            path.rmdir()  # killed before it began: there is nothing in it, or it is not ours
        elif (lock := Lock.of(path / LOCK)) is not None:
            with lock:
                if lock.sure:
                    shutil.rmtree(path, ignore_errors=True)

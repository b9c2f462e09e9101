"""Files that are whole or not there."""

import hashlib
import os


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

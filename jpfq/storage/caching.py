"""Compiled programs on the disk, where later processes find them: JAX's own cache, set up for our many small programs."""

import os
import sys
import tempfile
from pathlib import Path

import jax

from .files import writing

SWITCH = "jax_enable_compilation_cache"
FOLDER = "jax_compilation_cache_dir"
LEAST_TIME = "jax_persistent_cache_min_compile_time_secs"
JAX_LEAST_TIME = 1.0  # seconds, by default: most of our programs take less, and are many


def cache_compilations(folder: str | os.PathLike | None = None) -> str:
    """Keeps all programs that JAX compiles from here on in a folder, so that later processes need not compile them again.

    Most of a first call is compilation; the first call of a later process on the same shapes reads what an earlier one
    compiled. Results are the same. The programs are good for one version of JAX and one kind of processor or accelerator;
    others compile their own beside them. The folder only grows, and may be deleted at any time. Whoever may write to it can
    run code in the processes that read it, so it is made for one user alone.

    A folder that JAX has been given already stays, be it by JAX_COMPILATION_CACHE_DIR or by `jax.config`; it then takes
    short compilations too, unless JAX has been given another limit than its default.

    Args:
        folder: where to; left out, `jpfq` in the user's folder for caches: that of XDG_CACHE_HOME, or ~/.cache; on macOS
            ~/Library/Caches; on Windows %LOCALAPPDATA%.

    Returns:
        The folder.

    Raises:
        ValueError: JAX keeps compiled programs elsewhere, or has been told to keep none.
        OSError: the folder cannot be written to.

    Examples:
        >>> folder = jpfq.cache_compilations("programs")  # before the first call
        >>> quantized = jpfq.quantize(model, batches, 4, variables=variables)
    """
    if not is_enabled():
        raise ValueError(
            "JAX has been told to keep no compiled programs: unset JAX_ENABLE_COMPILATION_CACHE, or "
            'jax.config.update("jax_enable_compilation_cache", True) before anything is compiled.'
        )
    given = getattr(jax.config, FOLDER)
    own = None if folder is None else os.path.abspath(Path(folder).expanduser())
    if given and own is not None and os.path.abspath(given) != own:
        raise ValueError(
            f"JAX keeps compiled programs in {given} already, by JAX_COMPILATION_CACHE_DIR or jax.config; got "
            f"folder={str(folder)!r}. Leave folder out to use that one, or do not tell JAX of it."
        )
    if not given:
        given = str(user_cache() / "jpfq") if own is None else own
        with writing(given):
            os.makedirs(given, mode=0o700, exist_ok=True)
            tempfile.TemporaryFile(dir=given).close()
        jax.config.update(FOLDER, given)
    if getattr(jax.config, LEAST_TIME) == JAX_LEAST_TIME and LEAST_TIME.upper() not in os.environ:
        jax.config.update(LEAST_TIME, 0.0)
    return given


def is_enabled() -> bool:
    """True if JAX may keep compiled programs at all."""
    return getattr(jax.config, SWITCH)


def user_cache() -> Path:
    """The folder in which programs keep what they can make again."""
    home = Path(os.path.expanduser("~"))
    if not home.is_absolute():
        raise ValueError("There is no home folder to keep compiled programs in: name a folder.")
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    if sys.platform == "darwin":
        return home / "Library" / "Caches"
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return named if named.is_absolute() else home / ".cache"

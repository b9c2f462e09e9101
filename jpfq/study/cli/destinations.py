"""Where results come from and go to: checked before the work, not after it."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...report.svg import check_matplotlib
from ...storage.files import hidden, writing
from ...storage.save import check_leaves
from ...storage.store import MANIFEST, destination, occupied
from ..compare import Subject
from ..sweep_result import Sweep
from .settings import nearest

PICTURES = (".png", ".pdf", ".svg")


def check_file(path: Path, what: str, suffixes: Sequence[str], overwrite: bool = True) -> None:
    """Raises where a file cannot be written, before the work and not after it."""
    if path.suffix not in suffixes:
        *most, last = suffixes
        kinds = f"{', '.join(most)} or {last}" if most else last
        raise ValueError(f"The {what} is a {kinds} file; got {path.name!r}.")
    with writing(path):
        if not path.absolute().parent.is_dir():
            raise ValueError(f"There is no folder {path.parent} for the {what}.")
        if path.is_dir() or (path.exists() and not overwrite):
            raise ValueError(f"{path} exists already: pass --overwrite to replace it, or give the {what} another name.")
        if path.exists() and what == "picture":  # which is written where it is
            path.open("ab").close()
        else:
            with hidden(path.absolute().parent) as beside:
                (beside / path.name).touch()


def check_picture(path: Path) -> None:
    """Likewise for a picture."""
    check_file(path, "picture", PICTURES)
    check_matplotlib()


def check_page(path: Path, overwrite: bool) -> None:
    """Likewise for a report."""
    check_file(path, "report", (".html",), overwrite)
    check_matplotlib()


def check_result(folder: Path) -> None:
    """Raises where there is no saved result."""
    if not (folder / MANIFEST).is_file():
        here = [path.parent.name for path in folder.absolute().parent.glob(f"*/{MANIFEST}")]
        raise ValueError(f"There is no saved result in {folder}: it has no {MANIFEST}.{nearest(folder.name, here)}")


def add_saving(parser, what: str) -> None:
    """The options that keep a result."""
    keep = parser.add_argument_group("what is kept")
    keep.add_argument("--save", type=Path, metavar="DIR", help=f"a folder for {what}, as jpfq.load reads it")
    keep.add_argument("--entropy-coded", action="store_true", help="fewer bytes; takes pip install 'jpfq[entropy]'")
    keep.add_argument("--report", type=Path, metavar="FILE.html", help=f"a page about {what}")
    keep.add_argument("--picture", type=Path, metavar="FILE", help=f"a picture: {', '.join(PICTURES)}")
    keep.add_argument("--overwrite", action="store_true", help="replace a result or a page that is there already")


def check_saving(options) -> None:
    """Raises where the results cannot be kept as is asked."""
    folder = options.save
    if options.entropy_coded and folder is None:
        raise ValueError("--entropy-coded says how to save a result: it needs --save DIR.")
    if options.entropy_coded and importlib.util.find_spec("constriction") is None:
        raise ValueError("--entropy-coded needs the package constriction: pip install 'jpfq[entropy]'.")
    if options.overwrite and folder is None and options.report is None:
        raise ValueError("--overwrite is about results that are kept: it needs --save DIR or --report FILE.html.")
    if folder is not None:
        _check_folder(folder, options.overwrite)
    if options.report is not None:
        check_page(options.report, options.overwrite)
    if options.picture is not None:
        check_picture(options.picture)


def _check_folder(folder: Path, overwrite: bool) -> None:
    with writing(folder):
        if not folder.absolute().parent.is_dir():
            raise ValueError(f"There is no folder {folder.parent} to save into.")
        found = occupied(folder)
        ours = found == "a saved result"
        if found and not (ours and overwrite):
            what = f"{found}: pass --overwrite to replace it" if ours else f"{found}: save elsewhere"
            raise ValueError(f"{folder} already holds {what}.")
        with destination(folder, overwrite):
            pass  # it can be written


def check_model(options, subject: Subject) -> None:
    """Raises where a model has what cannot be saved."""
    if options.save is not None:
        check_leaves(subject.functional)


def keep(options, quantized, subject: Subject, sweep: Sweep | None = None) -> dict[str, Any]:
    """Saves a result and the page about it where the options ask for it; what there is now."""
    kept: dict[str, Any] = {}
    if options.save is not None:
        size = quantized.save(options.save, entropy_coded=options.entropy_coded, overwrite=options.overwrite)
        kept["saved"] = {"folder": str(options.save.resolve()), "bytes": size}
    if options.report is not None:
        functional = subject.functional
        params = functional.rebuild(functional.leaves)["params"]
        quantized.report(options.report, params=params, sweep=sweep, overwrite=options.overwrite)
        kept["report"] = str(options.report.resolve())
    return kept


def kept_lines(kept: dict[str, Any]) -> list[str]:
    """The same as text."""
    lines = [f"Saved: {kept['saved']['folder']} ({kept['saved']['bytes']:,} bytes)"] if "saved" in kept else []
    return lines + [f"{name.capitalize()}: {kept[name]}" for name in ("report", "picture") if name in kept]

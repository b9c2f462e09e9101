"""Files and folders of results: checked before any work is done, and written after it."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...export.folder import Folder
from ...report.svg import check_matplotlib
from ...storage.files import hidden, writing
from ...storage.save import check_leaves
from ...storage.store import MANIFEST, destination, occupied
from ..compare import Subject
from ..sweep_result import Sweep
from .language import exported
from .settings import nearest

EXPORTED = "compressed-tensors"
IMAGES = (".png", ".pdf", ".svg")


def check_file(path: Path, what: str, suffixes: Sequence[str], overwrite: bool = True) -> None:
    """Raises if a file cannot be written."""
    if path.suffix not in suffixes:
        *most, last = suffixes
        kinds = f"{', '.join(most)} or {last}" if most else last
        raise ValueError(f"The {what} is a {kinds} file; got {path.name!r}.")
    with writing(path):
        if not path.absolute().parent.is_dir():
            raise ValueError(f"There is no folder {path.parent} for the {what}.")
        if path.is_dir() or (path.exists() and not overwrite):
            raise ValueError(f"{path} exists already: pass --overwrite to replace it, or give the {what} another name.")
        if path.exists() and what == "picture":  # which is overwritten in place
            path.open("ab").close()
        else:
            with hidden(path.absolute().parent) as beside:
                (beside / path.name).touch()


def check_picture(path: Path) -> None:
    """Raises if a picture cannot be written."""
    check_file(path, "picture", IMAGES)
    check_matplotlib()


def check_report(path: Path, overwrite: bool) -> None:
    """Raises if a report cannot be written."""
    check_file(path, "report", (".html",), overwrite)
    check_matplotlib()


def check_result(folder: Path) -> None:
    """Raises if there is no saved result."""
    if not (folder / MANIFEST).is_file():
        others = [path.parent.name for path in folder.absolute().parent.glob(f"*/{MANIFEST}")]
        raise ValueError(f"There is no saved result in {folder}: it has no {MANIFEST}.{nearest(folder.name, others)}")


def add_saving(parser, what: str) -> None:
    """Adds the options for saving a result."""
    output = parser.add_argument_group("output files")
    output.add_argument("--save", type=Path, metavar="DIR", help=f"a folder for {what}, which jpfq.load reads")
    output.add_argument("--entropy-coded", action="store_true", help="fewer bytes; needs pip install 'jpfq[entropy]'")
    output.add_argument("--export", type=Path, metavar="DIR", help=f"a folder for {what}, which vLLM loads")
    output.add_argument("--report", type=Path, metavar="FILE.html", help=f"an HTML report of {what}")
    output.add_argument("--picture", type=Path, metavar="FILE", help=f"a plot: {', '.join(IMAGES)}")
    output.add_argument("--overwrite", action="store_true", help="replace an existing result, export or report")


def check_saving(options) -> None:
    """Raises if the results cannot be saved as requested."""
    folder = options.save
    if options.entropy_coded and folder is None:
        raise ValueError("--entropy-coded is an option of --save DIR: add that.")
    if options.entropy_coded and importlib.util.find_spec("constriction") is None:
        raise ValueError("--entropy-coded needs the package constriction: pip install 'jpfq[entropy]'.")
    if options.overwrite and folder is None and options.report is None and options.export is None:
        raise ValueError(
            "--overwrite is an option of --save DIR, --export DIR and --report FILE.html: add one of them."
        )
    if folder is not None:
        _check_folder(folder, options.overwrite)
    if options.export is not None:
        try:
            Folder.of(EXPORTED, options.export, {"overwrite": options.overwrite})
        except ValueError as error:
            raise ValueError(f"--export: {str(error).replace('overwrite=True', '--overwrite')}") from error
    if options.report is not None:
        check_report(options.report, options.overwrite)
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
    """Raises if the model has leaves that cannot be saved."""
    if options.save is not None:
        check_leaves(subject.functional)


def write(options, quantized, subject: Subject, sweep: Sweep | None = None) -> dict[str, Any]:
    """Writes a result and its report if the options ask for them. Returns a document of what was written."""
    written: dict[str, Any] = {}
    if options.save is not None:
        size = quantized.save(options.save, entropy_coded=options.entropy_coded, overwrite=options.overwrite)
        written["saved"] = {"folder": str(options.save.resolve()), "bytes": size}
    if options.export is not None:
        left = exported(options, quantized, EXPORTED)
        servers = {name: {"loads": loads, "as": text} for name, (loads, text) in left.servers.items()}
        written["exported"] = {"folder": str(options.export.resolve()), "dequantized": dict(left), "servers": servers}
    if options.report is not None:
        functional = subject.functional
        params = functional.rebuild(functional.leaves)["params"]
        quantized.report(options.report, params=params, sweep=sweep, overwrite=options.overwrite)
        written["report"] = str(options.report.resolve())
    return written


def written_lines(written: dict[str, Any]) -> list[str]:
    """The same as lines of text."""
    lines = [f"Saved: {written['saved']['folder']} ({written['saved']['bytes']:,} bytes)"] if "saved" in written else []
    if "exported" in written:
        lines.append(f"Exported: {written['exported']['folder']} ({EXPORTED})")
        left = written["exported"]["dequantized"]
        lines += [f"  {path} is not quantized there: {reason}" for path, reason in left.items()]
        for name, said in written["exported"]["servers"].items():
            lines.append(f"  {name} {'loads it' if said['loads'] else 'will not load it'}: {said['as']}")
    return lines + [f"{name.capitalize()}: {written[name]}" for name in ("report", "picture") if name in written]

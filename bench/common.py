"""Common parts of the benchmarks: the folder of their data, and reports that are printed and stored.

A run with default options stores its report in results/; one with other sizes is only printed.
"""

import argparse
import os
import platform
import sys
from pathlib import Path

import jax

import jpfq
from jpfq.network.table import table as table

HERE = Path(__file__).parent
PLAIN = jpfq.Rule(  # GPFQ alone, for claims about calibration and the recursion
    ".*",
    bits=4,
    scale=jpfq.scale.MinMSE(),
    method=jpfq.GPFQ(),
    order=jpfq.order.Natural(),
    finish=None,
    shrinkage=None,
)


def add_data(parser: argparse.ArgumentParser) -> None:
    """The option --data."""
    default = Path(os.environ.get("JPFQ_DATA") or HERE.parent / "../shared/data")
    parser.add_argument("--data", type=Path, default=default, help="data folder; else $JPFQ_DATA, ../shared/data")


def needed(folder: Path, name: str) -> Path:
    """A file of the data folder; ends the program where it is missing."""
    if not (folder / name).is_file():
        print(f"{name} is not in the data folder {folder}: give it by --data or JPFQ_DATA.", file=sys.stderr)
        sys.exit(2)
    return folder / name


def verdict(ok: bool, claim: str) -> str:
    """One line of the verdict on a target."""
    return f"{'PASS' if ok else 'MISS'}  {claim}"


def report(name: str, parser: argparse.ArgumentParser, args: argparse.Namespace, *parts: str) -> None:
    """Prints the parts under a header, and stores them where all options but paths are the default."""
    changed = [k for k, v in vars(args).items() if v != parser.get_default(k) and k not in ("data", "keep")]
    head = f"{name}: jax {jax.__version__}, python {platform.python_version()}, {os.cpu_count()} cores"
    text = "\n\n".join([head, *(part.strip("\n") for part in parts)]) + "\n"
    print(text, end="")
    if not changed:
        (HERE / "results").mkdir(exist_ok=True)
        (HERE / "results" / f"{name}.txt").write_text(text)

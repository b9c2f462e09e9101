"""Plain-text tables."""

import io
import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns under their headings; numbers to the right."""
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for position, title in enumerate(head):
        numeric = all(_is_number(row[position]) for row in rows)
        drawn.add_column(title, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        drawn.add_row(*row)
    out = io.StringIO()
    # text, also where rich would show the table itself (notebooks) or colour it
    Console(file=out, width=1000, markup=False, emoji=False, force_jupyter=False, force_terminal=False).print(drawn)
    return writable("\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n"))


def writable(text: str) -> str:
    """A text as the standard output can write it: with plain lines and escaped letters where its encoding has no others."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return (
            text.replace("\N{BOX DRAWINGS LIGHT HORIZONTAL}", "-").encode(encoding, "backslashreplace").decode(encoding)
        )
    except LookupError:  # an encoding of somebody's own
        pass
    return text


def _is_number(text):
    return text.strip("%x").replace(",", "").replace(".", "", 1).replace("-", "", 1).isdigit()

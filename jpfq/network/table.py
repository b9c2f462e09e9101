"""Plain-text tables."""

import io
import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns under their headings, with numbers aligned to the right."""
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for position, title in enumerate(head):
        numeric = all(_is_number(row[position]) for row in rows)
        drawn.add_column(title, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        drawn.add_row(*row)
    out = io.StringIO()
    # plain text, even where rich would display the table itself (notebooks) or add colours
    Console(file=out, width=1000, markup=False, emoji=False, force_jupyter=False, force_terminal=False).print(drawn)
    return writable("\n".join(line.rstrip() for line in out.getvalue().splitlines()).strip("\n"))


def writable(text: str) -> str:
    """A text that standard output can encode: if need be, with plain lines and escaped characters."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
    except UnicodeEncodeError:
        return (
            text.replace("\N{BOX DRAWINGS LIGHT HORIZONTAL}", "-").encode(encoding, "backslashreplace").decode(encoding)
        )
    except LookupError:  # an encoding that Python does not know
        pass
    return text


def _is_number(text):
    return text.strip("%x").replace(",", "").replace(".", "", 1).replace("-", "", 1).isdigit()

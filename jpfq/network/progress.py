"""A progress bar on a terminal; nothing where there is none."""

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


@contextlib.contextmanager
def progress_bar(total: int, show: bool | None) -> Iterator[Callable[[str, float], None]]:
    """A function to be told each site and its relative error.

    Args:
        total: number of sites.
        show: True or False; None shows the bar on a terminal only.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("error {task.fields[error]:.2%}"),
        TimeRemainingColumn(),
    )
    disable = not (console.is_terminal if show is None else show)
    with Progress(*columns, console=console, disable=disable, transient=True) as progress:
        task = progress.add_task("calibrating", total=total, error=0.0)
        yield lambda path, error: progress.update(task, advance=1, description=path, error=error)

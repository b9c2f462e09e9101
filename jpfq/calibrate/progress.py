"""Progress of a run: a bar on a terminal and in Jupyter, log lines elsewhere.

Lines go to the logger "jpfq" at level INFO. If that is disabled, and there is no terminal, nothing is reported or counted.
"""

import contextlib
import html
import logging
import sys
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.progress import BarColumn, ProgressColumn
from rich.progress import Progress as Bar
from rich.table import Column
from rich.text import Text

LOG = logging.getLogger("jpfq")
EVERY = 5.0  # seconds between two lines at least
SILENT = 15.0  # seconds before a line about a layer that is still being computed
REDRAW = 0.5  # seconds between two updates in Jupyter at least
COMPILE = "/jax/core/compile/"  # events of JAX: tracing, lowering, compiling
LEAST = 2e8  # the fixed cost of a layer, in operations


class Step(NamedTuple):
    """A layer to be quantized."""

    name: str  # "layer 7 of 42"
    path: str
    work: float  # operations
    kind: Hashable  # only the first layer of a kind compiles; None if nothing is compiled


class Reporter:
    """Receives the progress of a run. This one ignores it."""

    def doing(self, what: str) -> None:
        """The next layer has entered a phase, such as "solving"."""

    def done(self, error: float | None = None) -> None:
        """The next layer is quantized, with this relative error."""


SILENCE = Reporter()


class Progress(Reporter):
    """The progress of a run, with an estimate of the time left.

    It is the remaining work at the speed so far, plus the mean time to compile a kind of layer for each kind still to come.
    """

    def __init__(self, steps: Sequence[Step], show: Callable[["Progress", bool], None]):
        """
        Args:
            steps: the layers, in the order of execution.
            show: called at every change, with whether a layer was completed.
        """
        self.steps, self.show = steps, show
        self.index, self.what = 0, "gathering"  # the current layer, or the one just completed, and its phase
        self.finished, self.error = 0, None  # the number of completed layers, and the error of the last one
        self.compiler = Compiler(lambda: show(self, False))
        self.start, self.end = time.monotonic(), None  # the end is an estimate

    @property
    def step(self) -> Step:
        """The layer that is reported on."""
        return self.steps[self.index]

    @property
    def gone(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    @property
    def left(self) -> float | None:
        """Estimated seconds to the end; None until a layer is done."""
        return None if self.end is None else max(self.end - time.monotonic(), 0)

    def doing(self, what: str) -> None:
        if self.finished < len(self.steps):
            self.index, self.what = self.finished, what
            self.show(self, False)

    def done(self, error: float | None = None) -> None:
        self.index, self.what, self.error = self.finished, "done", error
        self.finished += 1
        done, after = self.steps[: self.finished], self.steps[self.finished :]
        work = lambda steps: sum(LEAST + step.work for step in steps)
        kinds = {step.kind for step in done} - {None}
        new = {step.kind for step in after} - kinds - {None}
        compiling = self.compiler.seconds
        left = (self.gone - compiling) / work(done) * work(after) + len(new) * compiling / max(len(kinds), 1)
        self.end = time.monotonic() + left
        self.show(self, True)

    @property
    def state(self) -> str:
        """The phase of the layer, or its error once it is done."""
        if self.index < self.finished:
            return self.what if self.error is None else f"error {self.error:.2%}"
        return "compiling" if self.compiler.at_work else self.what

    @property
    def times(self) -> str:
        """The time gone, left, and spent on compiling."""
        left = "" if self.left is None or self.finished == len(self.steps) else f", about {clock(self.left)} left"
        seconds = self.compiler.seconds
        return f"{clock(self.gone)} gone{left}" + (f" (compiling {clock(seconds)})" if seconds >= 1 else "")

    def __str__(self) -> str:
        return f"{self.step.name}, {self.step.path}: {self.state}, {self.times}"


class Compiler:
    """A context that measures the time this process spends compiling, from JAX's monitoring events."""

    def __init__(self, changed: Callable[[], None]):
        """
        Args:
            changed: called when the thread that created this begins to compile.
        """
        self._own, self._changed, self._lock = threading.get_ident(), changed, threading.Lock()
        self._depth: dict[int, int] = {}  # by thread, as these events nest
        self._total, self._since = 0.0, None

    @property
    def at_work(self) -> bool:
        """True if the thread that created this is compiling."""
        return self._own in self._depth

    @property
    def seconds(self) -> float:
        """The time during which any thread was compiling."""
        since = self._since
        return self._total + (0 if since is None else time.monotonic() - since)

    def __enter__(self) -> "Compiler":
        jax.monitoring.register_scalar_listener(self._begin)
        jax.monitoring.register_event_duration_secs_listener(self._end)
        return self

    def __exit__(self, *error) -> None:
        with contextlib.suppress(AssertionError, ValueError):  # all listeners may have been cleared
            jax.monitoring.unregister_scalar_listener(self._begin)
        with contextlib.suppress(AssertionError, ValueError):
            jax.monitoring.unregister_event_duration_listener(self._end)

    def _begin(self, event: str, value: float, **_: Any) -> None:
        if not event.startswith(COMPILE):
            return
        thread = threading.get_ident()
        with self._lock:
            if not self._depth:
                self._since = time.monotonic()
            began = thread not in self._depth
            self._depth[thread] = self._depth.get(thread, 0) + 1
        if began and thread == self._own:
            self._changed()

    def _end(self, event: str, duration_secs: float, **_: Any) -> None:
        thread = threading.get_ident()
        if not event.startswith(COMPILE) or thread not in self._depth:
            return
        with self._lock:
            self._depth[thread] -= 1
            if not self._depth[thread]:
                del self._depth[thread]
            if not self._depth and self._since is not None:
                self._total, self._since = self.seconds, None


@contextlib.contextmanager
def progress_of(steps: Callable[[], Sequence[Step]], show: bool | None) -> Iterator[Reporter]:
    """A context with the `Reporter` of a run.

    Args:
        steps: returns the layers of the run; called only if progress is shown.
        show: True or False; None decides by where it runs. Without a terminal or Jupyter, True prints lines to standard
            error, and None logs them.
    """
    console = Console(stderr=True)
    terminal = console.is_terminal and not console.is_dumb_terminal and _is_terminal(console.file)
    quiet = not (show or console.is_jupyter or terminal or LOG.isEnabledFor(logging.INFO))
    layers = [] if show is False or quiet else steps()
    if not layers:
        yield SILENCE
        return
    if console.is_jupyter:
        view = _notebook()
    elif terminal:
        view = _bar(console, len(layers))
    else:
        view = _lines(LOG.info if show is None else _print)
    with view as shown:
        progress = Progress(layers, shown)
        with progress.compiler:
            yield progress


def clock(seconds: float) -> str:
    """Minutes and seconds, and hours if there are any."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


@contextlib.contextmanager
def _lines(write: Callable[[str], None]) -> Iterator[Callable[[Progress, bool], None]]:
    """A line every few seconds, and one at the end."""
    last, seen = time.monotonic(), None

    def show(progress: Progress, done: bool):
        nonlocal last, seen
        seen = progress
        if progress.finished < len(progress.steps) and time.monotonic() >= last + (EVERY if done else SILENT):
            write(str(progress))
            last = time.monotonic()

    yield show
    if seen is not None:
        write(f"all layers done, {seen.times}")


def _print(line: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # a closed standard error does not stop the run
        if sys.stderr is not None:
            print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _bar(console: Console, total: int) -> Iterator[Callable[[Progress, bool], None]]:
    """A bar on a terminal, removed at the end."""
    latest: list[Progress] = []
    columns = (
        _Column(latest, lambda progress: progress.step.name),
        BarColumn(12),
        _Column(latest, _in_words),
        _Column(latest, lambda progress: progress.step.path, ratio=1),
    )
    own = _is_terminal(sys.stdout)  # prints of the model appear above the bar, unless they go to a file
    settings = {"transient": True, "expand": True, "refresh_per_second": 4, "redirect_stdout": own}
    with Bar(*columns, console=console, **settings) as bar:
        task = bar.add_task("", total=total)

        def show(progress: Progress, done: bool):
            latest[:] = [progress]
            bar.update(task, completed=progress.finished)

        yield show


def _in_words(progress: Progress) -> str:
    """State, error and time in a few words."""
    at_work = progress.index == progress.finished
    before = f"last error {progress.error:.2%}, " if at_work and progress.error is not None else ""
    times = f"{clock(progress.gone)} gone" if progress.left is None else f"{clock(progress.left)} left"
    return f"{progress.state}, {before}{times}"


class _Column(ProgressColumn):
    """A column with a text about the latest progress."""

    def __init__(self, latest: list[Progress], say: Callable[[Progress], str], ratio: int | None = None):
        super().__init__(Column(no_wrap=True, overflow="ellipsis", ratio=ratio))
        self._latest, self._say = latest, say

    def render(self, task: Any) -> Text:
        return Text("".join(map(self._say, self._latest)))


@contextlib.contextmanager
def _notebook() -> Iterator[Callable[[Progress, bool], None]]:
    """A bar in Jupyter that is updated in place; nothing for a run shorter than one update."""
    from IPython.display import display  # pyright: ignore[reportMissingImports]  # installed, as it runs the notebook

    last, seen, handle = time.monotonic(), None, None

    def draw(text: str):
        nonlocal handle
        assert seen is not None
        bar = f'<progress value="{seen.finished}" max="{len(seen.steps)}"></progress> <code>{html.escape(text)}</code>'
        data = {"text/plain": text, "text/html": bar}
        if handle is None:
            handle = display(data, raw=True, display_id=True)
        else:
            handle.update(data, raw=True)

    def show(progress: Progress, done: bool):
        nonlocal last, seen
        seen = progress
        if time.monotonic() >= last + REDRAW:
            draw(str(progress))
            last = time.monotonic()

    yield show
    if seen is not None and handle is not None:
        draw(f"all layers done, {seen.times}")


def _is_terminal(file: Any) -> bool:
    """True if a file is a terminal, whatever the environment variables say."""
    isatty = getattr(file, "isatty", None)
    return isatty is not None and not getattr(file, "closed", False) and isatty()

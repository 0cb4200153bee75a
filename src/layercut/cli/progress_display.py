"""The progress of a run on stderr: live in a terminal, as plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from layercut.cli.literal import literal
from layercut.progress import Listener, listening
from layercut.report.literal import escape_controls


@contextmanager
def progress_display(*, quiet: bool = False) -> Iterator[None]:
    """Show the progress of the block on stderr: live in a terminal, as plain lines elsewhere."""
    console = Console(stderr=True)
    if quiet:
        yield
    elif console.is_terminal and not console.is_dumb_terminal:
        live = LiveDisplay(console)
        with live.bars, listening(live):
            yield
            live.finish()
    else:
        plain = PlainDisplay(console)
        with listening(plain):
            try:
                yield
            finally:
                plain.finish()


class LiveDisplay(Listener):
    """One bar per stage, with the time left and the current status."""

    def __init__(self, console: Console) -> None:
        self.bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[status]}", markup=False),
            console=console,
        )
        self._task: TaskID | None = None
        self._start = 0.0
        self._status = ""

    def stage(self, name: str) -> None:
        """Start a bar; it pulses until the stage reports steps."""
        self.finish()
        self._start = time.perf_counter()
        self._status = ""
        self._task = self.bars.add_task(escape_controls(name), total=None, status="")

    def step(self, done: int, total: int) -> None:
        """Move the bar; a loop that starts again within a stage starts the bar again."""
        if self._task is None:
            return
        if done == 0:
            self.bars.reset(self._task, total=total)
        self.bars.update(self._task, completed=done, total=total)

    def status(self, text: str) -> None:
        """Show a status beside the bar."""
        text = escape_controls(text)
        self._status = text
        if self._task is not None:
            self.bars.update(self._task, status=text)

    def line(self, text: str) -> None:
        """Print it above the bars that come."""
        self.finish()
        self.bars.console.print(literal(text), soft_wrap=True)

    def finish(self) -> None:
        """Fill the current bar and show what the stage took."""
        if self._task is None:
            return
        seconds = time.perf_counter() - self._start
        status = ", ".join(filter(None, (f"{seconds:.1f} s", self._status)))
        self.bars.update(self._task, total=1, completed=1, status=status)
        self._task = None


class PlainDisplay(Listener):
    """One line per stage: its name when it starts, its seconds and last status when it ends."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._start: float | None = None
        self._status = ""

    def stage(self, name: str) -> None:
        """Start a line."""
        self.finish()
        self._start = time.perf_counter()
        self._status = ""
        self._print(f"{name} ... ", end="")

    def step(self, done: int, total: int) -> None:
        """Steps are for bars."""

    def status(self, text: str) -> None:
        """Remember a status for the end of the line."""
        self._status = text

    def line(self, text: str) -> None:
        """Print it on a line of its own."""
        self.finish()
        self._print(text)

    def finish(self) -> None:
        """End the current line."""
        if self._start is None:
            return
        seconds = time.perf_counter() - self._start
        self._print(", ".join(filter(None, (f"{seconds:.1f} s", self._status))))
        self._start = None

    def _print(self, text: str, end: str = "\n") -> None:
        self._console.print(literal(text), end=end, soft_wrap=True)
        self._console.file.flush()

"""What a run looks like: progress on stderr while it works, a table on stdout at its end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from layercut.progress import Listener, listening
from layercut.report.comparison import columns, measured, rows, sizes
from layercut.results import Evaluation, RunResult

_ASCII = str.maketrans({"±": "+/-", "×": "x", "−": "-", "–": "-"})


def to_ascii(text: str) -> str:
    """±, ×, − and dashes in ASCII."""
    return text.translate(_ASCII)


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
    """One bar per stage, with the time left and the current figure."""

    def __init__(self, console: Console) -> None:
        self.bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[figure]}", markup=False),
            console=console,
        )
        self._task: TaskID | None = None
        self._start = 0.0
        self._figure = ""

    def stage(self, name: str) -> None:
        """Start a bar; it pulses until the stage reports steps."""
        self.finish()
        self._start = time.perf_counter()
        self._figure = ""
        self._task = self.bars.add_task(name, total=None, figure="")

    def step(self, done: int, total: int) -> None:
        """Move the bar; a loop that starts again within a stage starts the bar again."""
        if self._task is None:
            return
        if done == 0:
            self.bars.reset(self._task, total=total)
        self.bars.update(self._task, completed=done, total=total)

    def figure(self, text: str) -> None:
        """Show a figure beside the bar."""
        self._figure = text
        if self._task is not None:
            self.bars.update(self._task, figure=text)

    def finish(self) -> None:
        """Fill the current bar and show what the stage took."""
        if self._task is None:
            return
        seconds = time.perf_counter() - self._start
        figure = ", ".join(filter(None, (f"{seconds:.1f} s", self._figure)))
        self.bars.update(self._task, total=1, completed=1, figure=figure)
        self._task = None


class PlainDisplay(Listener):
    """One line per stage: its name when it starts, its seconds and last figure when it ends."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._start: float | None = None
        self._figure = ""

    def stage(self, name: str) -> None:
        """Start a line."""
        self.finish()
        self._start = time.perf_counter()
        self._figure = ""
        self._print(f"{name} ... ", end="")

    def step(self, done: int, total: int) -> None:
        """Steps are for bars."""

    def figure(self, text: str) -> None:
        """Remember a figure for the end of the line."""
        self._figure = text

    def finish(self) -> None:
        """End the current line."""
        if self._start is None:
            return
        seconds = time.perf_counter() - self._start
        self._print(", ".join(filter(None, (f"{seconds:.1f} s", self._figure))))
        self._start = None

    def _print(self, text: str, end: str = "\n") -> None:
        self._console.print(Text(text), end=end, soft_wrap=True)
        self._console.file.flush()


def print_result(result: RunResult, output_dir: Path, *, quiet: bool = False) -> None:
    """The table and the report's place on stdout, the warnings on stderr."""
    console = Console()
    if not quiet:
        table = result_table(result, ascii_only=console.options.ascii_only)
        needed = console.measure(table, options=console.options.update_width(1000)).maximum
        if needed <= console.width:
            console.print(table)
        else:
            _print_lines(console, result)
    errors = Console(stderr=True)
    for warning in result.warnings:
        errors.print(Text("warning: ", style="yellow"), Text(warning), sep="", soft_wrap=True)
    if not quiet:
        for line in (*sizes(result), *result.checks):
            text = line.translate(_ASCII) if console.options.ascii_only else line
            console.print(Text(text))
        report = output_dir / "layercut" / "report.html"
        console.print(Text(f"Checkpoint: {output_dir}  Report: {report}"), soft_wrap=True)


def print_evaluation(model: str, figures: Evaluation) -> None:
    """One model's figures on stdout, a line each."""
    print_fields(model, list(measured(figures)))


def print_fields(title: str, fields: Sequence[tuple[str, str]]) -> None:
    """A title and (label, value) pairs on stdout, a line each."""
    console = Console()
    console.print(Text(title), soft_wrap=True)
    width = max(len(label) for label, _ in fields)
    for label, value in fields:
        line = f"{label:{width}}  {value}"
        console.print(
            Text(line.translate(_ASCII) if console.options.ascii_only else line), soft_wrap=True
        )


def result_table(result: RunResult, *, ascii_only: bool = False) -> Table:
    """Dense against pruned, then the seconds of each stage.

    Args:
        result: a finished run.
        ascii_only: write ±, × and the like in ASCII.
    """
    table = Table(title=Text(_headline(result)), title_justify="left")
    for title in _titles(result):
        table.add_column(title, justify="right" if title else "left", overflow="fold")
    for section in _cells(result):
        for cells in section:
            table.add_row(*(Text(c.translate(_ASCII) if ascii_only else c) for c in cells))
        table.add_section()
    return table


def _print_lines(console: Console, result: RunResult) -> None:
    """The table's content for a terminal that is too narrow for it: one line per row."""
    lines = [_headline(result), " / ".join(filter(None, _titles(result)))]
    for section in _cells(result):
        lines += [f"{label}: {' / '.join(cells)}" for label, *cells in section]
    for line in lines:
        console.print(
            Text(line.translate(_ASCII) if console.options.ascii_only else line), soft_wrap=True
        )


def _titles(result: RunResult) -> tuple[str, ...]:
    shown = columns(result)
    return ("", *shown, "Change") if shown else ("", "")


def _cells(result: RunResult) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """The rows of what was measured, and the rows of what it took."""
    return (
        [(row.label, *row.cells, row.change) for row in rows(result)],
        [(f"Seconds, {stage}", f"{value:,.1f}") for stage, value in result.seconds.items()],
    )


def _headline(result: RunResult) -> str:
    if result.plan is None:
        return result.model
    layers = ", ".join(str(layer) for layer in result.plan.dropped)
    n_dropped, n_layers = len(result.plan.dropped), result.plan.n_layers
    return f"{result.model}: dropped {n_dropped} of {n_layers} layers ({layers})"

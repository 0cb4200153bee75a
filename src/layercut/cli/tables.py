"""What was measured, as a table on stdout, or as plain lines where that is not a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from layercut.cli.literal import literal
from layercut.report.table import columns, describe_noise, measured, rows, sizes
from layercut.results import Evaluation, RunResult

_ASCII = str.maketrans({"±": "+/-", "×": "x", "−": "-", "–": "-"})


def to_ascii(text: str) -> str:
    """±, ×, − and dashes in ASCII."""
    return text.translate(_ASCII)


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
    print_warnings(result.warnings)
    if not quiet:
        for line in (*describe_noise(result), *sizes(result), *result.checks):
            text = line.translate(_ASCII) if console.options.ascii_only else line
            console.print(literal(text))
        report = output_dir / "layercut" / "report.html"
        console.print(literal(f"Checkpoint: {output_dir}  Report: {report}"), soft_wrap=True)


def print_warnings(warnings: Sequence[str]) -> None:
    """Sentences on stderr, each marked as a warning."""
    errors = Console(stderr=True)
    for warning in warnings:
        errors.print(literal("warning: ", "yellow"), literal(warning), sep="", soft_wrap=True)


def print_evaluation(model: str, figures: Evaluation) -> None:
    """One model's figures on stdout, a line each."""
    print_fields(model, list(measured(figures)))


def print_fields(title: str, fields: Sequence[tuple[str, str]]) -> None:
    """A title and (label, value) pairs on stdout, a line each."""
    console = Console()
    console.print(literal(title), soft_wrap=True)
    width = max(len(label) for label, _ in fields)
    for label, value in fields:
        line = f"{label:{width}}  {value}"
        console.print(
            literal(line.translate(_ASCII) if console.options.ascii_only else line), soft_wrap=True
        )


def result_table(result: RunResult, *, ascii_only: bool = False) -> Table:
    """Dense against pruned, then the seconds of each stage.

    Args:
        result: a finished run.
        ascii_only: write ±, × and the like in ASCII.
    """
    table = Table(title=literal(_headline(result)), title_justify="left")
    for title in _titles(result):
        table.add_column(literal(title), justify="right" if title else "left", overflow="fold")
    for section in _cells(result):
        for cells in section:
            table.add_row(*(literal(c.translate(_ASCII) if ascii_only else c) for c in cells))
        table.add_section()
    return table


def _print_lines(console: Console, result: RunResult) -> None:
    """The table's content for a terminal that is too narrow for it: one line per row."""
    lines = [_headline(result), " / ".join(filter(None, _titles(result)))]
    for section in _cells(result):
        lines += [f"{label}: {' / '.join(cells)}" for label, *cells in section]
    for line in lines:
        console.print(
            literal(line.translate(_ASCII) if console.options.ascii_only else line), soft_wrap=True
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

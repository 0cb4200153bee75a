"""A comparison on stdout: a table, or lines where the terminal is too narrow."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from layercut.cli.literal import literal
from layercut.cli.tables import to_ascii
from layercut.comparison.result import Comparison, cells, titles
from layercut.comparison.row import Row


def print_comparison(result: Comparison, output_dir: Path) -> None:
    """The rows by size, the reasons of those that could not run, and where the report is."""
    console = Console()
    table = build_table(result, ascii_only=console.options.ascii_only)
    needed = console.measure(table, options=console.options.update_width(1000)).maximum
    if needed <= console.width:
        console.print(table)
    else:
        for line in format_lines(result):
            console.print(literal(_encode(line, console)), soft_wrap=True)
    for row in result.rows:
        if row.reason is not None:
            reason = f"{row.method}, {row.layers} layers: {row.reason}"
            console.print(literal(_encode(reason, console)), soft_wrap=True)
    errors = Console(stderr=True)
    for warning in result.warnings:
        errors.print(literal("warning: ", "yellow"), literal(warning), sep="", soft_wrap=True)
    console.print(literal(f"Report: {output_dir / 'report.html'}"), soft_wrap=True)


def build_table(result: Comparison, *, ascii_only: bool = False) -> Table:
    """Dense first, then a section per size, the best first."""
    table = Table(title=literal(str(result.dense.model)), title_justify="left")
    for index, title in enumerate(titles(result)):
        table.add_column(
            literal(to_ascii(title) if ascii_only else title),
            justify="right" if index else "left",
        )
    size = 0
    for row in _rows_that_ran(result):
        if row.layers != size:
            table.add_section()
            size = row.layers
        table.add_row(*(literal(to_ascii(c) if ascii_only else c) for c in cells(result, row)))
    return table


def format_lines(result: Comparison) -> list[str]:
    """The table's content, one line per row."""
    rows = [titles(result), *(cells(result, row) for row in _rows_that_ran(result))]
    return [str(result.dense.model), *(" / ".join(row) for row in rows)]


def _rows_that_ran(result: Comparison) -> list[Row]:
    return [row for row in (result.dense, *result.rows) if row.reason is None]


def _encode(text: str, console: Console) -> str:
    return to_ascii(text) if console.options.ascii_only else text

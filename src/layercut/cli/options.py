"""Options of the commands that measure: texts, tasks and the harness."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from layercut.data.named_texts import BENCHMARKS

TextOption = Annotated[
    list[str] | None,
    typer.Option("--text", metavar="NAME=SOURCE", help="A text for perplexity; may be repeated."),
]
TaskOption = Annotated[
    list[str] | None,
    typer.Option("--task", metavar="NAME=SOURCE", help="Task rows for accuracy; may be repeated."),
]
HarnessOption = Annotated[
    list[str] | None,
    typer.Option(
        "--harness",
        metavar="NAME",
        help="A task of lm-evaluation-harness, its YAML file, or gradmap7; may be repeated.",
    ),
]
HarnessLimitOption = Annotated[
    int | None, typer.Option(min=1, help="Rows of each such task, from its start.")
]
HarnessBatchOption = Annotated[
    int, typer.Option(min=1, help="Requests of such a task in memory at once.")
]
DEFAULT_NAMES = {"--text": "text", "--task": "task"}


def named_sources(options: Sequence[str] | None, flag: str) -> dict[str, str]:
    """Name → source; one without a name is called after its kind, a benchmark after itself.

    Args:
        options: the values of ``flag``.
        flag: ``--text`` or ``--task``.
    """
    found: dict[str, str] = {}
    for option in options or ():
        name, equals, source = option.partition("=")
        if not equals:
            name, source = name if name in BENCHMARKS else DEFAULT_NAMES[flag], option
        if not name or not source or name in found:
            raise typer.BadParameter(
                f"'{option}' should read NAME=SOURCE, with another name each", param_hint=flag
            )
        found[name] = source
    return found

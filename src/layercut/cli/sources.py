"""``NAME=SOURCE`` options of the commands that measure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from layercut.data.benchmarks import BENCHMARKS

TextOption = Annotated[
    list[str] | None,
    typer.Option("--text", metavar="NAME=SOURCE", help="A text for perplexity; may be repeated."),
]
TaskOption = Annotated[
    list[str] | None,
    typer.Option("--task", metavar="NAME=SOURCE", help="Task rows for accuracy; may be repeated."),
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

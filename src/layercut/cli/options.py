"""Arguments and options that several commands have, each once."""

from __future__ import annotations

import errno
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from layercut.data.named_texts import BENCHMARKS
from layercut.errors import OutputError


def _check_folder(json_file: Path | None) -> Path | None:
    """Refuse a file that could not be written, before any work."""
    if json_file is None:
        return None
    try:
        if not json_file.resolve().parent.is_dir():
            problem = "its folder does not exist. Create it."
        elif json_file.is_dir():
            problem = "it is a folder. Name a file."
        else:
            return json_file
    except (OSError, RuntimeError, ValueError) as error:  # too long, or a loop of links
        reason = error.strerror if isinstance(error, OSError) else error
        problem = f"{reason}. Choose another name."
    raise OutputError(f"{json_file} cannot be written: {problem}")


MODEL_HELP = "A folder, a Hub name, or embedded:smollm2-135m."
OUTPUT_DIR = typer.Option("--output-dir", "-o", help="The folder to write to.")
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")]
DtypeOption = Annotated[
    Literal["auto", "float32", "bfloat16"], typer.Option(help="How weights are computed.")
]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a recipe key, as finetune.epochs=1; may be repeated.",
    ),
]
OutputDirOption = Annotated[Path, OUTPUT_DIR]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output.")]
JsonOption = Annotated[
    Path | None,
    typer.Option("--json", callback=_check_folder, help="Also write what is shown to this file."),
]
OfflineOption = Annotated[
    bool, typer.Option("--offline", help="Never ask the Hub; use its cache only.")
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print nothing but warnings and errors.")
]
NoProgressOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="Show no progress; print the results alone.")
]
SpeedOption = Annotated[bool, typer.Option(help="Measure tokens per second, too.")]
WindowOption = Annotated[int, typer.Option(min=2, help="Tokens per window of a text.")]
MaxTokensOption = Annotated[int, typer.Option(min=2, help="Tokens of each text, at most.")]
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


def parse_sources(options: Sequence[str] | None, flag: str) -> dict[str, str]:
    """Name → source; one without a name is called after its kind, a benchmark after itself.

    Args:
        options: the values of ``flag``.
        flag: ``--text`` or ``--task``.
    """
    sources: dict[str, str] = {}
    for option in options or ():
        name, equals, source = option.partition("=")
        if not equals:
            name, source = name if name in BENCHMARKS else DEFAULT_NAMES[flag], option
        if not name or not source or name in sources:
            raise typer.BadParameter(
                f"'{option}' should read NAME=SOURCE, with another name each", param_hint=flag
            )
        sources[name] = source
    return sources


def join_command(context: typer.Context) -> str:
    """The command line as it was typed, for the report."""
    return shlex.join(["layercut", *context.obj])


def write_json(path: Path | None, content: dict[str, Any]) -> None:
    """Write ``content`` where ``--json`` names a file."""
    if path is not None:
        try:
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OutputError(
                f"{path} cannot be written: {error.strerror}. Choose another --json."
            ) from error

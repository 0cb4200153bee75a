"""``layercut eval``: measure a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from layercut.cli.libraries import set_up_libraries
from layercut.cli.options import (
    HarnessBatchOption,
    HarnessLimitOption,
    HarnessOption,
    TaskOption,
    TextOption,
    named_sources,
)
from layercut.errors import OutputError

if TYPE_CHECKING:
    from layercut.results import Evaluation


def measure(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A folder, a Hub name, or embedded:smollm2-135m.")
    ],
    text: TextOption = None,
    task: TaskOption = None,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens per window of a text.")] = 512,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each text, at most.")] = 8192,
    harness: HarnessOption = None,
    harness_limit: HarnessLimitOption = None,
    harness_batch_size: HarnessBatchOption = 8,
    compare_to: Annotated[
        str | None,
        typer.Option(
            "--compare-to",
            metavar="MODEL",
            help="The model it was pruned from: agreement with it on every text.",
        ),
    ] = None,
    speed: Annotated[bool, typer.Option(help="Measure tokens per second, too.")] = True,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"], typer.Option(help="How weights are computed.")
    ] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the figures to this file.")
    ] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Never ask the Hub; use its cache only.")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Show no progress; print the figures alone.")
    ] = False,
) -> None:
    """Measure MODEL: size and speed, perplexity on texts, accuracy on tasks, likeness to another.

    Example: layercut eval out/tuned --task reviews=embedded:reviews@test --text embedded:speeches
    """
    texts, tasks = named_sources(text, "--text"), named_sources(task, "--task")
    if json_file is not None and not json_file.resolve().parent.is_dir():
        raise OutputError(f"{json_file} cannot be written: its folder does not exist. Create it.")
    if compare_to is not None and not texts:
        raise typer.BadParameter("needs a --text to compare on", param_hint="--compare-to")
    set_up_libraries(offline=offline)
    cut = {"text": texts, "seq_len": seq_len, "max_tokens": max_tokens}
    zero_shot = {
        "harness": harness or (),
        "harness_limit": harness_limit,
        "harness_batch_size": harness_batch_size,
    }
    loading = {"revision": revision, "dtype": dtype}
    figures = _figures(
        model, compare_to, loading, cut, {"tasks": tasks, "speed": speed, **zero_shot}, quiet=quiet
    )
    from layercut.cli.tables import print_evaluation

    print_evaluation(model, figures)
    if json_file is not None:
        content = {"schema": 1, "model": model, **figures.to_json()}
        json_file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _figures(
    model: str,
    other: str | None,
    loading: dict[str, Any],
    cut: dict[str, Any],
    measured: dict[str, Any],
    *,
    quiet: bool,
) -> Evaluation:
    """Load one model, or two to compare, and measure the first.

    Args:
        model: what to measure.
        other: what to compare it with.
        loading: its revision and dtype; the other's is its default revision.
        cut: the texts and how they are cut.
        measured: what else `evaluate` takes.
        quiet: show no progress.
    """
    from layercut import load
    from layercut.cli.progress_display import progress_display
    from layercut.evaluation.against_dense import beside, check_comparable
    from layercut.evaluation.evaluate import check_tasks, evaluate
    from layercut.evaluation.harness import check_harness

    with progress_display(quiet=quiet):
        check_harness(measured["harness"])
        view = load(model, **loading)
        check_tasks(view, measured["tasks"])
        if other is None:
            return evaluate(view, **measured, **cut)
        dense = load(other, dtype=loading["dtype"])
        check_comparable(view, dense)
        return beside(evaluate(view, **measured, **cut), view, dense, **cut)

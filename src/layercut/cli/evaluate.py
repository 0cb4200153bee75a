"""``layercut eval``: measure a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from layercut.cli import options
from layercut.cli.libraries import set_up_libraries

if TYPE_CHECKING:
    from layercut.results import Evaluation


def measure(
    model: options.ModelArgument,
    text: options.TextOption = None,
    task: options.TaskOption = None,
    seq_len: options.WindowOption = 512,
    max_tokens: options.MaxTokensOption = 8192,
    harness: options.HarnessOption = None,
    harness_limit: options.HarnessLimitOption = None,
    harness_batch_size: options.HarnessBatchOption = 8,
    compare_to: Annotated[
        str | None,
        typer.Option(
            "--compare-to",
            metavar="MODEL",
            help="The model it was pruned from: agreement with it on every text.",
        ),
    ] = None,
    speed: options.SpeedOption = True,
    dtype: options.DtypeOption = "auto",
    revision: options.RevisionOption = None,
    json_file: options.JsonOption = None,
    offline: options.OfflineOption = False,
    quiet: options.NoProgressOption = False,
) -> None:
    """Measure MODEL: size and speed, perplexity on texts, accuracy on tasks, likeness to another.

    Example: layercut eval out/tuned --task reviews=embedded:reviews@test --text embedded:speeches
    """
    texts, tasks = options.parse_sources(text, "--text"), options.parse_sources(task, "--task")
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
    measured = _measure(
        model, compare_to, loading, cut, {"tasks": tasks, "speed": speed, **zero_shot}, quiet=quiet
    )
    from layercut.cli.tables import print_evaluation

    print_evaluation(model, measured)
    options.write_json(json_file, {"schema": 1, "model": model, **measured.to_json()})


def _measure(
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
    from layercut.evaluation.against_dense import check_comparable, measure_beside
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
        return measure_beside(evaluate(view, **measured, **cut), view, dense, **cut)

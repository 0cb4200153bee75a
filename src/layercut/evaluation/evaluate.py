"""How good, how large, how fast: one model, measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from layercut import progress
from layercut.data.calibration import evaluation_windows
from layercut.data.sources import is_detokenized
from layercut.data.tasks import read_rows
from layercut.evaluation.accuracy import accuracy, answer, paired_change, texts_of
from layercut.evaluation.flops import FLOPS_CONTEXT, flops_per_token
from layercut.evaluation.harness import run_harness
from layercut.evaluation.perplexity import perplexity
from layercut.evaluation.speed import add_speeds, measure_speeds
from layercut.machine import peak_rss_bytes
from layercut.models.special_tokens import text_frame
from layercut.results import Estimate, Evaluation, TextWindows, harness_name

if TYPE_CHECKING:
    from layercut.models.view import DecoderView

BY_LENGTH = " (per character)"
"""Behind a task's name: its accuracy by likelihood per character."""


def check_tasks(view: DecoderView, tasks: Mapping[str, str]) -> None:
    """Refuse tasks that cannot be read or do not fit the model, before any compute.

    Raises:
        DataError: says which row, and why.
        NetworkError: a task is on the Hub, which cannot be reached.
    """
    for source in tasks.values():
        texts_of(view, read_rows(source))


def evaluate(
    view: DecoderView,
    *,
    text: Mapping[str, str] | None = None,
    tasks: Mapping[str, str] | None = None,
    seq_len: int = 512,
    max_tokens: int = 8192,
    detokenize: bool | Literal["auto"] = "auto",
    speed: bool = True,
    harness: Sequence[str] = (),
    harness_limit: int | None = None,
    harness_batch_size: int = 8,
) -> Evaluation:
    """Measure the model that ``view`` holds now.

    Of several ranks, rank 0 alone measures accuracy and speed, while the others wait.

    Args:
        view: the model; unchanged afterwards.
        text: name → data source; perplexity is measured on each.
        tasks: name → source of task rows; accuracy is measured on each, and where choices have
            several tokens, also by likelihood per character.
        seq_len: tokens per window; windows do not overlap.
        max_tokens: tokens of each text at most.
        detokenize: whether to undo WikiText's and PTB's markers.
        speed: whether to measure tokens per second: the median of seven rounds.
        harness: tasks of lm-evaluation-harness, as for `layercut.evaluation.harness`.
        harness_limit: rows of each of these, from its start; ``None`` for all.
        harness_batch_size: requests of these in memory at once.

    Raises:
        DataError: a text or task cannot be read or used.
        RecipeError: the harness is not installed, or does not know a task.
        NetworkError: a text or task is on the Hub, which cannot be reached.
        NumericsError: a loss is not finite.
    """
    estimates, cuts = {}, {}
    frame = text_frame(view.tokenizer)
    for name, source in (text or {}).items():
        windows = evaluation_windows(
            source, view.tokenizer, seq_len=seq_len, max_tokens=max_tokens, detokenize=detokenize
        )
        estimates[name] = perplexity(view, windows)
        restored = is_detokenized(source, detokenize)
        cuts[name] = TextWindows(
            source, len(windows), windows.shape[1], restored, **frame.to_json()
        )
        progress.status(f"{name} perplexity {estimates[name].value:.2f}")
    alone = view.ranks.is_first
    right = _accuracies(view, tasks or {}) if alone else {}
    zero_shot = {}
    if harness:
        zero_shot = run_harness(view, harness, limit=harness_limit, batch_size=harness_batch_size)
    speed = speed and alone and view.source is None  # of reading files it would be
    context = min(FLOPS_CONTEXT, view.context)
    evaluation = Evaluation(
        n_layers=view.n_layers,
        n_parameters=view.n_parameters,
        perplexity=estimates,
        accuracy=right,
        weight_bytes=view.weight_bytes,
        peak_rss_bytes=peak_rss_bytes(),
        windows=cuts,
        harness=zero_shot,
        flops_per_token=flops_per_token(view, context=context),
        flops_context=context,
        leading_token=frame.leading_token,
    )
    if speed:
        evaluation = add_speeds(evaluation, measure_speeds({"": lambda: nullcontext(view)})[""])
    view.ranks.wait()
    return evaluation


def _accuracies(view: DecoderView, tasks: Mapping[str, str]) -> dict[str, Estimate]:
    """Of each task, and where choices have several tokens, also by likelihood per character."""
    right = {}
    for name, source in tasks.items():
        answers = answer(view, read_rows(source))
        right[name] = accuracy(answers.correct)
        if answers.by_length is not None:
            right[f"{name}{BY_LENGTH}"] = accuracy(answers.by_length)
        progress.status(f"{name} accuracy {right[name].value:.3f}")
    return right


def add_changes(after: Evaluation, before: Evaluation) -> Evaluation:
    """``after`` with the change in accuracy of every task of whose rows ``before`` tells as well.

    Of other rows, after a task's file had changed, there is no pair.
    """
    old, new = collect_outcomes(before), collect_outcomes(after)
    pairs = {n: (old[n], rows) for n, rows in new.items() if len(old.get(n, ())) == len(rows)}
    changes = {name: paired_change(*pair) for name, pair in pairs.items()}
    return replace(after, accuracy_change=changes)


def collect_outcomes(stage: Evaluation) -> dict[str, tuple[bool, ...]]:
    """Which rows of each task are right, where that is known of every row."""
    estimates = {
        harness_name(task, metric): estimate
        for task, metrics in stage.harness.items()
        for metric, estimate in metrics.items()
    }
    return {name: f.outcomes for name, f in {**stage.accuracy, **estimates}.items() if f.outcomes}

"""How good, how large, how fast: one model, measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from layercut import progress
from layercut.data.calibration import evaluation_windows
from layercut.data.tasks import read_rows
from layercut.evaluation.choices import accuracy, answer, paired_change, texts_of
from layercut.evaluation.cost import decode_tokens_per_second, prefill_tokens_per_second
from layercut.evaluation.perplexity import perplexity
from layercut.report.machine import peak_rss_bytes
from layercut.results import Evaluation

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
) -> Evaluation:
    """Measure the model that ``view`` holds now.

    Args:
        view: the model; unchanged afterwards.
        text: name → data source; perplexity is measured on each.
        tasks: name → source of task rows; accuracy is measured on each, and where choices have
            several tokens, also by likelihood per character.
        seq_len: tokens per window; windows do not overlap.
        max_tokens: tokens of each text at most.
        detokenize: whether to undo WikiText's and PTB's markers.
        speed: whether to measure tokens per second.

    Raises:
        DataError: a text or task cannot be read or used.
        NumericsError: a loss is not finite.
    """
    figures = {}
    for name, source in (text or {}).items():
        windows = evaluation_windows(
            source, view.tokenizer, seq_len=seq_len, max_tokens=max_tokens, detokenize=detokenize
        )
        figures[name] = perplexity(view, windows)
        progress.figure(f"{name} perplexity {figures[name].value:.2f}")
    right = {}
    for name, source in (tasks or {}).items():
        answers = answer(view, read_rows(source))
        right[name] = accuracy(answers.correct)
        if answers.by_length is not None:
            right[f"{name}{BY_LENGTH}"] = accuracy(answers.by_length)
        progress.figure(f"{name} accuracy {right[name].value:.3f}")
    return Evaluation(
        n_layers=view.n_layers,
        n_parameters=view.n_parameters,
        perplexity=figures,
        accuracy=right,
        prefill_tokens_per_second=prefill_tokens_per_second(view) if speed else None,
        decode_tokens_per_second=decode_tokens_per_second(view) if speed else None,
        peak_rss_bytes=peak_rss_bytes(),
    )


def compared(after: Evaluation, before: Evaluation) -> Evaluation:
    """``after`` with the change in accuracy of every task that ``before`` answered as well."""
    changes = {
        name: paired_change(before.accuracy[name].outcomes, figure.outcomes)
        for name, figure in after.accuracy.items()
        if name in before.accuracy
    }
    return replace(after, accuracy_change=changes)

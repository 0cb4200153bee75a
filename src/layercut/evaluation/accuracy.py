"""Accuracy on task rows: the likeliest choice, or the completion by greedy decoding.

A row with choices is right if the right one has the highest log-likelihood (acc of
lm-evaluation-harness), and in a second count if it has when divided by its length in characters
(acc_norm). A row with one completion is right if greedy decoding gives it. Choices of one token
share one pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from layercut import progress
from layercut.data.encoding import Encoded, encode_choices
from layercut.data.tasks import TaskRow
from layercut.engine.loss import check_vocabulary
from layercut.errors import DataError, NumericsError
from layercut.results import Estimate, estimate_mean

if TYPE_CHECKING:
    from layercut.models.view import DecoderView

BATCH_TOKENS = 2048
"""Tokens that are in memory at once, padding included."""

LOGITS_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Answers:
    """Which rows a model got right, in the order of the rows.

    Attributes:
        correct: by likelihood, or by greedy decoding for a row with one completion.
        by_length: by likelihood per character; ``None`` where all choices are of one token.
    """

    correct: tuple[bool, ...]
    by_length: tuple[bool, ...] | None = None


@dataclass(frozen=True, slots=True)
class Text:
    """Tokens to run, and what is asked about them.

    Attributes:
        ids: the tokens.
        queries: (position, token, choice): how likely is the token after the position?
        row: index of the row.
        shared: one position answers for all of the row's choices.
    """

    ids: list[int]
    queries: list[tuple[int, int, int]]
    row: int
    shared: bool = False


@dataclass(slots=True)
class _Sums:
    """Per row and choice: summed log-likelihood, and whether greedy decoding gives it."""

    likelihood: list[list[float]]
    greedy: list[list[bool]]


def answer(view: DecoderView, rows: Sequence[TaskRow]) -> Answers:
    """Answer every row.

    Args:
        view: the model; unchanged afterwards.
        rows: of one task.

    Raises:
        DataError: no rows, or a row that does not fit the model's context or vocabulary.
        NumericsError: a likelihood is not finite.
    """
    texts = texts_of(view, rows)
    sums = _Sums(
        [[0.0] * len(row.choices) for row in rows], [[True] * len(row.choices) for row in rows]
    )
    texts.sort(key=lambda text: -len(text.ids))
    batches = list(_batches(texts))
    for batch in progress.track(batches, len(batches)):
        _run(view, batch, sums)
    for row, likelihood in zip(rows, sums.likelihood, strict=True):
        _check_finite(likelihood, row)
    right = tuple(map(_is_right, rows, sums.likelihood, sums.greedy))
    scored = [rows[text.row] for text in texts if not text.shared]
    if not any(len(row.choices) > 1 and not row.ending for row in scored):
        return Answers(right)
    per_character = [
        [value / len(choice.strip()) for value, choice in zip(values, row.choices, strict=True)]
        for row, values in zip(rows, sums.likelihood, strict=True)
    ]
    return Answers(right, tuple(map(_is_right, rows, per_character, sums.greedy)))


def texts_of(view: DecoderView, rows: Sequence[TaskRow]) -> list[Text]:
    """What has to be run to answer ``rows``.

    Raises:
        DataError: no rows, or a row that does not fit the model's context.
    """
    if not rows:
        raise DataError("there are no rows to answer. Give a task with at least one.")
    context = view.context
    return [text for i, row in enumerate(rows) for text in _texts(view, i, row, context)]


def accuracy(correct: Sequence[bool]) -> Estimate:
    """Fraction right with its standard error √(p(1 − p)/(n − 1)); 0 for a single row."""
    mean = estimate_mean(torch.tensor(correct, dtype=torch.float64))
    return replace(mean, outcomes=tuple(correct))


def paired_change(before: Sequence[bool], after: Sequence[bool]) -> Estimate:
    """Change in accuracy from ``before`` to ``after``, both on the same rows.

    Source   the paired t interval; McNemar's table has the same differences
    Formula  d_i = after_i − before_i;  value = d̄,  stderr = s_d / √n
    """
    assert len(before) == len(after), "answers to different rows"
    return estimate_mean(torch.tensor(after, dtype=torch.float64) - torch.tensor(before).double())


def _is_right(row: TaskRow, scores: Sequence[float], greedy: Sequence[bool]) -> bool:
    if len(row.choices) == 1:
        return greedy[0]
    return max(range(len(scores)), key=scores.__getitem__) == row.answer


def _check_finite(likelihood: Sequence[float], row: TaskRow) -> None:
    if not all(math.isfinite(value) for value in likelihood):
        raise NumericsError(
            f"{row.where}: a choice's log-likelihood is not finite. Use dtype: float32, or check "
            "the weights."
        )


def _texts(view: DecoderView, index: int, row: TaskRow, context: int) -> Iterator[Text]:
    encoded = []
    for whole in encode_choices(row, view.tokenizer):
        fitted = whole.fit_length(context)
        if fitted is None:
            raise DataError(
                f"{row.where}: a choice of {len(whole.targets)} tokens does not fit the model's "
                f"context of {context} after a prompt. Shorten the row."
            )
        encoded.append(fitted)
    if _share_prompt(encoded):
        prompt = encoded[0].ids[:-1]
        last = len(prompt) - 1
        queries = [(last, e.ids[-1], choice) for choice, e in enumerate(encoded)]
        yield Text(prompt, queries, index, shared=True)
        return
    for choice, e in enumerate(encoded):
        queries = [(e.start - 1 + i, token, choice) for i, token in enumerate(e.targets)]
        yield Text(e.ids[:-1], queries, index)


def _share_prompt(encoded: Sequence[Encoded]) -> bool:
    prompt = encoded[0].ids[:-1]
    return all(len(e.targets) == 1 and e.ids[:-1] == prompt for e in encoded)


def _batches(texts: Sequence[Text]) -> Iterator[list[Text]]:
    """Texts of similar length; ``texts`` are sorted, the longest first."""
    batch: list[Text] = []
    for text in texts:
        if batch and (len(batch) + 1) * len(batch[0].ids) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(text)
    if batch:
        yield batch


@torch.no_grad()
def _run(view: DecoderView, batch: Sequence[Text], sums: _Sums) -> None:
    """Add the batch's queries to ``sums``."""
    width = max(len(text.ids) for text in batch)
    # Padding stands on the right, where causal attention never looks: no mask is needed.
    ids = torch.tensor([text.ids + [0] * (width - len(text.ids)) for text in batch])
    check_vocabulary(view, ids)
    with view.precision():
        output = view.decoder(input_ids=ids.to(view.device), use_cache=False)
    hidden = output.last_hidden_state.flatten(0, 1)
    asked = [
        (line * width + position, token, text.row, choice)
        for line, text in enumerate(batch)
        for position, token, choice in text.queries
    ]
    for start in range(0, len(asked), LOGITS_AT_ONCE):
        part = asked[start : start + LOGITS_AT_ONCE]
        places = torch.tensor([place for place, *_ in part], device=hidden.device)
        tokens = torch.tensor([token for _, token, *_ in part], device=hidden.device)
        likelihood, greedy = _likelihood(view, hidden[places], tokens)
        for (_, _, row, choice), value, first in zip(part, likelihood, greedy, strict=True):
            sums.likelihood[row][choice] += value
            sums.greedy[row][choice] &= first


def _likelihood(
    view: DecoderView, hidden: Tensor, tokens: Tensor
) -> tuple[list[float], list[bool]]:
    """Log-likelihood of each token, (n,), and whether it leads, after its state, (n, d)."""
    scores = view.head(hidden).float().log_softmax(dim=-1)
    chosen = scores.gather(1, tokens[:, None]).squeeze(1)
    return chosen.tolist(), (scores.argmax(dim=-1) == tokens).tolist()

"""Task rows → token ids: one reading for training and for evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from layercut.data.tasks import TaskRow
from layercut.errors import DataError

IGNORED = -100
"""The label of a token that no loss is computed on, as torch and transformers have it."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A text of which only the end is predicted.

    Attributes:
        ids: all tokens.
        start: index of the first predicted one; at least 1.
    """

    ids: list[int]
    start: int

    @property
    def targets(self) -> list[int]:
        """The predicted tokens."""
        return self.ids[self.start :]

    def fit_length(self, max_length: int) -> Encoded | None:
        """The text without the first tokens that are too many; ``None`` if no prompt is left."""
        excess = max(0, len(self.ids) - max_length)
        if excess >= self.start:
            return None
        return Encoded(self.ids[excess:], self.start - excess)


def encode_choices(row: TaskRow, tokenizer: Any) -> list[Encoded]:
    """Each choice after the row's prompt, or the row's ending after each choice.

    Raises:
        DataError: a chat row and a tokenizer without a chat template, or nothing to predict.
    """
    before = _prompt(row, tokenizer)
    if row.ending:
        pairs = [(before + choice, before + choice + row.ending) for choice in row.choices]
    else:
        pairs = [(before, before + choice) for choice in row.choices]
    return [_encode(prompt, whole, row, tokenizer) for prompt, whole in pairs]


def encode_completion(row: TaskRow, tokenizer: Any) -> Encoded:
    """The right completion after the row's prompt.

    A completion or a reply ends with the end-of-text token, so that the tuned model learns where to
    stop; a choice among several is only ever scored and does not.

    Raises:
        DataError: as for `encode_choices`.
    """
    before = _prompt(row, tokenizer)
    end = tokenizer.eos_token_id
    if row.messages:
        reply = {"role": "assistant", "content": row.completion}
        whole = _render([*row.messages, reply], row, tokenizer, add_generation_prompt=False)
        encoded = _encode(before, whole, row, tokenizer)
        if end in encoded.targets:  # templates put a line break after it, which nobody generates
            last = len(encoded.ids) - encoded.ids[::-1].index(end)
            encoded = Encoded(encoded.ids[:last], encoded.start)
        return encoded
    encoded = _encode(before, before + row.completion, row, tokenizer)
    if len(row.choices) > 1 or end is None or encoded.ids[-1] == end:
        return encoded
    return Encoded([*encoded.ids, end], encoded.start)


def training_example(row: TaskRow, tokenizer: Any, max_length: int) -> dict[str, list[int] | int]:
    """``input_ids``, ``labels`` and ``length`` of a training row; the prompt's labels are masked.

    Args:
        row: the example.
        tokenizer: the model's.
        max_length: tokens at most; a longer prompt loses its start.

    Raises:
        DataError: as for `encode_choices`, or the completion does not fit.
    """
    whole = encode_completion(row, tokenizer)
    encoded = whole.fit_length(max_length)
    if encoded is None:
        raise DataError(
            f"{row.where}: the completion has {len(whole.targets)} tokens, which do not fit into "
            f"{max_length} after a prompt. Raise finetune.max_length, or shorten the row."
        )
    labels = [IGNORED] * encoded.start + encoded.targets
    return {"input_ids": encoded.ids, "labels": labels, "length": len(encoded.ids)}


def _prompt(row: TaskRow, tokenizer: Any) -> str:
    if not row.messages:
        return row.prompt
    return _render(row.messages, row, tokenizer, add_generation_prompt=True)


def _render(
    messages: Sequence[Mapping[str, str]],
    row: TaskRow,
    tokenizer: Any,
    *,
    add_generation_prompt: bool,
) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{row.where} holds chat messages, but the model's tokenizer has no chat template. "
            "Use rows with prompt and completion, or a model with a template."
        )
    try:
        text: str = tokenizer.apply_chat_template(
            [dict(m) for m in messages], tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        raise DataError(
            f"{row.where}: the tokenizer's chat template refuses the messages of the roles "
            f"{', '.join(m['role'] for m in messages)}: {error}. Change the row."
        ) from None
    return text


def _encode(prompt: str, whole: str, row: TaskRow, tokenizer: Any) -> Encoded:
    """``whole``, predicted from where its tokens part from those of ``prompt``.

    A token that straddles the border counts as predicted: the model never sees half of it.
    """
    special = not row.messages  # a chat template writes its own special tokens
    before, ids = (
        list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])
        for text in (prompt, whole)
    )
    end = tokenizer.eos_token_id
    if special and before[-1:] == [end] == ids[-1:] and not prompt.endswith(tokenizer.eos_token):
        ids.pop()  # some tokenizers end every text; this one goes on
    start = next(
        (i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b),
        min(len(before), len(ids)),
    )
    if start == 0:
        first = tokenizer.bos_token_id
        first = tokenizer.eos_token_id if first is None else first
        if first is None:
            raise DataError(f"{row.where} has an empty prompt. Give it at least one token.")
        ids, start = [first, *ids], 1
    if start == len(ids):
        raise DataError(f"{row.where} has nothing to predict: its completion yields no token.")
    return Encoded(ids, start)

"""Task rows → token ids and texts: one reading for training, evaluation and calibration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from layercut.checkpoints.hf_calls import guard
from layercut.data.chat_template import render
from layercut.data.tasks import TaskRow, read_rows
from layercut.errors import DataError
from layercut.models.special_tokens import leading_tokens

OTHER_TEXT = "Use text that it knows, or the model's original tokenizer files."
IGNORED = -100
"""The label of a token that no loss is computed on, as torch and transformers have it."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A text of which only the end is predicted.

    Attributes:
        ids: all tokens.
        start: index of the first predicted one; at least 1.
        n_leading: tokens at the start that every text of the model has, and a shortened one keeps.
    """

    ids: list[int]
    start: int
    n_leading: int = 0

    @property
    def targets(self) -> list[int]:
        """The predicted tokens."""
        return self.ids[self.start :]

    def fit_length(self, max_length: int) -> Encoded | None:
        """The text without the first tokens that are too many; ``None`` if no prompt is left."""
        excess = max(0, len(self.ids) - max_length)
        if not excess:
            return self
        if excess >= self.start - self.n_leading:
            return None
        kept = self.ids[: self.n_leading] + self.ids[self.n_leading + excess :]
        return Encoded(kept, self.start - excess, self.n_leading)


def row_texts(source: str, tokenizer: Any) -> Iterator[str]:
    """Each row's prompt with its right choice, as one text; a chat row as its template writes it.

    Args:
        source: as for `read_rows`.
        tokenizer: the model's, with a chat template where the rows are messages.

    Raises:
        DataError: as `read_rows` and, of chat rows, as `render`.
        NetworkError: the Hub is needed and cannot be reached.
    """
    for row in read_rows(source):
        if row.messages:
            yield render(row.conversation, tokenizer, row.where).whole
        else:
            yield row.prompt + row.completion


def encode_choices(row: TaskRow, tokenizer: Any) -> list[Encoded]:
    """Each choice after the row's prompt, or the row's ending after each choice.

    Raises:
        DataError: a chat row that the tokenizer's template cannot write, or nothing to predict.
    """
    if row.messages:
        return [_encode_reply(row, tokenizer)]
    if row.ending:
        pairs = [(row.prompt + choice, row.prompt + choice + row.ending) for choice in row.choices]
    else:
        pairs = [(row.prompt, row.prompt + choice) for choice in row.choices]
    return [_encode(prompt, whole, row, tokenizer) for prompt, whole in pairs]


def encode_completion(row: TaskRow, tokenizer: Any) -> Encoded:
    """The right completion after the row's prompt.

    A completion or a reply ends with the token that ends a generation, so that the tuned model
    learns where to stop; a choice among several is only ever scored and does not.

    Raises:
        DataError: as for `encode_choices`.
    """
    if row.messages:
        written = render(row.conversation, tokenizer, row.where)
        encoded = _encode(written.prompt, written.whole, row, tokenizer)
        # Templates put a line break behind the end of a turn, which nobody generates.
        n_ids = len(encoded.ids) - _tail(encoded, tokenizer)
        return Encoded(encoded.ids[:n_ids], encoded.start, encoded.n_leading)
    encoded = _encode(row.prompt, row.prompt + row.completion, row, tokenizer)
    end = tokenizer.eos_token_id
    if len(row.choices) > 1 or end is None or encoded.ids[-1] == end:
        return encoded
    return Encoded([*encoded.ids, end], encoded.start, encoded.n_leading)


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


def _encode_reply(row: TaskRow, tokenizer: Any) -> Encoded:
    """A chat row's reply as its template writes it, up to where its text ends."""
    written = render(row.conversation, tokenizer, row.where)
    text, whole = row.completion.strip(), written.whole
    end = whole.rfind(text) + len(text)
    if text and end > len(written.prompt) and "tool_calls" not in row.conversation.reply:
        return _encode(written.prompt, whole[:end], row, tokenizer)
    encoded = _encode(written.prompt, whole, row, tokenizer)
    n_ids = len(encoded.ids) - _tail(encoded, tokenizer)
    ended = encoded.ids[n_ids - 1] in _special_ids(tokenizer) and n_ids - 1 > encoded.start
    return Encoded(encoded.ids[: n_ids - ended], encoded.start, encoded.n_leading)


def _tail(encoded: Encoded, tokenizer: Any) -> int:
    """How many tokens of white space stand behind the last special token of the targets."""
    special = _special_ids(tokenizer)
    n_behind = next((i for i, token in enumerate(reversed(encoded.targets)) if token in special), 0)
    behind = encoded.ids[len(encoded.ids) - n_behind :]
    if not n_behind:
        return 0
    with guard("the tokenizer cannot decode its own tokens", DataError, OTHER_TEXT):
        text = tokenizer.decode(behind)
    return 0 if text.strip() else n_behind


def _special_ids(tokenizer: Any) -> set[int]:
    return {*getattr(tokenizer, "all_special_ids", ()), tokenizer.eos_token_id}


def _encode(prompt: str, whole: str, row: TaskRow, tokenizer: Any) -> Encoded:
    """``whole``, predicted from where its tokens part from those of ``prompt``.

    A token that straddles the border counts as predicted: the model never sees half of it. The
    tokenizer's leading tokens stand in front once, be they a template's or not.
    """
    leading = list(leading_tokens(tokenizer))
    before, ids = (_ids(text, leading, row, tokenizer) for text in (prompt, whole))
    start = next(
        (i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b),
        min(len(before), len(ids)),
    )
    first = tokenizer.bos_token_id
    n_leading = len(leading) or int(first is not None and ids[:1] == [first])
    if start == 0:
        first = tokenizer.eos_token_id if first is None else first
        if first is None:
            raise DataError(f"{row.where} has an empty prompt. Give it at least one token.")
        ids, start, n_leading = [first, *ids], 1, 1
    if start == len(ids):
        raise DataError(f"{row.where} has nothing to predict: its completion yields no token.")
    return Encoded(ids, start, n_leading)


def _ids(text: str, leading: list[int], row: TaskRow, tokenizer: Any) -> list[int]:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{row.where} holds half of a surrogate pair. Change the row.") from None
    with guard(f"the tokenizer cannot encode {row.where}", DataError, OTHER_TEXT):
        ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return ids if ids[: len(leading)] == leading else leading + ids

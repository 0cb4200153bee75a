"""A source named in the recipe → the rows of a task: prompt and completion, chat, or choices.

A file's columns say what it holds; ``FORMATS`` is the table of what is known.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from layercut.data import files
from layercut.data.chat import Conversation, parse_json, read_messages, text_of
from layercut.data.columns import check_columns, drop_null
from layercut.data.embedded_texts import NAMES, review_rows
from layercut.data.sources import read_table
from layercut.errors import DataError, suggestion

REVIEWS = ("reviews@train", "reviews@test")
REVIEW_PROMPT = "Review: {text}\nSentiment:"
REVIEW_CHOICES = {"fresh": " positive", "rotten": " negative"}
"""Category of a review → what the model is to say: words that it knows, unlike the site's."""
MAX_TEXT = 8_000_000
"""Characters of a row's text: encoding takes about 130 bytes of memory for each."""
BLANK = re.compile(r"(?<!_)_(?!_)")
"""WinoGrande's gap; runs of underscores are drawn lines, as in ARC."""
JSON_LINES = re.compile(r"\.jsonl(\.gz)?(@[^/]*)?$", re.IGNORECASE)
"""Sources in which a null inside of an object is one that somebody wrote."""


@dataclass(frozen=True, slots=True)
class TaskRow:
    """One example.

    A row with one choice has a completion to be learnt and reproduced; with several, one of them is
    right. Text is joined as it stands: the spaces between the parts are part of the choices.

    Attributes:
        prompt: what the model is given; not used by a chat row.
        choices: what can follow it.
        answer: index of the right choice.
        ending: what follows whichever choice; where there is one, choices are judged by its
            likelihood after each of them.
        messages: a chat row's messages before the reply, whose text is its one choice.
        where: the row's place, for errors.
        reply: the reply with its reasoning and tool calls, where it has more than text.
        variables: what the chat template is told besides: tools, documents and others.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int = 0
    ending: str = ""
    messages: tuple[Mapping[str, Any], ...] = ()
    where: str = ""
    reply: Mapping[str, Any] = field(default_factory=dict)
    variables: Mapping[str, Any] = field(default_factory=dict)

    @property
    def completion(self) -> str:
        """The right choice and what follows it."""
        return self.choices[self.answer] + self.ending

    @property
    def conversation(self) -> Conversation:
        """What a chat row's template is given."""
        reply = self.reply or {"role": "assistant", "content": self.completion}
        return Conversation(self.messages, reply, self.variables)


@dataclass(frozen=True, slots=True)
class Format:
    """One kind of file.

    Attributes:
        columns: every row has them.
        build: a row's columns → the row; raises `DataError` without the place.
        fits: what else tells it from the other formats, asked of every row.
        optional: columns that are read where they are there.
    """

    columns: tuple[str, ...]
    build: Callable[[Mapping[str, Any]], TaskRow]
    fits: Callable[[Mapping[str, Any]], bool] = lambda _: True
    optional: tuple[str, ...] = ()


def read_rows(source: str) -> list[TaskRow]:
    """The rows of a task, in order.

    Args:
        source: ``embedded:reviews@train``, ``embedded:reviews@test``,
            ``hub:owner/name[:config][@split]``, or the path of a .jsonl, .csv or .parquet file
            (each also .gz); ``path@value`` takes the rows whose column ``split`` is ``value``.

    Raises:
        DataError: the source is not there, not readable, empty, or not a known format; a row's
            answer is none of its choices.
        NetworkError: the Hub is needed and cannot be reached.
    """
    if source.startswith("embedded:"):
        return _reviews(source.removeprefix("embedded:"))
    given = list(_split_rows(source))
    if not given:
        raise DataError(f"{source} is empty: 0 rows")
    filled = not JSON_LINES.search(source)
    rows = [(where, drop_null(row, filled=filled)) for where, row in given]
    form = _format_of(rows, list(given[0][1]), source)
    check_columns(rows, form.columns, form.optional, source)
    task_rows = []
    for where, row in rows:
        location = f"{source}, {where}"
        try:
            task_rows.append(replace(form.build(row), where=location))
        except DataError as error:
            raise DataError(f"{location}: {error}") from None
    return task_rows


def check_classes(rows: Sequence[TaskRow]) -> None:
    """Refuse training rows that lack one of the answers the model shall choose from.

    Rows whose choices differ from each other have no classes in common and always pass.

    Raises:
        DataError: names the choice that is never right.
    """
    choices = rows[0].choices
    if len(choices) < 2 or any(row.choices != choices for row in rows):
        return
    missing = set(range(len(choices))) - {row.answer for row in rows}
    if missing:
        name = choices[min(missing)].strip()
        raise DataError(
            f"no training row has the answer '{name}' ({len(rows)} rows, from {rows[0].where}), so "
            "the model would learn never to give it. Add rows of that class."
        )


def _reviews(name: str) -> list[TaskRow]:
    if name not in REVIEWS:
        hint = "it is plain text" if name in NAMES else f"unknown{suggestion(name, REVIEWS)}"
        known = ", ".join(f"embedded:{review}" for review in REVIEWS)
        raise DataError(f"'embedded:{name}' holds no task rows: {hint} (known: {known})")
    categories = list(REVIEW_CHOICES)
    return [
        TaskRow(
            prompt=REVIEW_PROMPT.format(text=row["text"]),
            choices=tuple(REVIEW_CHOICES.values()),
            answer=categories.index(row["category"]),
            where=f"embedded:{name}, row {number}",
        )
        for number, row in enumerate(review_rows(name.removeprefix("reviews@")), start=1)
    ]


def _split_rows(source: str) -> Iterable[files.Row]:
    """The rows of ``source``; of ``path@value``, those of that split."""
    path, at, split = source.rpartition("@")
    if source.startswith("hub:") or not at or files.exists(files.local_path(source)):
        return read_table(source)
    rows = list(read_table(path))
    chosen = [(where, row) for where, row in rows if row.get("split") == split]
    if not chosen:
        known = sorted({str(row["split"]) for _, row in rows if "split" in row})
        splits = f"its splits are {', '.join(known)}" if known else "it has no column 'split'"
        raise DataError(f"{path} has no rows of split '{split}': {splits}.")
    return chosen


def _format_of(rows: Sequence[files.Row], columns: Sequence[str], source: str) -> Format:
    """The first format that every row fits.

    Args:
        rows: without columns that are null.
        columns: all of the first row's.
        source: what to call them.
    """
    for present in (rows[0][1], columns):
        named = [form for form in FORMATS if all(name in present for name in form.columns)]
        if named:
            return next(form for form in named if all(form.fits(row) for _, row in rows))
    known = "; ".join(dict.fromkeys(", ".join(form.columns) for form in FORMATS))
    raise DataError(
        f"{source} has none of the known sets of columns (columns: {', '.join(columns)}). "
        f"Rename its columns to one of: {known}."
    )


def _text(row: Mapping[str, Any], column: str) -> str:
    value = row.get(column)
    if not isinstance(value, str) or not value.strip():
        got = "blank text" if isinstance(value, str) else type(value).__name__
        raise DataError(f"'{column}' should be text, got {got}")
    if len(value) > MAX_TEXT:
        raise DataError(
            f"'{column}' holds {len(value):,} characters, and no model reads more than "
            f"{MAX_TEXT:,} at once. Shorten it"
        )
    return value


def _choices(row: Mapping[str, Any]) -> tuple[str, ...]:
    choices = row.get("choices")
    if isinstance(choices, str):  # a CSV file has no lists
        choices = parse_json(choices)
    texts = isinstance(choices, list | tuple) and all(
        isinstance(choice, str) and choice.strip() for choice in choices
    )
    if not isinstance(choices, list | tuple) or not texts or len(choices) < 2:
        raise DataError(f"'choices' should be a list of at least two texts, got {choices!r}")
    return tuple(choices)


def _answer(row: Mapping[str, Any]) -> int:
    """Index of the right choice, which the row gives as a number or as the choice's text."""
    choices = _choices(row)
    answer = row.get("answer")
    if isinstance(answer, int) and not isinstance(answer, bool):
        if 0 <= answer < len(choices):
            return answer
        raise DataError(
            f"the answer {answer} is none of the {len(choices)} choices, counted from 0"
        )
    labels = [choice.strip() for choice in choices]
    if isinstance(answer, str) and answer.strip() in labels:
        return labels.index(answer.strip())
    if isinstance(answer, str) and answer.isdecimal():
        return _answer({**row, "answer": int(answer)})
    hint = suggestion(str(answer), labels)
    raise DataError(f"unknown label {answer!r}{hint} (choices: {', '.join(labels)})")


def _chat(row: Mapping[str, Any]) -> TaskRow:
    said = read_messages(row)
    content = said.reply["content"]
    return TaskRow(
        "",
        (text_of(said.reply),),
        messages=said.messages,
        reply=said.reply if len(said.reply) > 2 or not isinstance(content, str) else {},
        variables=said.variables,
    )


def _completion(row: Mapping[str, Any]) -> TaskRow:
    return TaskRow(_text(row, "prompt"), (_text(row, "completion"),))


def _prompt_choices(row: Mapping[str, Any]) -> TaskRow:
    return TaskRow(_text(row, "prompt"), _choices(row), _answer(row))


def _blank(row: Mapping[str, Any]) -> TaskRow:
    before, after = BLANK.split(_text(row, "question"))
    prompt = before.rstrip()
    gap = " " if before else ""
    choices = tuple(f"{gap}{choice.strip()}" for choice in _choices(row))
    return TaskRow(prompt, choices, _answer(row), ending=after)


def _question(row: Mapping[str, Any]) -> TaskRow:
    context = f"{_text(row, 'context').strip()}\n" if "context" in row else ""
    question = _text(row, "question").strip()
    prompt = f"{context}Question: {question}\nAnswer:"
    choices = tuple(f" {choice.strip()}" for choice in _choices(row))
    return TaskRow(prompt, choices, _answer(row))


def _has_one_blank(row: Mapping[str, Any]) -> bool:
    return len(BLANK.findall(str(row.get("question")))) == 1


def _has_lists(row: Mapping[str, Any]) -> bool:
    prompt = parse_json(row.get("prompt"))
    return isinstance(prompt, list | tuple) and all(
        isinstance(message, Mapping) and "role" in message for message in prompt
    )


CHAT_COLUMNS = ("tools", "documents", "chat_template_kwargs", "system")

FORMATS = (
    Format(("messages",), _chat, optional=(*CHAT_COLUMNS, "prompt", "completion")),
    Format(("prompt", "completion"), _chat, fits=_has_lists, optional=CHAT_COLUMNS),
    Format(("prompt", "completion"), _completion),
    Format(("prompt", "choices", "answer"), _prompt_choices),
    # WinoGrande: one gap in every row. ARC, PIQA, and with a context BoolQ and PubMedQA: questions.
    Format(("question", "choices", "answer"), _blank, fits=_has_one_blank),
    Format(("question", "choices", "answer"), _question, optional=("context",)),
)
"""Known files, by their columns; the first that fits every row is taken."""

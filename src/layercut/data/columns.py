"""What the columns beside those of a row's format say: used, harmless, told, or refused.

A column that some format gives a meaning to (TRL's, OpenAI's, ShareGPT's, Alpaca's) decides what a
model should learn from the row. Where it is not used, the row is refused; it is never passed over.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from layercut.errors import DataError

HARMLESS = frozenset(
    {
        *("id", "idx", "index", "uid", "uuid", "row_id", "prompt_id", "question_id", "qid"),
        *("conversation_id", "chat_id", "__index_level_0__", "hash", "sha256"),
        *("source", "dataset", "data_source", "origin", "url", "title", "license", "author"),
        *("split", "subset", "category", "topic", "subject", "domain", "difficulty", "level"),
        *("language", "lang", "locale", "timestamp", "date", "created_at", "num_turns"),
    }
)
"""Columns that say where a row comes from, and nothing about what it means."""

_MEDIA = "adds something else than text"
_PREFERENCE = "says which replies are preferred"
_TEMPLATE = "changes what a chat template writes"
_TOKENS = "holds tokens of a tokenizer, in place of text"
_TRAINING = "says what is learnt from"
_INPUT = "is part of what the model is asked"

MEANINGS: Mapping[str, str] = {
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _MEDIA),
    **dict.fromkeys(("chosen", "rejected", "label", "labels", "completions"), _PREFERENCE),
    **dict.fromkeys(("tools", "documents", "chat_template_kwargs", "chat_template"), _TEMPLATE),
    **dict.fromkeys(
        ("functions", "function_call", "tool_choice", "parallel_tool_calls"), _TEMPLATE
    ),
    **dict.fromkeys(("response_format", "reasoning_effort", "model_identity"), _TEMPLATE),
    **dict.fromkeys(
        ("enable_thinking", "add_generation_prompt", "continue_final_message"), _TEMPLATE
    ),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking", "prefix", "suffix"), _INPUT),
    **dict.fromkeys(
        ("system", "system_prompt", "context", "history", "input", "instruction"), _INPUT
    ),
    **dict.fromkeys(("messages", "prompt", "conversations", "conversation"), _INPUT),
    **dict.fromkeys(("completion", "output", "response"), "is another answer"),
    **dict.fromkeys(("input_ids", "attention_mask", "position_ids", "token_type_ids"), _TOKENS),
    **dict.fromkeys(("completion_mask", "assistant_masks", "seq_lengths"), _TOKENS),
    **dict.fromkeys(
        ("weight", "weights", "sample_weight", "train", "loss_mask", "mask"), _TRAINING
    ),
}
"""Columns with a meaning in some format → what it is; refused where they are not used."""


def drop_null(row: Mapping[str, Any], *, filled: bool) -> dict[str, Any]:
    """The columns that are not null.

    Args:
        row: a row's columns.
        filled: whether its source fills what a nested object lacks with null, as Parquet does; a
            null inside of it then says nothing either.
    """
    columns = {name: _without_null(value) if filled else value for name, value in row.items()}
    return {name: value for name, value in columns.items() if value is not None}


def is_absent(value: Any) -> bool:
    """Whether a value is null, an empty list or an empty object."""
    return value is None or (isinstance(value, list | tuple | Mapping) and not value)


def _without_null(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_null(v) for k, v in value.items() if v is not None}
    if isinstance(value, list | tuple):
        return [_without_null(item) for item in value]
    return value


def check_columns(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    columns: Collection[str],
    optional: Collection[str],
    source: str,
) -> None:
    """Refuse rows with a column whose meaning is not used; tell of columns without a known one.

    Args:
        rows: place and columns.
        columns: what the rows' format is known by.
        optional: what else it reads.
        source: what to call the rows.

    Raises:
        DataError: names the column, its place, and what it would mean.
    """
    unknown: dict[str, None] = {}
    for where, row in rows:
        for name, value in row.items():
            if name in columns or name in optional or name in HARMLESS or is_absent(value):
                continue
            if _says_nothing_new(name, value, row):
                continue
            if name in MEANINGS:
                raise DataError(
                    f"{source}, {where}: the column '{name}' {MEANINGS[name]}, and is not used in "
                    f"rows of {', '.join(columns)}. Say it there, or remove the column."
                )
            unknown[name] = None
    if unknown:
        names = ", ".join(f"'{name}'" for name in unknown)
        warnings.warn(
            f"{source}: nothing is read from the column(s) {names}, whose meaning is not known.",
            stacklevel=3,
        )


def _says_nothing_new(name: str, value: Any, row: Mapping[str, Any]) -> bool:
    """Whether a column is blank, weighs a row like any other, or repeats the answer."""
    if name == "label" and "answer" in row:
        return str(value) == str(row["answer"])
    return value == "" or (name == "weight" and value in (1, "1", "1.0"))

"""Columns beside those of a format: refused where they mean something, told where they may."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from layercut.data.columns import MEANINGS
from layercut.data.tasks import read_rows
from layercut.errors import DataError

Write = Callable[..., str]
PAIR = {"prompt": "2+2=", "completion": "4"}
CHOICES = {"question": "Which is wet?", "choices": ["sand", "water"], "answer": 1}
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(*rows: dict[str, Any]) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.mark.parametrize("column", sorted(set(MEANINGS) - {"messages", *PAIR}))
def test_a_column_with_a_meaning_is_refused_beside_a_prompt_and_its_completion(
    write: Write, column: str
):
    with pytest.raises(DataError, match=rf"line 2: the column '{column}' .* prompt, completion"):
        read_rows(write(PAIR, PAIR | {column: ["something"]}))


@pytest.mark.parametrize(
    ("row", "column"),
    [
        (CHAT | {"chosen": "a", "rejected": "b"}, "chosen"),
        (CHAT | {"images": ["a.png"]}, "images"),
        (CHAT | {"reasoning_effort": "low"}, "reasoning_effort"),
        (CHAT | {"weight": 0}, "weight"),
        (PAIR | {"label": False}, "label"),
        (PAIR | {"context": "Count well."}, "context"),
        (CHOICES | {"system": "Be brief."}, "system"),
        (CHOICES | {"label": 0}, "label"),
    ],
)
def test_meaningful_columns_of_other_formats_are_refused_by_name(
    write: Write, row: dict[str, Any], column: str
):
    with pytest.raises(DataError, match=rf"line 1: the column '{column}' "):
        read_rows(write(row))


@pytest.mark.parametrize(
    "row",
    [
        PAIR | {"id": 7, "source": "a", "language": "en", "split": "train"},
        PAIR | {"tools": None, "images": [], "chat_template_kwargs": {}, "system": ""},
        PAIR | {"weight": 1},
        CHOICES | {"label": 1, "context": None},
        CHAT | {"prompt": "Hi", "prompt_id": "x"},
    ],
)
def test_columns_that_say_nothing_are_passed_over(write: Write, row: dict[str, Any]):
    assert len(read_rows(write(row))) == 1


def test_columns_of_unknown_meaning_are_told_once(write: Write):
    source = write(PAIR | {"mood": "gay"}, PAIR | {"mood": "sad", "colour": "red"})
    with pytest.warns(UserWarning, match=r"read from the column\(s\) 'mood', 'colour'") as told:
        read_rows(source)
    assert len(told) == 1


def test_what_parquet_fills_in_is_absent(tmp_path: Path):
    called = {
        "role": "assistant",
        "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}],
    }
    messages = [*CHAT["messages"][:1], called, *CHAT["messages"]]
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": messages}]), path)
    assert "tool_calls" in parquet.read_table(path).to_pylist()[0]["messages"][0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (row,) = read_rows(str(path))
    assert row.messages[0] == CHAT["messages"][0]
    assert row.reply == {}

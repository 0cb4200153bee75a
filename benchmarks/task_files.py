"""Task rows → a file that holds these very rows, for methods that take a file's name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from layercut.data.tasks import TaskRow, read_rows


def write_rows(rows: Sequence[TaskRow], path: Path) -> str:
    """A file from which `read_rows` reads these very rows, in their order."""
    path.write_text("".join(f"{json.dumps(columns(row))}\n" for row in rows), encoding="utf-8")
    read = [replace(row, where="") for row in read_rows(str(path))]
    if read != [replace(row, where="") for row in rows]:
        raise ValueError("rows were written as other rows")
    return str(path)


def columns(row: TaskRow) -> dict[str, Any]:
    if row.messages:
        return {"messages": [*row.messages, {"role": "assistant", "content": row.completion}]}
    if row.ending:
        question = f"{row.prompt} _{row.ending}" if row.prompt else f"_{row.ending}"
        return {"question": question, "choices": row.choices, "answer": row.answer}
    if len(row.choices) == 1:
        return {"prompt": row.prompt, "completion": row.completion}
    return {"prompt": row.prompt, "choices": row.choices, "answer": row.answer}

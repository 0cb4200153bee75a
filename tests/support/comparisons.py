"""What the tests of the comparison share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from layercut.comparison.result import Comparison

TEXT = "The quick brown fox jumps over the lazy dog. " * 200


def comparison_of(model: Path, folder: Path) -> dict[str, Any]:
    """Settings of a small comparison, with a text and a task in ``folder``."""
    text = folder / "text.txt"
    text.write_text(TEXT)
    rows = folder / "rows.jsonl"
    made = [{"prompt": f"{i} is", "choices": [" odd", " even"], "answer": i % 2} for i in range(6)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in made))
    return {
        "model": str(model),
        "dtype": "float32",
        "calibration": {"data": str(text), "n_sequences": 4, "seq_len": 32, "gradient_batch": 2},
        "drop_layers": [1, 2],
        "methods": ["shortgpt", "sleb", "gradmap"],
        "evaluation": {
            "text": {"fox": str(text)},
            "tasks": {"parity": str(rows)},
            "seq_len": 32,
            "max_tokens": 128,
        },
        "layer_losses": False,
    }


def timeless(result: Comparison) -> list[dict[str, Any]]:
    """Rows as in ``compare.json``, without what differs from run to run."""
    timed = {"seconds", "passes", "total_seconds"}
    rows: list[dict[str, Any]] = result.to_json()["rows"]
    return [{key: value for key, value in row.items() if key not in timed} for row in rows]

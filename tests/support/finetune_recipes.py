"""Recipes that fine-tune tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEXT = "The quick brown fox jumps over the lazy dog. " * 100


def write_task(path: Path, numbers: range) -> str:
    rows = [{"prompt": f"{i} is", "choices": [" even", " odd"], "answer": i % 2} for i in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def recipe_in(folder: Path, model: Path) -> dict[str, Any]:
    (folder / "text.txt").write_text(TEXT)
    return {
        "model": str(model),
        "dtype": "float32",
        "calibration": {"data": str(folder / "text.txt"), "n_sequences": 4, "seq_len": 32},
        "selection": {"drop_layers": 2},
        "finetune": {
            "data": write_task(folder / "train.jsonl", range(32)),
            "batch_size": 4,
            "accumulation": 2,
            "epochs": 1,
            "learning_rate": 1e-2,
            "max_length": 64,
            "save_steps": 2,
        },
        "evaluation": {
            "text": {},
            "seq_len": 64,
            "tasks": {"parity": write_task(folder / "test.jsonl", range(32, 50))},
        },
    }

"""Rows and settings of tiny fine-tunings."""

from __future__ import annotations

from typing import Any

import torch

from layercut.data.tasks import TaskRow
from layercut.recipe.finetune import FinetuneConfig

ROWS = [
    TaskRow(f"{i} has {'an' if i % 3 else 'the'}", (" even", " odd"), i % 2, where=f"row {i}")
    for i in range(32)
]


def settings(**changes: Any) -> FinetuneConfig:
    chosen = {"batch_size": 4, "accumulation": 2, "epochs": 1, "max_length": 64} | changes
    return FinetuneConfig(**({"learning_rate": 1e-2, "save_steps": None} | chosen))


def first_batch(trainer: Any) -> dict[str, torch.Tensor]:
    return dict(next(iter(trainer.get_train_dataloader())))

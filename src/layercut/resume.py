"""Whether a folder of trainer checkpoints belongs to the run that is about to start."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from layercut.finetune_settings import FinetuneSettings
from layercut.models.view import DecoderView

RUN_FILE = "layercut-run.json"
"""In the folder of the checkpoints: what they belong to."""

WITHOUT_EFFECT = {"save_steps", "report_to", "keep_adapter", "compare_dense", "data"}
"""Settings that do not change what a run computes from its rows."""


def last_checkpoint(folder: Path, contents: Sequence[str]) -> str | None:
    """The newest complete checkpoint in ``folder``, if it is of the run that ``contents`` describe.

    What belongs to another run is removed; the folder exists afterwards.
    """
    mark = folder / RUN_FILE
    if not mark.is_file() or json.loads(mark.read_text(encoding="utf-8")) != list(contents):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        mark.write_text(json.dumps(list(contents)) + "\n", encoding="utf-8")
        return None
    # The trainer writes its state last: a checkpoint without it was cut off.
    complete = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    newest = max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    return None if newest is None else str(newest)


def weights_hash(view: DecoderView) -> str:
    """Hash of a model's weights as they are in memory."""
    total = hashlib.sha256()
    for name, parameter in view.model.named_parameters():
        total.update(f"{name} {torch.hash_tensor(parameter).numpy(force=True)}\n".encode())
    return total.hexdigest()


def settings_hash(settings: FinetuneSettings) -> str:
    """Hash of the settings that a run's result depends on."""
    effective = settings.model_dump(mode="json", exclude=WITHOUT_EFFECT)
    return hashlib.sha256(json.dumps(effective, sort_keys=True).encode()).hexdigest()


def rows_hash(dataset: Any) -> str:
    """Hash of the encoded training rows."""
    columns = [dataset["input_ids"][:], dataset["labels"][:]]
    return hashlib.sha256(json.dumps(columns).encode()).hexdigest()

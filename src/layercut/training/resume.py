"""Whether a folder of trainer checkpoints belongs to the run that is about to start."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from layercut.checkpoints.claimed_folder import (
    RUN_FILE,
    check_claimed,
    encode_mark,
    folder_beside,
)
from layercut.models.view import DecoderView
from layercut.recipe.base import Config

Saving = TypeVar("Saving", bound=Config)
"""Settings with a key ``save_steps``."""

PURPOSE = "the checkpoints of the training"

WITHOUT_EFFECT = {"save_steps", "report_to", "keep_adapter", "compare_dense", "data"}
"""Settings that do not change what a run computes from its rows."""


def training_folder(output_dir: Path) -> Path:
    """Where the checkpoints of a run's trainings stay until it is complete: beside its output."""
    return folder_beside(output_dir, "training")


@contextmanager
def trainer_folder(work_dir: Path | None, config: Saving) -> Iterator[tuple[Path, Saving]]:
    """Where a trainer works, and its configuration; without ``work_dir``, apart, no checkpoints.

    Raises:
        OutputError: ``work_dir`` holds something else than layercut's checkpoints.
    """
    if work_dir is not None:
        check_work_dir(work_dir)
        yield work_dir, config
        return
    with tempfile.TemporaryDirectory(prefix="layercut-train-") as scratch:
        yield Path(scratch), config.model_copy(update={"save_steps": None})


def check_work_dir(folder: Path) -> None:
    """Refuse a folder that holds something else than layercut's checkpoints.

    Raises:
        OutputError: it is a file, or has content and no ``RUN_FILE``.
    """
    check_claimed(folder, PURPOSE)


def claim(folder: Path, contents: Sequence[str] = ()) -> Path:
    """Make ``folder`` if need be, and mark it as one that layercut may remove.

    Raises:
        OutputError: as for `check_work_dir`.
    """
    check_work_dir(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RUN_FILE).write_text(encode_mark(list(contents)), encoding="utf-8")
    return folder


def last_checkpoint(folder: Path, contents: Sequence[str]) -> str | None:
    """The newest complete checkpoint in ``folder``, if it is of the run that ``contents`` describe.

    The checkpoints of another run are removed; the folder exists afterwards.

    Raises:
        OutputError: as for `check_work_dir`.
    """
    check_work_dir(folder)
    mark = folder / RUN_FILE
    if not mark.is_file() or mark.read_text(encoding="utf-8") != encode_mark(list(contents)):
        if mark.is_file():
            shutil.rmtree(folder)
        claim(folder, contents)
        return None
    # The trainer writes its state last: a checkpoint without it was cut off.
    complete = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    newest = max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)
    return None if newest is None else str(newest)


def model_hash(view: DecoderView) -> str:
    """Hash of a model's weights as they are in memory, and of the arithmetic it computes in."""
    total = hashlib.sha256()
    arithmetic = f"{view.model.dtype} {view.device.type} mixed={view.mixed_precision}"
    total.update(f"{arithmetic}\n".encode())
    for name, parameter in view.model.named_parameters():
        total.update(f"{name} {torch.hash_tensor(parameter).numpy(force=True)}\n".encode())
    return total.hexdigest()


def config_hash(config: Config) -> str:
    """Hash of the configuration that a run's result depends on."""
    effective = config.model_dump(mode="json", exclude=WITHOUT_EFFECT)
    return hashlib.sha256(json.dumps(effective, sort_keys=True).encode()).hexdigest()


def rows_hash(dataset: Any) -> str:
    """Hash of the encoded training rows."""
    columns = [dataset["input_ids"][:], dataset["labels"][:]]
    return hashlib.sha256(json.dumps(columns).encode()).hexdigest()

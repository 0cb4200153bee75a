"""What every trainer of layercut is built with, whatever it learns."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from transformers import Trainer
from transformers.trainer_callback import PrinterCallback

from layercut.models.view import DecoderView
from layercut.recipe.finetune import FinetuneConfig
from layercut.recipe.heal import HealConfig

AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


def build_arguments(
    kind: Any,
    view: DecoderView,
    config: FinetuneConfig | HealConfig,
    folder: Path,
    **own: Any,
) -> Any:
    """The trainer's arguments: on the model's device, silent, with checkpoints if asked for.

    Args:
        kind: transformers' `TrainingArguments` or a subclass.
        view: the model.
        config: the recipe's section ``finetune`` or ``heal``.
        folder: where the trainer keeps its checkpoints.
        own: what this trainer alone takes.
    """
    on_cpu = view.device.type == "cpu"
    return kind(
        output_dir=str(folder),
        per_device_train_batch_size=config.batch_size,
        weight_decay=config.weight_decay,
        use_cache=view.model.config.use_cache,  # else the trainer edits the model's configuration
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        seed=config.seed or 0,
        save_strategy="no" if config.save_steps is None else "steps",
        save_steps=config.save_steps or 500,
        save_total_limit=1,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        **own,
    )


def build_quietly(build: Callable[[], AnyTrainer]) -> AnyTrainer:
    """What ``build`` returns, without its warning about an old name and without printed losses."""
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5.23 for a property by its old name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        trainer = build()
    trainer.remove_callback(PrinterCallback)
    return trainer

"""LoRA or full fine-tuning on a task's rows, through TRL and PEFT."""

from __future__ import annotations

import contextlib
import math
import statistics
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from layercut.data.tasks import TaskRow
from layercut.errors import RecipeError
from layercut.models.attention import eager
from layercut.models.check_method import require_resident
from layercut.models.view import DecoderView
from layercut.recipe.finetune import FinetuneConfig
from layercut.training.finetune_checks import check_rows, choice_tokens, pad_token
from layercut.training.finetune_trainer import CompletionTrainer
from layercut.training.lora_adapters import adapted_names, adapters_on, detach
from layercut.training.progress_callback import TrainingMonitor
from layercut.training.resume import (
    config_hash,
    last_checkpoint,
    model_hash,
    rows_hash,
    trainer_folder,
)
from layercut.training.trainers import build_arguments, build_quietly


@dataclass(frozen=True, slots=True)
class FinetuneResult:
    """What a fine-tuning run took.

    Attributes:
        n_rows: training rows.
        n_steps: optimiser steps of the whole run.
        resumed_at: step of the checkpoint it went on from; 0 for a run from the start.
        train_seconds: wall-clock time of all steps, those before that checkpoint included.
        loss: mean training loss over the last tenth of the steps, in nats per label.
    """

    n_rows: int
    n_steps: int
    resumed_at: int
    train_seconds: float
    loss: float


def finetune(
    view: DecoderView,
    rows: Sequence[TaskRow],
    config: FinetuneConfig | None = None,
    *,
    work_dir: Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    teacher: DecoderView | None = None,
    adapter_dir: Path | None = None,
    adapter_base: Path | None = None,
    log_dir: Path | None = None,
) -> FinetuneResult:
    """Train ``view.model`` in place and fold the adapters into its weights.

    Args:
        view: the model; a plain one again afterwards, with changed weights.
        rows: training rows.
        config: the recipe's section ``finetune``; default: GradPruner's values.
        work_dir: where checkpoints are kept; a run of the same model, rows and config that finds
            one there goes on from it. ``None``: no checkpoints.
        callbacks: further trainer callbacks.
        teacher: the model to distil from; needed with ``config.distill``.
        adapter_dir: where to save the adapter before it is folded in.
        adapter_base: the checkpoint that the saved adapter's configuration names.
        log_dir: where TensorBoard's records go with ``report_to: tensorboard``; default: ``runs``.

    Raises:
        DataError: a row cannot be learnt from, or there are too few.
        ModelError: the tokenizer has neither a padding nor an end-of-text token.
        OutputError: ``work_dir`` holds something else than layercut's checkpoints.
        RecipeError: config that do not suit the model.
        NumericsError: the loss became NaN or infinite.
    """
    require_resident(view, "fine-tuning")
    config = config or FinetuneConfig()
    watch = TrainingMonitor()
    with contextlib.ExitStack() as stack:
        folder, config = stack.enter_context(trainer_folder(work_dir, config))
        models = [model_hash(model) for model in (view, teacher) if model is not None]
        trainer = build_trainer(
            view, rows, config, output_dir=folder, callbacks=[watch, *callbacks], teacher=teacher
        )
        stack.callback(detach, view, trainer)
        longest = max(trainer.train_dataset["length"][:])
        for model in (view, teacher):
            if model is not None:
                stack.enter_context(eager(model, longest))
        _direct_records(trainer, log_dir or Path("runs"))
        contents = [*models, config_hash(config), rows_hash(trainer.train_dataset)]
        checkpoint = last_checkpoint(folder, contents)
        start = time.perf_counter()
        trainer.train(resume_from_checkpoint=checkpoint)
        seconds = watch.earlier_seconds + time.perf_counter() - start
        if adapter_dir is not None:
            _save_adapter(trainer.model, adapter_dir, adapter_base or view.path)
        if config.mode == "lora":
            trainer.model.merge_adapter()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    tail = losses[-max(1, len(losses) // 10) :] or [math.nan]
    return FinetuneResult(
        n_rows=len(rows),
        n_steps=trainer.state.global_step,
        resumed_at=watch.first_step,
        train_seconds=seconds,
        loss=statistics.fmean(tail),
    )


def build_trainer(
    view: DecoderView,
    rows: Sequence[TaskRow],
    config: FinetuneConfig,
    *,
    output_dir: Path,
    callbacks: Sequence[TrainerCallback] = (),
    teacher: DecoderView | None = None,
    examples: list[dict[str, Any]] | None = None,
) -> CompletionTrainer:
    """A TRL trainer over ``view.model``; give the model back with `detach`.

    Args:
        view: the model; in LoRA mode adapters are put into it, its own weights stay untouched.
        rows: training rows.
        config: the recipe's section ``finetune``.
        output_dir: where the trainer keeps its checkpoints.
        callbacks: further trainer callbacks.
        teacher: the model to distil from; needed with ``config.distill``.
        examples: instead of ``rows``, what `check_rows` makes of them.

    Raises:
        DataError: a row cannot be learnt from, or there are too few.
        ModelError: the tokenizer has neither a padding nor an end-of-text token.
        RecipeError: config that do not suit the model.
    """
    if (teacher is None) != (config.distill is None):
        raise RecipeError("finetune.distill and a teacher model go together. Give both or neither.")
    dataset = Dataset.from_list(examples or check_rows(view, rows, config))
    if view.tokenizer.pad_token_id is None:
        warnings.warn(
            f"the tokenizer of {view.name} has no padding token; the end-of-text token pads, "
            "masked from attention and loss.",
            stacklevel=2,
        )
    collator = DataCollatorForLanguageModeling(pad_token_id=pad_token(view))
    if config.mode == "full":
        view.model.requires_grad_(True)
    trainer = build_quietly(
        lambda: CompletionTrainer(
            model=view.model,
            args=_arguments(view, config, output_dir),
            train_dataset=dataset,
            processing_class=view.tokenizer,
            data_collator=collator,
            peft_config=adapters_on(view, config.lora) if config.mode == "lora" else None,
            callbacks=list(callbacks),
        )
    )
    trainer.distill, trainer.teacher = config.distill, teacher
    if config.distill is not None and config.distill.over == "choices":
        trainer.choices = torch.tensor(choice_tokens(rows, view.tokenizer), device=view.device)
    return trainer


def n_steps(config: FinetuneConfig, n_rows: int) -> int:
    """Optimiser steps of a run over ``n_rows`` rows in one process."""
    if config.max_steps is not None:
        return config.max_steps
    return math.ceil(config.epochs * math.ceil(n_rows / config.rows_per_step))


def _arguments(view: DecoderView, config: FinetuneConfig, output_dir: Path) -> Any:
    return build_arguments(
        SFTConfig,
        view,
        config,
        output_dir,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.rate,
        gradient_accumulation_steps=config.accumulation,
        warmup_steps=config.warmup_ratio,
        lr_scheduler_type=config.scheduler,
        max_length=None,  # `training_example` has cut the rows
        bf16=view.mixed_precision or view.model.dtype == torch.bfloat16,
        activation_checkpointing=False,
        report_to=config.report_to,
    )


def _direct_records(trainer: CompletionTrainer, folder: Path) -> None:
    """Keep TensorBoard's records out of the folder of the checkpoints, which does not stay."""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(folder)


def _save_adapter(model: Any, folder: Path, base: Path) -> None:
    peft_config = model.peft_config[model.active_adapter]
    peft_config.base_model_name_or_path = str(base)
    model.save_pretrained(folder, save_embedding_layers=False)


def trained_names(view: DecoderView, config: FinetuneConfig) -> list[str]:
    """Names of the tensors that fine-tuning changes, once the adapters are folded in."""
    if config.mode == "full":
        return list(view.model.state_dict())
    return adapted_names(view)

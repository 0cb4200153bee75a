"""The first steps of a LoRA fine-tuning run on the intact model, made for their gradients alone.

The run follows the learning-rate schedule of the whole fine-tuning that it is the start of, and the
optimiser really steps; afterwards the adapters are gone and the model is bit for bit what it was.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from transformers import TrainerCallback

from layercut import progress
from layercut.completion_trainer import CompletionTrainer
from layercut.data.tasks import TaskRow, read_rows
from layercut.finetune import build_trainer, detach
from layercut.finetune_settings import FinetuneSettings, LoraSettings
from layercut.gradient_log import GradientLog
from layercut.lora import lora_weights
from layercut.methods import MethodOptions
from layercut.models.view import DecoderView
from layercut.types import CalibrationBatches

EARLY_SHARE = 0.01
"""The paper's share of a run that is recorded; it sets the run's length where no data does."""

Count = Annotated[int, Field(ge=1)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]


class EarlyRunOptions(MethodOptions):
    """The run that is begun, GradPruner's by default, and how much of it is recorded.

    Without ``data`` the model learns the calibration text, one gradient group of it a step, as if
    in a run that is 100 times as long as the record; ``batch_size``, ``accumulation``, ``epochs``
    and ``max_length`` count for ``data`` only.
    """

    data: str | None = Field(default=None, description="rows of the task, as for finetune.data")
    steps: Count = Field(default=40, description="optimiser steps that are made and recorded")
    epochs: Positive = Field(default=3.0, description="passes over the rows in the whole run")
    max_steps: Count | None = Field(
        default=None, description="optimiser steps of the whole run; instead of epochs"
    )
    rank: Count = Field(default=8, description="rank of the adapters")
    alpha: Positive = Field(default=32, description="their scale is alpha / rank")
    learning_rate: Positive = Field(default=1e-4, description="peak of the whole run")
    batch_size: Count = Field(default=8, description="rows in memory at once")
    accumulation: Count = Field(default=8, description="batches behind one optimiser step")
    warmup_ratio: Share = Field(default=0.03, description="share of the whole run's steps")
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        default="linear", description="of the learning rate over the whole run"
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(default=0.1, description="of AdamW")
    max_length: Annotated[int, Field(ge=2)] = Field(default=512, description="tokens of a row")
    seed: int = Field(default=0, ge=0, lt=2**32, description="of data order and adapters")


def record(view: DecoderView, batches: CalibrationBatches, options: EarlyRunOptions) -> GradientLog:
    """The gradient factors of the run's first steps, for all layers that are not skipped.

    Args:
        view: the model; unchanged afterwards.
        batches: calibration text, learnt where ``options.data`` is ``None``.
        options: the run.

    Raises:
        DataError: the rows cannot be learnt from, or are too few.
        RecipeError: the run has fewer than ``options.steps`` steps.
        NumericsError: a gradient is missing or not finite.
    """
    if options.data is None:
        rows, settings = _calibration_rows(view, batches), _text_settings(view, batches, options)
    else:
        rows, settings = read_rows(options.data), _task_settings(options)
    log = GradientLog(steps=options.steps, stop=True)
    with _adapted(view, rows, settings, callbacks=[log, _Progress(options.steps)]) as trainer:
        trainer.train()
    return log


class _Progress(TrainerCallback):  # type: ignore[misc]
    """Counts the early steps, not those of the run that they begin."""

    def __init__(self, n_steps: int) -> None:
        self.n_steps = n_steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        progress.step(state.global_step, self.n_steps)


@contextmanager
def _adapted(
    view: DecoderView,
    rows: Sequence[TaskRow],
    settings: FinetuneSettings,
    *,
    callbacks: Sequence[TrainerCallback],
) -> Iterator[CompletionTrainer]:
    """A trainer of adapters in ``view.model``, which are taken out again."""
    with tempfile.TemporaryDirectory(prefix="layercut-early-") as scratch, torch.random.fork_rng():
        torch.manual_seed(settings.seed or 0)
        folder = Path(scratch)
        trainer = build_trainer(view, rows, settings, output_dir=folder, callbacks=callbacks)
        try:
            # No gradient reaches a skipped layer; its adapters are neither trained nor recorded.
            for weight in lora_weights(trainer.model):
                if weight.layer in view.skipped:
                    weight.a.requires_grad_(False)
                    weight.b.requires_grad_(False)
            yield trainer
        finally:
            detach(view, trainer)


def _calibration_rows(view: DecoderView, batches: CalibrationBatches) -> list[TaskRow]:
    """Each window as a text that is to be learnt from its first token on."""
    texts = view.tokenizer.batch_decode(batches.input_ids)
    return [
        TaskRow(prompt="", choices=(text,), where=f"calibration window {number}")
        for number, text in enumerate(texts, start=1)
    ]


def _text_settings(
    view: DecoderView, batches: CalibrationBatches, options: EarlyRunOptions
) -> FinetuneSettings:
    group = min(batches.gradient_batch, batches.n_sequences)
    batch_size = min(batches.micro_batch, group)
    changes = {
        "batch_size": batch_size,
        "accumulation": group // batch_size,
        "max_steps": options.max_steps or round(options.steps / EARLY_SHARE),
        "max_length": int(view.model.config.max_position_embeddings),
    }
    return _task_settings(options).model_copy(update=changes)


def _task_settings(options: EarlyRunOptions) -> FinetuneSettings:
    return FinetuneSettings(
        mode="lora",
        epochs=options.epochs,
        max_steps=options.max_steps,
        learning_rate=options.learning_rate,
        batch_size=options.batch_size,
        accumulation=options.accumulation,
        warmup_ratio=options.warmup_ratio,
        scheduler=options.scheduler,
        weight_decay=options.weight_decay,
        max_length=options.max_length,
        lora=LoraSettings(rank=options.rank, alpha=options.alpha),
        save_steps=None,
        seed=options.seed,
    )

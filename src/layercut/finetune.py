"""LoRA or full fine-tuning on a task's rows, through TRL and PEFT."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from layercut.completion_trainer import CompletionTrainer, Watch
from layercut.data.encoding import training_example
from layercut.data.tasks import TaskRow, check_classes
from layercut.errors import DataError, ModelError, RecipeError
from layercut.finetune_settings import FinetuneSettings
from layercut.models.view import DecoderView
from layercut.resume import last_checkpoint, rows_hash, settings_hash, weights_hash

__all__ = [
    "FinetuneSettings",
    "Tuning",
    "build_trainer",
    "check_rows",
    "detach",
    "n_steps",
    "trained_names",
    "tune",
]


@dataclass(frozen=True, slots=True)
class Tuning:
    """What a fine-tuning run took.

    Attributes:
        n_rows: training rows.
        n_steps: optimiser steps of the whole run.
        resumed_at: step of the checkpoint it went on from; 0 for a run from the start.
        train_seconds: wall-clock time of the steps since then.
        loss: mean training loss over the last tenth of the steps, in nats per label.
    """

    n_rows: int
    n_steps: int
    resumed_at: int
    train_seconds: float
    loss: float


def tune(
    view: DecoderView,
    rows: Sequence[TaskRow],
    settings: FinetuneSettings | None = None,
    *,
    work_dir: Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    teacher: DecoderView | None = None,
    adapter_dir: Path | None = None,
    adapter_base: Path | None = None,
) -> Tuning:
    """Train ``view.model`` in place and fold the adapters into its weights.

    Args:
        view: the model; a plain one again afterwards, with changed weights.
        rows: training rows.
        settings: the recipe's section ``finetune``; default: GradPruner's values.
        work_dir: where checkpoints are kept; a run of the same model, rows and settings that finds
            one there goes on from it. ``None``: no checkpoints.
        callbacks: further trainer callbacks.
        teacher: the model to distil from; needed with ``settings.distill``.
        adapter_dir: where to save the adapter before it is folded in.
        adapter_base: the checkpoint that the saved adapter's configuration names.

    Raises:
        DataError: a row cannot be learnt from, or there are too few.
        ModelError: the tokenizer has neither a padding nor an end-of-text token.
        RecipeError: settings that do not suit the model.
        NumericsError: the loss became NaN or infinite.
    """
    settings = settings or FinetuneSettings()
    watch = Watch()
    with contextlib.ExitStack() as stack:
        if work_dir is None:
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="layercut-tune-"))
            settings = settings.model_copy(update={"save_steps": None})
        folder = Path(scratch) if work_dir is None else work_dir
        models = [weights_hash(model) for model in (view, teacher) if model is not None]
        trainer = build_trainer(
            view, rows, settings, output_dir=folder, callbacks=[watch, *callbacks], teacher=teacher
        )
        stack.callback(detach, view, trainer)
        contents = [*models, settings_hash(settings), rows_hash(trainer.train_dataset)]
        checkpoint = last_checkpoint(folder, contents)
        start = time.perf_counter()
        trainer.train(resume_from_checkpoint=checkpoint)
        seconds = time.perf_counter() - start
        if adapter_dir is not None:
            _save_adapter(trainer.model, adapter_dir, adapter_base or view.path)
        if settings.mode == "lora":
            trainer.model.merge_adapter()
    tail = watch.losses[-max(1, len(watch.losses) // 10) :] or [math.nan]
    return Tuning(
        n_rows=len(rows),
        n_steps=trainer.state.global_step,
        resumed_at=watch.first_step,
        train_seconds=seconds,
        loss=statistics.fmean(tail),
    )


def build_trainer(
    view: DecoderView,
    rows: Sequence[TaskRow],
    settings: FinetuneSettings,
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
        settings: the recipe's section ``finetune``.
        output_dir: where the trainer keeps its checkpoints.
        callbacks: further trainer callbacks.
        teacher: the model to distil from; needed with ``settings.distill``.
        examples: instead of ``rows``, what `check_rows` makes of them.

    Raises:
        DataError: a row cannot be learnt from, or there are too few.
        ModelError: the tokenizer has neither a padding nor an end-of-text token.
        RecipeError: settings that do not suit the model.
    """
    if (teacher is None) != (settings.distill is None):
        raise RecipeError("finetune.distill and a teacher model go together. Give both or neither.")
    dataset = Dataset.from_list(examples or check_rows(view, rows, settings))
    collator = DataCollatorForLanguageModeling(pad_token_id=_pad_token(view))
    if settings.mode == "full":
        view.model.requires_grad_(True)
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5.23 for a property by its old name.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        trainer = CompletionTrainer(
            model=view.model,
            args=_arguments(view, settings, output_dir),
            train_dataset=dataset,
            processing_class=view.tokenizer,
            data_collator=collator,
            peft_config=_adapters(view, settings) if settings.mode == "lora" else None,
            callbacks=list(callbacks),
        )
    trainer.remove_callback(PrinterCallback)
    trainer.distill, trainer.teacher = settings.distill, teacher
    return trainer


def check_rows(
    view: DecoderView, rows: Sequence[TaskRow], settings: FinetuneSettings
) -> list[dict[str, Any]]:
    """Every row as ``input_ids``, ``labels`` and ``length``, or a refusal before the long work.

    Raises:
        DataError: too few rows, a class without rows, or a row that cannot be learnt from.
        RecipeError: the model is too narrow, or its context too short, for the settings.
    """
    if settings.mode == "full" and view.model.dtype != torch.float32:
        raise RecipeError(
            f"finetune.mode: full would lose its small steps in {view.model.dtype} weights. "
            "Set dtype: float32, or finetune.mode: lora."
        )
    if settings.report_to != "none" and importlib.util.find_spec(settings.report_to) is None:
        raise RecipeError(
            f"finetune.report_to: {settings.report_to} is not installed. "
            f'Run: pip install "layercut[{settings.report_to}]", or set it to none.'
        )
    context = int(view.model.config.max_position_embeddings)
    if settings.max_length > context:
        raise RecipeError(
            f"finetune.max_length is {settings.max_length}, but the model's context is {context} "
            "tokens. Lower it."
        )
    if len(rows) < settings.rows_per_step:
        raise DataError(
            f"{len(rows)} training row(s) are fewer than one step's {settings.rows_per_step} "
            f"(batch_size {settings.batch_size} × accumulation {settings.accumulation}). "
            "Use more rows, or lower finetune.batch_size or finetune.accumulation."
        )
    check_classes(rows)
    return [training_example(row, view.tokenizer, settings.max_length) for row in rows]


def detach(view: DecoderView, trainer: CompletionTrainer) -> None:
    """Make ``view.model`` a plain, frozen model again, without adapters; its own weights stay."""
    if hasattr(view.model, "peft_config"):
        trainer.model.unload()
    # TRL and accelerate wrap `forward` per instance; the plain model's is its class's.
    for name in ("forward", "_original_forward", "_is_accelerate_prepared", "model_tags"):
        vars(view.model).pop(name, None)
    view.model.eval().requires_grad_(False)
    view.model.zero_grad(set_to_none=True)


def n_steps(settings: FinetuneSettings, n_rows: int) -> int:
    """Optimiser steps of a run over ``n_rows`` rows in one process."""
    if settings.max_steps is not None:
        return settings.max_steps
    return math.ceil(settings.epochs * math.ceil(n_rows / settings.rows_per_step))


def _arguments(view: DecoderView, settings: FinetuneSettings, output_dir: Path) -> SFTConfig:
    on_cpu = view.device.type == "cpu"
    return SFTConfig(
        output_dir=str(output_dir),
        num_train_epochs=settings.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=settings.rate,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.accumulation,
        warmup_steps=settings.warmup_ratio,
        lr_scheduler_type=settings.scheduler,
        weight_decay=settings.weight_decay,
        max_length=None,  # `training_example` has cut the rows
        bf16=view.mixed_precision or view.model.dtype == torch.bfloat16,
        activation_checkpointing=False,
        use_cache=view.model.config.use_cache,  # else the trainer edits the model's configuration
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
        seed=settings.seed or 0,
        report_to=settings.report_to,
        save_strategy="no" if settings.save_steps is None else "steps",
        save_steps=settings.save_steps or 500,
        save_total_limit=1,
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
    )


def _adapters(view: DecoderView, settings: FinetuneSettings) -> LoraConfig:
    weights = trained_names(view, settings)
    modules = {name.removesuffix(".weight").rpartition(".")[2] for name in weights}
    return LoraConfig(
        r=settings.lora.rank,
        lora_alpha=settings.lora.alpha,
        lora_dropout=settings.lora.dropout,
        target_modules=sorted(modules),
        task_type="CAUSAL_LM",
    )


def _save_adapter(model: Any, folder: Path, base: Path) -> None:
    config = model.peft_config[model.active_adapter]
    config.base_model_name_or_path = str(base)
    model.save_pretrained(folder, save_embedding_layers=False)


def trained_names(view: DecoderView, settings: FinetuneSettings) -> list[str]:
    """Names of the tensors that fine-tuning changes, once the adapters are folded in."""
    if settings.mode == "full":
        return list(view.model.state_dict())
    return [name for layer in range(view.n_layers) for name in view.linear_weights(layer)]


def _pad_token(view: DecoderView) -> int:
    if (pad := view.tokenizer.pad_token_id) is not None:
        return int(pad)
    if (end := view.tokenizer.eos_token_id) is not None:
        warnings.warn(
            f"the tokenizer of {view.name} has no padding token; the end-of-text token pads, "
            "masked from attention and loss.",
            stacklevel=2,
        )
        return int(end)
    raise ModelError(
        f"the tokenizer of {view.name} has neither a padding nor an end-of-text token. "
        "Add a pad_token to its tokenizer_config.json."
    )

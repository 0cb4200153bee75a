"""The first steps of a LoRA fine-tuning run on the intact model, made for their gradients alone.

The run follows the learning-rate schedule of the whole fine-tuning that it is the start of, and the
optimiser really steps; afterwards the adapters are gone and the model is bit for bit what it was.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from transformers import TrainerCallback

from layercut import progress
from layercut.data.encoding import IGNORED
from layercut.data.tasks import read_rows
from layercut.errors import DataError, ModelError, RecipeError
from layercut.gradients.log import GradientLog
from layercut.gradients.lora_weights import lora_weights
from layercut.models.attention import eager
from layercut.models.view import DecoderView
from layercut.recipe.base import Count, Positive
from layercut.recipe.finetune import AdapterConfig, AdapterFields, FinetuneConfig, RunFields
from layercut.registry import MethodOptions
from layercut.training.finetune import build_trainer, n_steps
from layercut.training.finetune_checks import check_rows
from layercut.training.finetune_trainer import CompletionTrainer
from layercut.training.lora_adapters import detach, list_not_adapted
from layercut.types import CalibrationBatches

EARLY_SHARE = 0.01
"""The paper's share of a run that is recorded; it sets the run's length where no data does."""

PROBED_EVERY = 8
MOST_PROBED = 64
"""Examples that judge a probe: one of so many, and so many at most."""

Example = dict[str, Any]


class EarlyRunOptions(RunFields, AdapterFields, MethodOptions):
    """The run that is begun, GradPruner's by default, and how much of it is recorded.

    Without ``data`` the model learns the calibration text, one gradient group of it a step, as if
    in a run that is 100 times as long as the record; ``batch_size``, ``accumulation``, ``epochs``
    and ``max_length`` count for ``data`` only.
    """

    data: str | None = Field(default=None, description="rows of the task, as for finetune.data")
    steps: Count = Field(default=40, description="optimiser steps that are made and recorded")
    learning_rate: Positive = Field(default=1e-4, description="peak of the whole run")
    seed: int = Field(default=0, ge=0, lt=2**32, description="of data order and adapters")


def check_early_run(
    view: DecoderView, batches: CalibrationBatches, options: EarlyRunOptions
) -> None:
    """Refuse a run that cannot be made, before any long work.

    Raises:
        DataError: the rows cannot be learnt from, or are too few.
        ModelError: the model has weights that adapters do not reach.
        RecipeError: the run has fewer than ``options.steps`` steps, or does not suit the model.
    """
    _check_adapted(view)
    examples, config = _prepare_examples(view, batches, options)
    if options.steps > (n_run := n_steps(config, len(examples))):
        raise RecipeError(
            f"the early run is to record {options.steps} steps, but the run it begins has only "
            f"{n_run} optimiser steps. Lower its steps, or raise its epochs."
        )


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
    _check_adapted(view)
    examples, config = _prepare_examples(view, batches, options)
    log = GradientLog(steps=options.steps, stop=True)
    callbacks = [log, _Progress(options.steps)]
    longest = max(example["length"] for example in examples)
    with (
        adapted_model(view, examples, config, callbacks=callbacks) as trainer,
        eager(view, longest),
    ):
        trainer.train()
    return log


def prepare_probe(
    view: DecoderView, batches: CalibrationBatches, options: EarlyRunOptions, n_steps: int
) -> Callable[[], Tensor]:
    """What tunes the model as it is at the time of the call, and judges it; it is unchanged then.

    Args:
        view: the model.
        batches: calibration text, learnt where ``options.data`` is ``None``.
        options: the run whose first steps are made.
        n_steps: how many.

    Returns:
        A function without arguments: the loss of every held-out example, (n,), nats a label, after
        those steps on the others.

    Raises:
        DataError: the rows cannot be learnt from, or are too few.
    """
    examples, config = _prepare_examples(view, batches, options)
    every = min(PROBED_EVERY, len(examples))
    judged = examples[every - 1 :: every][:MOST_PROBED]
    learned = [e for i, e in enumerate(examples) if i % every != every - 1] or examples
    longest = max(example["length"] for example in examples)

    def probe() -> Tensor:
        callbacks = [_StopAfter(n_steps), _Progress(n_steps)]
        with (
            adapted_model(view, learned, config, callbacks=callbacks) as trainer,
            eager(view, longest),
        ):
            trainer.train()
            trainer.model.eval()
            return torch.stack([_judge(view, trainer, example) for example in judged])

    return probe


@torch.no_grad()
def _judge(view: DecoderView, trainer: CompletionTrainer, example: Example) -> Tensor:
    """Mean loss of one example's labels, ()."""
    keys = "input_ids", "labels"
    inputs = {key: torch.tensor([example[key]], device=view.device) for key in keys}
    with view.precision():
        loss: Tensor = trainer.compute_loss(trainer.model, inputs)
    return loss.detach().float().cpu()


class _StopAfter(TrainerCallback):  # type: ignore[misc]
    """Ends a run early; its schedule stays that of the whole run."""

    def __init__(self, n_steps: int) -> None:
        self.n_steps = n_steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.n_steps


class _Progress(TrainerCallback):  # type: ignore[misc]
    """Counts the early steps, not those of the run that they begin."""

    def __init__(self, n_steps: int) -> None:
        self.n_steps = n_steps

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        progress.step(state.global_step, self.n_steps)


@contextmanager
def adapted_model(
    view: DecoderView,
    examples: list[Example],
    config: FinetuneConfig,
    *,
    callbacks: Sequence[TrainerCallback],
) -> Iterator[CompletionTrainer]:
    """A trainer of adapters in ``view.model``, which are taken out again."""
    with tempfile.TemporaryDirectory(prefix="layercut-early-") as scratch, torch.random.fork_rng():
        torch.manual_seed(config.seed or 0)
        folder = Path(scratch)
        trainer = build_trainer(
            view, (), config, output_dir=folder, callbacks=callbacks, examples=examples
        )
        try:
            # No gradient reaches a skipped layer; its adapters are neither trained nor recorded.
            for weight in lora_weights(trainer.model):
                if weight.layer in view.skipped:
                    weight.a.requires_grad_(False)
                    weight.b.requires_grad_(False)
            yield trainer
        finally:
            detach(view, trainer)


def _check_adapted(view: DecoderView) -> None:
    weights = (name for layer in range(view.n_layers) for name in view.expert_weights(layer))
    if (name := next(weights, None)) is not None:
        raise ModelError(
            f"{name} of this {view.layout.model_type} model holds several linear maps (experts, or "
            "gates by head), which LoRA adapters do not reach: their gradients would be missing. "
            "Choose another scoring method, and another recovery than sign-merge."
        )
    if names := list_not_adapted(view):
        raise ModelError(
            f"{names[0]} of this {view.layout.model_type} model cannot have LoRA adapters, because "
            "fused kernels pass them over: its gradients would be missing. Choose another scoring "
            "method, and another recovery than sign-merge."
        )


def _prepare_examples(
    view: DecoderView, batches: CalibrationBatches, options: EarlyRunOptions
) -> tuple[list[Example], FinetuneConfig]:
    """What is learnt, as `check_rows` has it, and how."""
    if options.data is None:
        return _windows(batches), _text_settings(batches, options)
    config = _task_settings(options)
    try:
        return check_rows(view, read_rows(options.data), config), config
    except (DataError, RecipeError) as error:
        # The rows are checked as those of `finetune` are, whose keys the message names.
        raise type(error)(str(error).replace("finetune.", "the early run's ")) from None


def _windows(batches: CalibrationBatches) -> list[Example]:
    """Each window of calibration text as it stands, learnt from its second token on."""
    return [
        {
            "input_ids": ids,
            "labels": [IGNORED] * batches.n_unscored + ids[batches.n_unscored :],
            "length": len(ids),
        }
        for ids in batches.input_ids.tolist()
    ]


def _text_settings(batches: CalibrationBatches, options: EarlyRunOptions) -> FinetuneConfig:
    group = min(batches.gradient_batch, batches.n_sequences)
    # Only a divisor of the group leaves none of its sequences out of the step.
    batch_size = max(n for n in range(1, group + 1) if group % n == 0 and n <= batches.micro_batch)
    changes = {
        "batch_size": batch_size,
        "accumulation": group // batch_size,
        "max_steps": options.max_steps or round(options.steps / EARLY_SHARE),
    }
    return _task_settings(options).model_copy(update=changes)


def _task_settings(options: EarlyRunOptions) -> FinetuneConfig:
    shared = options.model_dump(include=set(RunFields.model_fields))
    lora = AdapterConfig(rank=options.rank, alpha=options.alpha)
    return FinetuneConfig(mode="lora", lora=lora, save_steps=None, seed=options.seed, **shared)

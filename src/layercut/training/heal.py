"""A short distillation of a pruned model from the dense one, folded into its weights."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

from layercut.errors import RecipeError
from layercut.models.attention import eager
from layercut.models.check_method import require_resident
from layercut.models.view import DecoderView
from layercut.recipe.heal import HealConfig
from layercut.training.distillation_loss import Divergence
from layercut.training.heal_trainer import BestCheckpointCallback, HealTrainer, TrainingSchedule
from layercut.training.heal_windows import check_windows, hold_out
from layercut.training.lora_adapters import adapters_on, detach
from layercut.training.resume import config_hash, last_checkpoint, model_hash, trainer_folder
from layercut.training.trainers import build_arguments, build_quietly


@dataclass(frozen=True, slots=True)
class HealResult:
    """What a heal took and brought.

    Attributes:
        n_windows: windows that there were to train on.
        n_steps: optimiser steps.
        n_tokens: tokens trained on, those seen twice counted twice.
        resumed_at: step of the checkpoint it went on from; 0 for a run from the start.
        train_seconds: wall-clock time, that before the checkpoint included.
        losses: (step, held-out loss in nats per token) of every evaluation, the start's first.
        stopped_early: the held-out loss had not become better for too long.
    """

    n_windows: int
    n_steps: int
    n_tokens: int
    resumed_at: int
    train_seconds: float
    losses: tuple[tuple[int, float], ...]
    stopped_early: bool

    @property
    def best_step(self) -> int:
        """After this step the weights were best, and were kept; 0: they are as they were."""
        return min(self.losses, key=lambda pair: pair[1])[0]

    @property
    def loss_before(self) -> float:
        """The held-out loss before."""
        return self.losses[0][1]

    @property
    def loss_after(self) -> float:
        """The held-out loss of the weights that were kept."""
        return min(loss for _, loss in self.losses)

    def to_json(self) -> dict[str, Any]:
        """The object ``heal`` of ``result.json``."""
        figures = {name: getattr(self, name) for name in ("loss_before", "loss_after", "best_step")}
        return figures | asdict(self)


def heal(
    view: DecoderView,
    teacher: DecoderView,
    windows: Tensor,
    config: HealConfig,
    *,
    work_dir: Path | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> HealResult:
    """Train ``view.model`` in place towards ``teacher``, and fold the adapters into its weights.

    What is best on held-out windows is kept. Where nothing is better than the start, the weights
    are the very same afterwards. The learning rate, and the end, follow the share of the steps or
    minutes that is spent. Minutes count from the first pass on, over resumptions, and are exceeded
    by one step at most.

    Args:
        view: the pruned model; a plain one again afterwards, with changed linear weights.
        teacher: the intact model; unchanged.
        windows: (n, seq) token ids; every few of them are held out.
        config: the recipe's section ``heal``.
        work_dir: where checkpoints are kept; a run of the same models, windows and config that
            finds one there goes on from it. ``None``: no checkpoints.
        callbacks: further trainer callbacks.

    Raises:
        DataError: too few windows, or tokens that the model has not.
        OutputError: ``work_dir`` holds something else than layercut's checkpoints.
        RecipeError: windows longer than the context, or a teacher of another vocabulary.
        NumericsError: the loss became NaN or infinite.
    """
    require_resident(view, "a heal")
    check_windows(view, windows, config)
    _check_teacher(view, teacher)
    training, held_out = hold_out(windows, config.held_out)
    divergence = Divergence(view, teacher, config.temperature, config.label_weight)
    with contextlib.ExitStack() as stack:
        folder, config = stack.enter_context(trainer_folder(work_dir, config))
        hashes = [model_hash(view), model_hash(teacher), config_hash(config), _hash(windows)]
        schedule = TrainingSchedule(config)
        best = BestCheckpointCallback(divergence, held_out, config, schedule, folder)
        length = windows.shape[1]
        with (
            bfloat16_weights(view),
            bfloat16_weights(teacher),
            eager(view, length),
            eager(teacher, length),
        ):
            trainer = _trainer(view, training, config, folder, [schedule, best, *callbacks])
            stack.callback(detach, view, trainer)
            trainer.divergence, trainer.heal_config = divergence, config
            trainer.schedule, trainer.best_checkpoint, trainer.teacher_states = schedule, best, {}
            trainer.train(resume_from_checkpoint=last_checkpoint(folder, hashes))
            seconds = schedule.seconds
        if best.best_step:
            best.restore(trainer.model)
            trainer.model.merge_adapter()
        else:
            warnings.warn(
                "the heal never lowered the held-out loss; the weights stay as they were. Give it "
                "longer, or lower heal.learning_rate.",
                stacklevel=2,
            )
    return HealResult(
        n_windows=len(training),
        n_steps=trainer.state.global_step,
        n_tokens=trainer.state.global_step * config.batch_size * windows.shape[1],
        resumed_at=schedule.first_step,
        train_seconds=seconds,
        losses=tuple(best.losses),
        stopped_early=best.stopped_early,
    )


@contextlib.contextmanager
def bfloat16_weights(view: DecoderView) -> Iterator[None]:
    """Hold the matrices of a model that computes in mixed precision in bfloat16 inside the block.

    Autocast would make the same numbers of them in every step; those of the head, which it makes
    anew for every chunk, cost more than their products. The embedding and the norms stay as they
    are, and the matrices are the very same afterwards.
    """
    if not view.mixed_precision:
        yield
        return
    head = view.model.get_output_embeddings()
    tied = head.weight
    weights = [
        module.weight for i in range(view.n_layers) for module in view.linear_modules(i).values()
    ]
    wide = [weight.data for weight in weights]
    for weight in weights:
        weight.data = weight.data.bfloat16()
    head.weight = nn.Parameter(tied.data.bfloat16(), requires_grad=False)
    try:
        yield
    finally:
        head.weight = tied
        for weight, data in zip(weights, wide, strict=True):
            weight.data = data


def _trainer(
    view: DecoderView,
    windows: Tensor,
    config: HealConfig,
    folder: Path,
    callbacks: list[TrainerCallback],
) -> HealTrainer:
    torch.manual_seed(config.seed or 0)  # of the adapters, which are drawn before the trainer is
    return build_quietly(
        lambda: HealTrainer(
            model=get_peft_model(view.model, adapters_on(view, config.lora)),
            args=build_arguments(
                TrainingArguments,
                view,
                config,
                folder,
                max_steps=callbacks[0].max_steps,
                learning_rate=config.learning_rate,
                dataloader_drop_last=True,
                remove_unused_columns=False,
                label_names=[],
                report_to="none",
            ),
            train_dataset=[{"input_ids": ids, "window": i} for i, ids in enumerate(windows)],
            callbacks=callbacks,
        )
    )


def _check_teacher(view: DecoderView, teacher: DecoderView) -> None:
    ours, theirs = (
        int(one.model.get_output_embeddings().weight.shape[0]) for one in (view, teacher)
    )
    if ours != theirs:
        raise RecipeError(
            f"the model has {ours} words and its teacher {theirs}. Take the model it was cut from."
        )


def _hash(windows: Tensor) -> str:
    return hashlib.sha256(windows.numpy().tobytes()).hexdigest()

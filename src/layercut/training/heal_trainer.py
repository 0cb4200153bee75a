"""transformers' trainer with the loss of a heal, its schedule, and its held-out evaluations."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from layercut import progress
from layercut.errors import NumericsError
from layercut.recipe.heal import HealConfig
from layercut.training.distillation_loss import Divergence
from layercut.training.progress_callback import TrainingMonitor

ENDLESS = 1_000_000_000
"""Steps of a trainer that the clock stops."""

TEACHER_STATES_BYTES = 2**30
"""Memory for the teacher's states: a quarter of a step's time in every pass but the first."""


class TrainingSchedule(TrainingMonitor):
    """How much of the steps or minutes is spent.

    Attributes:
        reserve: seconds at the end that the last evaluation needs.
    """

    def __init__(self, config: HealConfig) -> None:
        super().__init__("heal")
        self.config = config
        self.reserve = 0.0

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the run so far."""
        kept: dict[str, Any] = super().state()
        kept["attributes"]["reserve"] = self.reserve
        return kept

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note where the run begins."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.first_step:
            kept = state.stateful_callbacks[type(self).__name__]
            self.reserve = kept["attributes"]["reserve"]

    def share(self, step: int) -> float:
        """The part that is spent after ``step`` steps, 0 to 1."""
        if self.config.minutes is None:
            return min(1.0, step / self.max_steps)
        return min(1.0, self.seconds / max(1e-9, 60 * self.config.minutes - self.reserve))

    @property
    def max_steps(self) -> int:
        """Steps after which training stops in any case."""
        return self.config.steps or ENDLESS

    def report(self, state: Any) -> None:
        """Say how much of the schedule is spent."""
        if self.config.minutes is None:
            super().report(state)
        else:
            total = round(60 * self.config.minutes)
            progress.step(min(round(self.seconds), total), total)


def rate(share: float, config: HealConfig) -> float:
    """The learning rate as a part of its peak, after ``share`` of the schedule."""
    if share < config.warmup_ratio:
        return share / config.warmup_ratio
    rest = (1 - share) / (1 - config.warmup_ratio)
    if config.scheduler == "linear":
        return rest
    return 1.0 if config.scheduler == "constant" else (1 - math.cos(math.pi * rest)) / 2


class BestCheckpointCallback(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Measures the loss on held-out windows, keeps the best adapters, ends the training.

    Attributes:
        losses: (step, held-out loss in nats per token) of every evaluation, the start's first.
        stopped_early: no evaluation of the last ``patience`` was the best.
    """

    def __init__(
        self,
        divergence: Divergence,
        windows: Tensor,
        config: HealConfig,
        schedule: TrainingSchedule,
        folder: Path,
    ) -> None:
        self.losses: list[tuple[int, float]] = []
        self.stopped_early = False
        self._divergence = divergence
        self._windows = windows.split(config.batch_size)
        self._teacher_states: list[Tensor] = []
        self._config = config
        self._schedule = schedule
        self._folder = folder
        self._best: dict[str, Tensor] = {}

    @property
    def best_step(self) -> int:
        """The step after which the loss was lowest; 0: before any training."""
        return min(self.losses, key=lambda pair: pair[1])[0]

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the evaluations so far."""
        return {"args": {}, "attributes": {"losses": self.losses}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate the start, or recall the evaluations of the run that is resumed."""
        self._teacher_states = [
            self._divergence.compute_teacher_states(ids) for ids in self._windows
        ]
        if state.global_step:
            kept = state.stateful_callbacks[type(self).__name__]["attributes"]
            self.losses = [(step, loss) for step, loss in kept["losses"]]
            if self.best_step:
                self._best = load_file(self._file(self.best_step))
        else:
            self._measure(kwargs["model"], 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Evaluate when it is time, and see whether to go on."""
        step = state.global_step
        share = self._schedule.share(step)
        if share >= min(1.0, len(self.losses) / self._config.evaluations):
            self._measure(kwargs["model"], step)
        if self.is_over(step):
            control.should_training_stop = True
            control.should_save = self._config.save_steps is not None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the adapters that no checkpoint needs any more."""
        for file in self._folder.glob("best-*.safetensors"):
            if file != self._file(self.best_step):
                file.unlink()

    def is_over(self, step: int) -> bool:
        """Whether the schedule is spent, or nothing has become better for too long."""
        steps = [s for s, _ in self.losses]
        since = len(steps) - 1 - steps.index(self.best_step)
        self.stopped_early = since >= self._config.patience
        return self.stopped_early or self._schedule.share(step) >= 1

    def restore(self, model: Any) -> None:
        """Put the best adapters back."""
        with torch.no_grad():
            for name, parameter in _trained_state(model).items():
                parameter.copy_(self._best[name])

    @torch.no_grad()
    def _measure(self, model: Any, step: int) -> None:
        before = self._schedule.seconds
        was_training = model.training
        model.eval()
        pairs = zip(self._windows, self._teacher_states, strict=True)
        summed = sum(len(ids) * float(self._divergence(ids, states)) for ids, states in pairs)
        model.train(was_training)
        loss = summed / sum(len(ids) for ids in self._windows)
        if not math.isfinite(loss):
            raise NumericsError(
                f"the held-out loss is {loss} at step {step}. Lower heal.learning_rate, or use "
                "dtype: float32."
            )
        self.losses.append((step, loss))
        progress.status(f"held-out loss {self.losses[0][1]:.3f} → {loss:.3f}")
        if step and self.best_step == step:
            self._best = {name: p.detach().clone() for name, p in _trained_state(model).items()}
            if self._config.save_steps is not None:
                save_file(self._best, self._file(step))
        # The longest one so far, so that the share that is spent never falls.
        self._schedule.reserve = max(self._schedule.reserve, self._schedule.seconds - before)

    def _file(self, step: int) -> Path:
        return self._folder / f"best-{step}.safetensors"


class HealTrainer(Trainer):  # type: ignore[misc]
    """A trainer of adapters against the dense model's distribution, within a schedule.

    Attributes:
        divergence: the loss.
        heal_config: the recipe's section ``heal``.
        schedule: what the learning rate follows.
        best_checkpoint: what ends the training.
        teacher_states: of windows that were trained on, for when they come again.
    """

    divergence: Divergence
    heal_config: HealConfig
    schedule: TrainingSchedule
    best_checkpoint: BestCheckpointCallback
    teacher_states: dict[int, Tensor]

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """Mean loss of one step's windows, in nats per token."""
        ids, window = inputs["input_ids"], inputs["window"].tolist()
        if all(index in self.teacher_states for index in window):
            return self.divergence(
                ids, torch.stack([self.teacher_states[index] for index in window])
            )
        states = self.divergence.compute_teacher_states(ids)
        if (len(self.teacher_states) + len(window)) * states[0].nbytes <= TEACHER_STATES_BYTES:
            self.teacher_states |= dict(zip(window, states, strict=True))
        return self.divergence(ids, states)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> LambdaLR:
        """The learning rate over the share of the schedule that is spent."""
        chosen: Optimizer = optimizer or self.optimizer
        self.lr_scheduler = LambdaLR(
            chosen, lambda step: rate(self.schedule.share(step), self.heal_config)
        )
        return self.lr_scheduler

    def _run_epoch(self, *arguments: Any, **options: Any) -> None:
        # transformers would take a further step of a run that had ended within an epoch.
        if self.state.global_step and self.best_checkpoint.is_over(self.state.global_step):
            self.control.should_training_stop = True
            return
        super()._run_epoch(*arguments, **options)


def _trained_state(model: Any) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}

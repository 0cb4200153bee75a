"""What layercut adds to every training by a trainer: progress, seconds, and a finite loss."""

from __future__ import annotations

import math
import time
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from layercut import progress
from layercut.errors import NumericsError


class TrainingMonitor(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Reports progress, counts seconds over resumptions, stops a run whose loss is no number.

    Attributes:
        section: the recipe's section that the training belongs to.
        first_step: optimiser step the run began at, above 0 after a resumption.
        earlier_seconds: what the steps before that took.
    """

    def __init__(self, section: str = "finetune") -> None:
        self.section = section
        self.first_step = 0
        self.earlier_seconds = 0.0
        self._began: float | None = None

    @property
    def seconds(self) -> float:
        """Wall-clock time of the training so far, its parts before a resumption included."""
        if self._began is None:
            return self.earlier_seconds
        return self.earlier_seconds + time.perf_counter() - self._began

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the run so far."""
        return {"args": {}, "attributes": {"earlier_seconds": self.seconds}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note where the run begins."""
        self.first_step = state.global_step
        self._began = time.perf_counter()
        if self.first_step:
            kept = state.stateful_callbacks[type(self).__name__]
            self.earlier_seconds = kept["attributes"]["earlier_seconds"]
        self.report(state)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report the step."""
        self.report(state)

    def report(self, state: Any) -> None:
        """Say how much of the training is done."""
        progress.step(state.global_step, state.max_steps)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any
    ) -> None:
        """Look at the step's loss.

        Raises:
            NumericsError: it is NaN or infinite.
        """
        loss = logs.get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            raise NumericsError(
                f"the training loss is {loss} at step {state.global_step}. Lower "
                f"{self.section}.learning_rate, or use dtype: float32."
            )
        progress.status(f"loss {loss:.3f}")

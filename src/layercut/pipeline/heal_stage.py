"""The heal as a stage of a run: its windows, its checkpoints, its figures."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercut.checkpoints.patch import tuned_patch
from layercut.evaluation.evaluate import compared, evaluate
from layercut.machine import peak_rss_bytes, reset_peak_rss
from layercut.models.load import reload
from layercut.recipe.recipe import Recipe
from layercut.results import RunResult
from layercut.training.heal_windows import check_windows, heal_windows
from layercut.training.resume import check_work_dir, claim, remove_claimed, training_folder
from layercut.types import CalibrationBatches, PruningPlan, WeightPatch

if TYPE_CHECKING:
    from layercut.models.view import DecoderView


class HealStage:
    """The recipe's section ``heal``, as the pipeline meets it; without one, nothing happens.

    Raises:
        DataError: the text cannot be read or is too short.
        NetworkError: the text is on the Hub, which cannot be reached.
        OutputError: something else stands where the checkpoints would be.
        RecipeError: windows longer than the model's context.

    Attributes:
        settings: the section, with its seed.
        windows: token ids, (n, seq).
        result: receives the stage ``healed``.
        measured: what is measured of it.
        work_dir: where checkpoints stay until the run is complete, shared with the fine-tuning.
    """

    def __init__(
        self,
        recipe: Recipe,
        view: DecoderView,
        batches: CalibrationBatches,
        result: RunResult,
        measured: Mapping[str, Any],
        output_dir: Path,
    ) -> None:
        self.settings = recipe.heal
        self.result = result
        self.measured = measured
        self.work_dir = training_folder(output_dir)
        if self.settings is None:
            return
        if self.settings.seed is None:
            self.settings = self.settings.model_copy(update={"seed": recipe.seed % 2**32})
        seed = self.settings.seed or 0
        self.windows = heal_windows(
            self.settings, recipe.calibration, batches, view.tokenizer, seed=seed
        )
        check_windows(view, self.windows, self.settings)
        if self.settings.save_steps is not None:
            check_work_dir(self.work_dir)

    def pruned(self, view: DecoderView, plan: PruningPlan, patch: WeightPatch) -> WeightPatch:
        """Heal the pruned model in place; returns the patch with its new weights.

        The dense model is loaded once more, to teach, and is in memory until the heal ends.

        Args:
            view: the model after ``apply``.
            plan: which layers went.
            patch: what else changed.
        """
        if self.settings is None:
            return patch
        # Imported here: PEFT takes seconds, and most runs do not train.
        from layercut.training.heal import heal
        from layercut.training.lora_adapters import adapted_names

        self.result.peak_rss_bytes = max(self.result.peak_rss_bytes, peak_rss_bytes())
        gc.collect()  # what earlier stages left in cycles is not this one's
        reset_peak_rss()
        work_dir = None
        if self.settings.save_steps is not None:
            work_dir = claim(self.work_dir) / "heal"
        with self.result.timed("heal", "heal the pruned model"):
            healing = heal(view, reload(view), self.windows, self.settings, work_dir=work_dir)
        if healing.resumed_at:
            warnings.warn(
                f"the heal went on from step {healing.resumed_at} of {healing.n_steps}; its "
                "seconds are those of both parts.",
                stacklevel=2,
            )
        if healing.best_step:
            patch = tuned_patch(
                view.path, view.layout, plan, patch, view.model.state_dict(), adapted_names(view)
            )
        with self.result.timed("evaluate", "evaluate the healed model"):
            measured = compared(evaluate(view, **self.measured), self.result.stages["dense"])
        self.result.healing = healing.to_json()
        self.result.stages["healed"] = replace(measured, train_seconds=healing.train_seconds)
        return patch

    def remove_checkpoints(self) -> None:
        """Clear away what only a resumption would need."""
        if self.settings is not None:
            remove_claimed(self.work_dir)

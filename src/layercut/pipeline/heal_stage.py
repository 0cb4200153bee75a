"""The heal as a stage of a run: its windows, its checkpoints, what it brought."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercut.checkpoints.patch import patch_trained
from layercut.evaluation.evaluate import add_changes, evaluate
from layercut.machine import restart_peak_rss
from layercut.models.load import reload
from layercut.recipe.heal import HealConfig
from layercut.recipe.recipe import Recipe
from layercut.results import RunResult
from layercut.training.heal_windows import check_windows, heal_windows
from layercut.training.resume import check_work_dir, claim, training_folder
from layercut.types import CalibrationBatches, PruningPlan, WeightPatch

if TYPE_CHECKING:
    from torch import Tensor

    from layercut.models.view import DecoderView


@dataclass(frozen=True, slots=True)
class HealJob:
    """A heal that can be done.

    Attributes:
        config: the recipe's section ``heal``, with its seed.
        windows: token ids, (n, seq).
        evaluation: what is measured of the healed model, as `layercut.evaluate` takes it.
        work_dir: where checkpoints stay until the run is complete, shared with a fine-tuning.
    """

    config: HealConfig
    windows: Tensor
    evaluation: Mapping[str, Any]
    work_dir: Path


def prepare_heal(
    recipe: Recipe, view: DecoderView, batches: CalibrationBatches, output_dir: Path
) -> HealJob | None:
    """Read and check what the section ``heal`` needs; ``None`` without one.

    Raises:
        DataError: the text cannot be read or is too short.
        NetworkError: the text is on the Hub, which cannot be reached.
        OutputError: something else stands where the checkpoints would be.
        RecipeError: windows longer than the model's context.
    """
    if recipe.heal is None:
        return None
    config = recipe.heal
    if config.seed is None:
        config = config.model_copy(update={"seed": recipe.seed % 2**32})
    windows = heal_windows(
        config, recipe.calibration, batches, view.tokenizer, seed=config.seed or 0
    )
    check_windows(view, windows, config)
    work_dir = training_folder(output_dir)
    if config.save_steps is not None:
        check_work_dir(work_dir)
    return HealJob(config, windows, recipe.evaluation.model_dump(), work_dir)


def heal_pruned(
    view: DecoderView, job: HealJob | None, plan: PruningPlan, patch: WeightPatch, result: RunResult
) -> WeightPatch:
    """Heal the pruned model in place; returns the patch with its new weights.

    The dense model is loaded once more, to teach, and is in memory until the heal ends.

    Args:
        view: the model after ``apply``.
        job: the heal; ``None`` does nothing.
        plan: which layers went.
        patch: what else changed.
        result: receives the stage ``healed``.
    """
    if job is None:
        return patch
    # Imported here: PEFT takes seconds, and most runs do not train.
    from layercut.training.heal import heal
    from layercut.training.lora_adapters import adapted_names

    result.peak_rss_bytes = restart_peak_rss(result.peak_rss_bytes)
    work_dir = None if job.config.save_steps is None else claim(job.work_dir) / "heal"
    with result.timed("heal", "heal the pruned model"):
        healed = heal(view, reload(view), job.windows, job.config, work_dir=work_dir)
    if healed.resumed_at:
        warnings.warn(
            f"the heal went on from step {healed.resumed_at} of {healed.n_steps}; its "
            "seconds are those of both parts.",
            stacklevel=2,
        )
    if healed.best_step:
        state = view.model.state_dict()
        patch = patch_trained(view.path, view.layout, plan, patch, state, adapted_names(view))
    with result.timed("evaluate", "evaluate the healed model"):
        healed_stage = evaluate(view, **job.evaluation, speed=False)
        measured = add_changes(healed_stage, result.stages["dense"])
    result.healing = healed.to_json()
    result.stages["healed"] = replace(measured, train_seconds=healed.train_seconds)
    return patch

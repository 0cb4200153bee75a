"""Fine-tuning of a checkpoint on its own, without pruning."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layercut.checkpoints.claimed_folder import remove_claimed
from layercut.checkpoints.output_dir import staged_folder
from layercut.checkpoints.patch import patch_trained
from layercut.checkpoints.writer import write_checkpoint
from layercut.errors import RecipeError
from layercut.evaluation.evaluate import check_tasks, evaluate
from layercut.evaluation.harness import check_harness
from layercut.machine import peak_rss_bytes, provenance
from layercut.output.verify import verify_checkpoint
from layercut.pipeline.finetune_stage import move_kept, prepare_finetune, train_and_measure
from layercut.pipeline.prepare import open_model
from layercut.pipeline.speed_stage import carry_speeds
from layercut.recipe import strict_yaml
from layercut.recipe.recipe import Recipe, load_recipe
from layercut.report.write import write_model_card, write_report
from layercut.results import RunResult
from layercut.types import PruningPlan, WeightPatch

USED_ALONE = {"model", "revision", "seed", "dtype", "device", "finetune", "evaluation"}
"""Parts of the recipe that fine-tuning on its own depends on."""


def finetune_checkpoint(
    recipe: Recipe | str | Path | Mapping[str, Any],
    output_dir: str | Path,
    *,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
    command: str = "layercut.finetune_checkpoint(…)",
) -> RunResult:
    """Fine-tune a model without pruning it, and write it to ``output_dir``.

    Args:
        recipe: a recipe, the path of one, or its content; its sections on pruning are not used.
        output_dir: the new checkpoint's folder; it appears complete and verified, or not at all.
        overrides: ``a.b=c`` changes to the recipe.
        overwrite: replace an earlier output.
        command: what the report says produced it.

    Returns:
        Everything that was measured: the stages ``dense`` and ``dense_tuned``.

    Raises:
        LayercutError: see errors.py.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    if recipe.finetune is not None and recipe.finetune.distill is not None:
        raise RecipeError(
            "finetune.distill needs a pruned model and its dense one, but nothing is pruned here. "
            "Set it to null, or use `layercut run`."
        )
    output_dir = Path(output_dir)
    used = recipe.model_dump(mode="json", include=USED_ALONE)
    result = RunResult(recipe.model, used, provenance(command))
    start = time.perf_counter()
    with result.collecting_warnings():
        with result.timed("load"):
            view = open_model(recipe, output_dir, overwrite=overwrite)
            job = prepare_finetune(recipe, view, output_dir)
            if job is None:
                raise RecipeError("the recipe has no section finetune. Add one, with its data.")
            check_tasks(view, recipe.evaluation.tasks)
            check_harness(recipe.evaluation.harness)
        with result.timed("evaluate", "evaluate the model"):
            result.stages["dense"] = evaluate(view, **job.evaluation)
        train_and_measure(view, job, "dense", result, adapter_base=view.path)
        carry_speeds(result)
        from layercut.training.finetune import trained_names

        whole = PruningPlan(recipe.model, view.n_layers, (), "none")
        names, state = trained_names(view, job.config), view.model.state_dict()
        patch = patch_trained(view.path, view.layout, whole, WeightPatch({}, "none"), state, names)
        with staged_folder(output_dir, overwrite=overwrite) as folder:
            with result.timed("save", "write and verify the checkpoint"):
                write_checkpoint(view.path, view.layout, whole, patch, folder)
                verify_checkpoint(folder, view, whole, patch)
            result.seconds["total"] = time.perf_counter() - start
            result.peak_rss_bytes = max(result.peak_rss_bytes, peak_rss_bytes())
            write_report(result, folder / "layercut", recipe_yaml=strict_yaml.dump(used))
            write_model_card(result, folder / "README.md", source=view.path)
            move_kept(job, folder / "layercut")
        remove_claimed(job.work_dir)
    return result

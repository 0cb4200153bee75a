"""Every refusal of a run, before any compute: from a recipe to a job that can be done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layercut import progress, registry
from layercut.checkpoints.output_dir import check_disk_space, check_output_dir
from layercut.checkpoints.preflight import check_folder
from layercut.checkpoints.resolve import find_folder
from layercut.checkpoints.writer import check_named_layers
from layercut.data.calibration import calibration_batches
from layercut.data.sources import read_texts
from layercut.engine.loss import check_vocabulary
from layercut.errors import DataError, ModelError
from layercut.evaluation.evaluate import check_tasks
from layercut.evaluation.harness import check_harness
from layercut.machine import available_memory_bytes
from layercut.models.check_method import (
    check_lengths,
    check_model,
    check_options,
)
from layercut.models.load import find_device, load
from layercut.models.ranks import ALONE, Ranks
from layercut.models.view import DecoderView
from layercut.pipeline.effort import settle_effort
from layercut.pipeline.estimate import Residency, estimate_run, measure_checkpoint
from layercut.pipeline.finetune_stage import FinetuneJob, prepare_finetune
from layercut.pipeline.heal_stage import HealJob, prepare_heal
from layercut.pipeline.resources import (
    check_resources,
    choose_residency,
    describe_run,
    measure_available,
)
from layercut.pipeline.size_search import split
from layercut.pipeline.whole_model import check_ranks, check_residency, list_residencies
from layercut.recipe.recipe import Recipe
from layercut.registry import MethodCall
from layercut.selection.select import Request, check_scoring, resolve_request
from layercut.types import CalibrationBatches, PruningPlan


@dataclass(frozen=True, slots=True)
class Job:
    """A recipe with everything it names read, resolved and found possible.

    Attributes:
        recipe: what was asked for.
        output_dir: the new checkpoint's folder.
        overwrite: whether an earlier output is replaced.
        view: the intact model, which the stages change in place.
        batches: calibration text.
        request: how layers are chosen, the scoring's options among it.
        recovery: how kept layers are repaired, with its options.
        heal: the heal's windows and configuration, if one is asked for.
        finetune: the fine-tuning's rows and configuration, if one is asked for.
        estimate: what all of it was to take, as in ``result.json``.
    """

    recipe: Recipe
    output_dir: Path
    overwrite: bool
    view: DecoderView
    batches: CalibrationBatches
    request: Request
    recovery: MethodCall
    heal: HealJob | None
    finetune: FinetuneJob | None
    estimate: Mapping[str, Any]

    @property
    def evaluation(self) -> Mapping[str, Any]:
        """What is measured of every stage, as `layercut.evaluate` takes it."""
        return self.recipe.evaluation.model_dump()


def prepare(recipe: Recipe, output_dir: Path, *, overwrite: bool, ranks: Ranks = ALONE) -> Job:
    """Load the model and its data, and refuse what cannot work.

    Args:
        recipe: what is asked for.
        output_dir: the new checkpoint's folder.
        overwrite: replace an earlier output.
        ranks: the processes that share the run.

    Raises:
        LayercutError: see errors.py.
    """
    check_ranks(recipe, ranks)
    modes = list_residencies(recipe, *resolve_methods(recipe))
    recipe, estimate = estimate_recipe(recipe, output_dir, modes, overwrite=overwrite, ranks=ranks)
    scoring, recovery = resolve_methods(recipe)
    progress.stage("load")
    # Machines may have unequal memory: all ranks do as rank 0.
    streamed = ranks.agree(estimate["residency"] == "streamed")
    residency = "streamed" if streamed else "resident"
    view = open_model(recipe, output_dir, overwrite=overwrite, residency=residency, ranks=ranks)
    section = recipe.selection
    search_size = section.max_perplexity_ratio is not None
    check_model(recovery, view)
    if section.drop is None:
        check_model(scoring, view)
    request = resolve_request(
        view,
        scoring=scoring,
        recovery=recovery,
        search_size=search_size,
        **section.model_dump(exclude={"max_perplexity_ratio"}),
    )
    # Which layers go is not known yet: after a drop of the first, every name is another.
    dropped = tuple(section.drop or (0,))
    check_named_layers(
        view.path, view.layout, PruningPlan(view.name, view.n_layers, dropped, "given")
    )
    check_evaluation(recipe, view)
    check_lengths(
        view, calibration=recipe.calibration.seq_len, evaluation=recipe.evaluation.seq_len
    )
    batches = calibration_batches(recipe.calibration, view.tokenizer, seed=recipe.seed)
    check_vocabulary(view, batches.input_ids)
    view.ranks.check_same("calibration text", batches.fingerprint, DataError)
    if search_size:
        split(batches)
    for call in (scoring, recovery):
        check_options(call, view, batches, request.n_drop)
    return Job(
        recipe=recipe,
        output_dir=output_dir,
        overwrite=overwrite,
        view=view,
        batches=batches,
        request=request,
        recovery=recovery,
        finetune=prepare_finetune(recipe, view, output_dir),
        heal=prepare_heal(recipe, view, batches, output_dir),
        estimate=estimate,
    )


def estimate_recipe(
    recipe: Recipe,
    output_dir: Path,
    modes: Sequence[Residency],
    *,
    overwrite: bool,
    ranks: Ranks = ALONE,
) -> tuple[Recipe, dict[str, Any]]:
    """What a run will take, said in three lines.

    Args:
        recipe: what is asked for.
        output_dir: the new checkpoint's folder.
        modes: where the weights may be.
        overwrite: replace an earlier output.
        ranks: who shares the run; rank 0 alone looks at the destination.

    Returns:
        The recipe with counts for its effort, and the estimate as in ``result.json``.

    Raises:
        OutputError: the destination cannot be written to.
        RecipeError: the time that is allowed is too short.
        ResourceError: there is too little memory or disk for it.
        LayercutError: as for `load`.
    """
    if ranks.is_first:
        check_output_dir(output_dir, Path(recipe.model), overwrite=overwrite)
    device = find_device(ranks.choose_device(recipe.device))
    folder = find_folder(recipe.model, recipe.revision)
    layout, stored = check_folder(folder)
    shape, rates = measure_checkpoint(folder, layout, stored, recipe, device)
    recipe = settle_effort(recipe, shape, rates, output_dir, ranks)
    estimate = estimate_run(shape, recipe, rates, available_memory_bytes(), ranks=ranks.world)
    available = measure_available(device)
    mode, reason = choose_residency(estimate, available, modes, residency=recipe.residency)
    for line in describe_run(estimate, mode, reason):
        progress.line(line)
    check_resources(estimate, available, mode, modes)
    if ranks.is_first:
        check_disk_space(folder, output_dir)
    return recipe, estimate.to_json(mode, reason)


def resolve_methods(recipe: Recipe) -> tuple[MethodCall, MethodCall]:
    """Scoring and recovery with their options; refuses bad ones before anything is loaded.

    Raises:
        RecipeError: an option that a method does not have, a score that the strategy cannot use, or
            a recovery that no checkpoint can hold.
    """
    check_scoring(recipe.selection.strategy, recipe.scoring.method)
    registry.check_stores(recipe.recovery.method)
    scoring = registry.resolve(
        "scoring", recipe.scoring.method, recipe.scoring.options, seed=recipe.seed
    )
    recovery = registry.resolve(
        "recovery", recipe.recovery.method, recipe.recovery.options, seed=recipe.seed
    )
    return scoring, recovery


def open_model(
    recipe: Recipe,
    output_dir: Path,
    *,
    overwrite: bool,
    residency: str = "resident",
    ranks: Ranks = ALONE,
) -> DecoderView:
    """Load the recipe's model, once its destination is known to be usable.

    Every rank loads it; only rank 0 writes, and looks at the destination.

    Args:
        recipe: what is asked for.
        output_dir: the new checkpoint's folder.
        overwrite: replace an earlier output.
        residency: where the weights will be.
        ranks: who loads it.

    Raises:
        OutputError: the destination cannot be written to.
        ResourceError: the disk could not hold a copy of the weights.
        LayercutError: as for `load`.
    """
    if ranks.is_first:
        check_output_dir(output_dir, Path(recipe.model), overwrite=overwrite)
    view = load(
        recipe.model,
        revision=recipe.revision,
        dtype=recipe.dtype,
        device=ranks.choose_device(recipe.device),
        residency=residency,
    )
    check_residency(recipe, view)
    if ranks.is_first:
        check_output_dir(output_dir, view.path, overwrite=overwrite)
        check_disk_space(view.path, output_dir)
    ranks.check_same("model", view.fingerprint, ModelError)
    view.ranks = ranks.on(view.device)
    return view


def check_evaluation(recipe: Recipe, view: DecoderView) -> None:
    """Refuse texts, tasks and harness tasks that cannot be read or do not fit the model.

    Raises:
        LayercutError: says which one, and why.
    """
    for source in recipe.evaluation.text.values():
        next(iter(read_texts(source)))
    check_tasks(view, recipe.evaluation.tasks)
    check_harness(recipe.evaluation.harness)

"""The whole flow, from a recipe to a pruned checkpoint: read this file first."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layercut.checkpoints.claimed_folder import remove_claimed
from layercut.checkpoints.output_dir import staged_folder
from layercut.checkpoints.plan_file import read_lineage
from layercut.checkpoints.writer import write_checkpoint
from layercut.engine.journal import Journal
from layercut.evaluation.evaluate import add_changes
from layercut.evaluation.recorded_evaluation import recall_evaluation
from layercut.machine import peak_rss_bytes, provenance
from layercut.models.surgery import apply
from layercut.output.verify import verify_checkpoint
from layercut.pipeline.finetune_stage import finetune_dense, finetune_pruned, move_kept
from layercut.pipeline.heal_stage import heal_pruned
from layercut.pipeline.join_ranks import joined_ranks
from layercut.pipeline.prepare import Job, prepare
from layercut.pipeline.prune import prune_with_retry
from layercut.pipeline.run_record import recorded
from layercut.pipeline.speed_stage import carry_speeds, time_dense_and_pruned
from layercut.recipe.recipe import Recipe, load_recipe
from layercut.report.write import write_model_card, write_report
from layercut.results import RunResult
from layercut.training.resume import training_folder
from layercut.types import Evidence, PruningPlan, WeightPatch


def run(
    recipe: Recipe | str | Path | Mapping[str, Any],
    output_dir: str | Path,
    *,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
    command: str = "layercut.run(…)",
) -> RunResult:
    """Prune a model as ``recipe`` says and write it to ``output_dir``.

    Started by ``torchrun`` or another launcher, all processes share the work, and rank 0 writes.

    Args:
        recipe: a recipe, the path of one, or its content.
        output_dir: the new checkpoint's folder; it appears complete and verified, or not at all.
        overrides: ``a.b=c`` changes to the recipe.
        overwrite: replace an earlier output.
        command: what the report says produced it.

    Returns:
        Everything that was measured, as in ``result.json``.

    Raises:
        LayercutError: see errors.py; nothing is left behind but the record of what was decided
            (``OUTPUT_DIR.progress``) and the checkpoints of a training that began
            (``OUTPUT_DIR.training``), from which the same call goes on.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    result = RunResult(recipe.model, recipe.model_dump(mode="json"), provenance(command))
    start = time.perf_counter()
    with joined_ranks() as ranks, result.collecting_warnings():
        result.n_ranks = ranks.world
        with result.timed("load", "estimate the run"):
            job = prepare(recipe, Path(output_dir), overwrite=overwrite, ranks=ranks)
        result.estimate = job.estimate
        result.recipe = job.recipe.model_dump(mode="json")  # with counts for its effort
        with recorded(job) as journal:
            prune_and_train(job, journal, result, start)
    return result


def prune_and_train(job: Job, journal: Journal, result: RunResult, start: float) -> None:
    """All stages of a run, the output last.

    Args:
        job: the run's model, recipe and destination.
        journal: what an interrupted run had decided, and what this one decides.
        result: receives everything that is measured.
        start: when the run began, by ``time.perf_counter``.

    Raises:
        LayercutError: see errors.py.
    """
    view = job.view
    with result.timed("evaluate", "evaluate the dense model"):
        result.stages["dense"] = recall_evaluation(view, job.evaluation, journal, "dense")
    teacher = finetune_dense(view, job.finetune, result)
    plan, evidence, patch = prune_with_retry(job, journal, result)
    result.plan, result.lineage = plan, read_lineage(view.path)
    result.recovery = {"method": patch.method, **patch.notes}
    dense = copy.copy(view)  # kept beyond the cut until both are timed
    apply(view, plan, patch)
    with result.timed("evaluate", "evaluate the pruned model"):
        pruned = recall_evaluation(view, job.evaluation, journal, "pruned")
        result.stages["pruned"] = add_changes(pruned, result.stages["dense"])
        # Of layers that are read from files, the time would be that of reading.
        if view.source is None and view.ranks.is_first:
            time_dense_and_pruned(dense, view, result)
        view.ranks.wait()
    del dense
    patch = heal_pruned(view, job.heal, plan, patch, result)
    patch = finetune_pruned(view, job.finetune, plan, patch, teacher, result)
    carry_speeds(result)
    result.recovery = {**result.recovery, "tensors_changed": len(patch.tensors)}
    if view.ranks.is_first:
        write_output(job, plan, patch, evidence, result, start)
    view.ranks.wait()
    if job.heal or job.finetune:
        remove_claimed(training_folder(job.output_dir))


def write_output(
    job: Job,
    plan: PruningPlan,
    patch: WeightPatch,
    evidence: Evidence,
    result: RunResult,
    start: float,
) -> None:
    """Write checkpoint, report and model card; the folder appears whole and verified, or not.

    Args:
        job: the run's model, recipe and destination.
        plan: which layers went.
        patch: every tensor that changed.
        evidence: the scores behind the plan.
        result: receives the last seconds and the memory, before it is written.
        start: when the run began, by ``time.perf_counter``.

    Raises:
        OutputError: the folder cannot be written to.
        ResourceError: the disk is full.
        VerificationError: the written model differs from the one in memory.
    """
    view = job.view
    with staged_folder(job.output_dir, overwrite=job.overwrite) as folder:
        with result.timed("save", "write and verify the checkpoint"):
            write_checkpoint(view.path, view.layout, plan, patch, folder)
            verify_checkpoint(folder, view, plan, patch)
        result.seconds["total"] = time.perf_counter() - start
        result.peak_rss_bytes = max(result.peak_rss_bytes, peak_rss_bytes())
        report = folder / "layercut"
        write_report(result, report, scores=evidence.scores, recipe_yaml=job.recipe.to_yaml())
        write_model_card(result, folder / "README.md", source=view.path)
        move_kept(job.finetune, report)

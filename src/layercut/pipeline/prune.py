"""Which layers go, and what makes up for them: as many as asked for, or as a limit allows."""

from __future__ import annotations

from dataclasses import replace

from layercut.pipeline.prepare import Job
from layercut.pipeline.size_search import Pruned, prune_within
from layercut.recovery.fit import fit_repair
from layercut.results import RunResult
from layercut.selection.select import choose_layers
from layercut.types import WeightPatch


def prune(job: Job, result: RunResult) -> Pruned:
    """Plan, evidence and patch; the model is unchanged afterwards.

    Args:
        job: what is asked for.
        result: receives plan, notes and seconds.

    Raises:
        PlanError: no plan meets the request.
        NumericsError: a score or a fitted tensor is not finite.
    """
    limit = job.recipe.selection.max_perplexity_ratio
    if limit is not None:
        with result.timed("score", f"drop layers until perplexity is × {limit:g}"):
            plan, evidence, patch = prune_within(
                job.view,
                job.batches,
                max_perplexity_ratio=limit,
                request=job.request,
                recovery=job.recovery,
            )
    else:
        with result.timed("score", f"score the layers by {job.request.scoring.name}"):
            plan, evidence = choose_layers(job.view, job.batches, job.request)
        with result.timed("recover", f"recover by {job.recovery.name}"):
            repair = fit_repair(job.view, plan, evidence, job.batches, job.recovery)
            assert isinstance(repair, WeightPatch)  # `prepare` refuses what cannot be stored
            patch = repair
    # The record has served, and would count towards the memory of the training to come.
    return plan, replace(evidence, gradient_log=None), patch

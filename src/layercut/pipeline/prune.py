"""Which layers go, and what makes up for them: as many as asked for, or as a limit allows."""

from __future__ import annotations

import gc
import warnings
from dataclasses import replace

import torch

from layercut.engine.journal import Journal
from layercut.pipeline.prepare import Job
from layercut.pipeline.size_search import Pruned, prune_within
from layercut.recovery.recorded_fit import recall_repair
from layercut.results import RunResult
from layercut.scoring.recorded_scorer import RecordedScorer
from layercut.selection.select import choose_layers
from layercut.spool import sparing_the_device


def prune_with_retry(job: Job, journal: Journal, result: RunResult) -> Pruned:
    """As `prune`; once more with fewer rows on the GPU where its memory runs out.

    Raises:
        torch.OutOfMemoryError: it runs out again, or ranks share the run: the others are waiting.
    """
    try:
        return prune(job, journal, result)
    except torch.OutOfMemoryError:
        if job.view.ranks.world > 1:
            raise
    # Behind the handler: until then, its frames keep what has filled the memory.
    gc.collect()
    torch.cuda.empty_cache()
    warnings.warn(
        "the GPU's memory ran out; the layers are chosen and repaired once more with fewer rows on "
        "it. Lower calibration.micro_batch or calibration.n_sequences to save that time.",
        stacklevel=2,
    )
    with sparing_the_device():
        return prune(job, journal, result)


def prune(job: Job, journal: Journal, result: RunResult) -> Pruned:
    """Plan, evidence and patch; the model is unchanged afterwards.

    Args:
        job: what is asked for.
        journal: what an interrupted run had decided, and what this one decides.
        result: receives plan, notes and seconds.

    Raises:
        PlanError: no plan meets the request.
        NumericsError: a score or a fitted tensor is not finite.
    """
    scorer = RecordedScorer(journal, job.recovery.method.needs_gradient_log)
    request = replace(job.request, scorer=scorer, journal=journal)
    limit = job.recipe.selection.max_perplexity_ratio
    if limit is not None:
        with result.timed("score", f"drop layers until perplexity is × {limit:g}"):
            plan, evidence, patch = prune_within(
                job.view,
                job.batches,
                max_perplexity_ratio=limit,
                request=request,
                recovery=job.recovery,
                journal=journal,
            )
    else:
        with result.timed("score", f"score the layers by {request.scoring.name}"):
            plan, evidence = choose_layers(job.view, job.batches, request)
        with result.timed("recover", f"recover by {job.recovery.name}"):
            patch = recall_repair(job.view, plan, evidence, job.batches, job.recovery, journal)
    # The record has served, and would count towards the memory of the training to come.
    return plan, replace(evidence, gradient_log=None), patch

"""As many layers as a perplexity limit allows, measured on text that chose and repaired nothing.

Rule     every eighth calibration sequence is set aside; bisection over the number of dropped
         layers, each probe with its own selection and its own recovery; the largest number whose
         perplexity on the sequences set aside, over the dense model's, is within the limit
Cost     one selection and one recovery for each of about log₂(L) probes; prices and scores are
         computed once
Limits   takes the ratio to grow with the number of layers, as it does but for noise
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from layercut import progress
from layercut.engine.loss import mean_loss
from layercut.errors import DataError, PlanError
from layercut.recovery.fit import fit_repair
from layercut.registry import MethodCall
from layercut.selection.select import Request, most_droppable, plan_sizes
from layercut.types import CalibrationBatches, Evidence, PruningPlan, WeightPatch

if TYPE_CHECKING:
    from layercut.models.view import DecoderView

SET_ASIDE_EVERY = 8
FEWEST_SEQUENCES = 4

Pruned = tuple[PruningPlan, Evidence, WeightPatch]


def prune_within(
    view: DecoderView,
    batches: CalibrationBatches,
    *,
    max_perplexity_ratio: float,
    request: Request,
    recovery: MethodCall,
) -> Pruned:
    """Choose and repair the shallowest model that stays within the limit.

    Args:
        view: the intact model; unchanged afterwards.
        batches: calibration text; every eighth sequence measures and does nothing else.
        max_perplexity_ratio: highest perplexity, as a multiple of the dense model's.
        request: strategy, score, rounds and protected layers.
        recovery: how kept layers are repaired.

    Returns:
        The plan, whose ``trials`` hold the ratio of every size tried, the evidence and the patch.

    Raises:
        DataError: too little calibration text to set any aside.
        PlanError: dropping a single layer is already too much, or not possible.
    """
    n_kept = len(request.protect) + bool(request.keep_one_of)
    fits, fails = 0, 1 + most_droppable(view.n_layers, n_kept)
    if fails <= 1:
        raise PlanError(
            f"no layer of {view.n_layers} may be dropped: {n_kept} are protected. Protect fewer."
        )
    fitting, held_out = split(batches)
    dense = mean_loss(view, held_out.input_ids, held_out.micro_batch)
    plan_of_size = plan_sizes(view, fitting, request)
    trials: dict[int, float] = {}
    best: Pruned | None = None
    refusal: PlanError | None = None
    while fails - fits > 1:
        size = (fits + fails) // 2
        try:
            plan, evidence = plan_of_size(size)
        except PlanError as error:  # no plan has this size, so it meets no limit
            fails, refusal = size, error
            continue
        patch = fit_repair(view, plan, evidence, fitting, recovery)
        assert isinstance(patch, WeightPatch)  # `prepare` refuses what cannot be stored
        with view.skipping(plan.dropped), view.patched(patch.tensors):
            loss = mean_loss(view, held_out.input_ids, held_out.micro_batch)
        trials[size] = math.exp(loss - dense)
        progress.status(f"{size} layers: perplexity × {trials[size]:.3f}")
        if trials[size] <= max_perplexity_ratio:
            fits, best = size, (plan, evidence, patch)
        else:
            fails = size
    if best is None:
        raise _no_size_error(max_perplexity_ratio, trials.get(1), refusal)
    return replace(best[0], trials=dict(sorted(trials.items()))), *best[1:]


def _no_size_error(limit: float, ratio: float | None, refusal: PlanError | None) -> PlanError:
    """Why no layer goes: ``ratio`` without one is too high, or there is no plan without one."""
    if ratio is None:
        why = f"not one layer can be dropped: {refusal}"
    else:
        why = (
            f"dropping one layer already gives {ratio:.3f} × the dense perplexity on held-out "
            "text. Allow more, calibrate on more text, or ask for a number with drop_layers."
        )
    return PlanError(f"no plan meets max_perplexity_ratio {limit}: {why}")


def split(batches: CalibrationBatches) -> tuple[CalibrationBatches, CalibrationBatches]:
    """Sequences that choose and repair, and those that measure: every eighth, at least one.

    Raises:
        DataError: fewer than four sequences.
    """
    if batches.n_sequences < FEWEST_SEQUENCES:
        raise DataError(
            f"{batches.n_sequences} calibration sequences are too few to hold any out for "
            f"max_perplexity_ratio. Use at least {FEWEST_SEQUENCES}."
        )
    every = min(SET_ASIDE_EVERY, batches.n_sequences)
    order = range(batches.n_sequences)
    held_out = [i for i in order if i % every == every - 1]
    fitting = [i for i in order if i % every != every - 1]
    return (
        replace(batches, input_ids=batches.input_ids[fitting]),
        replace(batches, input_ids=batches.input_ids[held_out]),
    )

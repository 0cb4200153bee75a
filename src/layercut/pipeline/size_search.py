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
from functools import partial
from typing import TYPE_CHECKING

from layercut import progress
from layercut.engine.journal import NO_JOURNAL, Journal
from layercut.engine.loss import mean_loss
from layercut.errors import DataError, PlanError
from layercut.recovery.recorded_fit import name_plan, recall_repair
from layercut.registry import MethodCall
from layercut.selection.bounds import most_droppable
from layercut.selection.select import Request, plan_sizes
from layercut.types import CalibrationBatches, Evidence, PruningPlan, WeightPatch

if TYPE_CHECKING:
    from layercut.models.view import DecoderView

SET_ASIDE_EVERY = 8
FEWEST_SEQUENCES = 4
HELD_OUT_LOSS = "held-out losses"

Pruned = tuple[PruningPlan, Evidence, WeightPatch]


def prune_within(
    view: DecoderView,
    batches: CalibrationBatches,
    *,
    max_perplexity_ratio: float,
    request: Request,
    recovery: MethodCall,
    journal: Journal = NO_JOURNAL,
) -> Pruned:
    """Choose and repair the shallowest model that stays within the limit.

    Args:
        view: the intact model; unchanged afterwards.
        batches: calibration text; every eighth sequence measures and does nothing else.
        max_perplexity_ratio: highest perplexity, as a multiple of the dense model's.
        request: strategy, score, rounds and protected layers.
        recovery: how kept layers are repaired.
        journal: records what is scored, fitted and measured.

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
    patches: dict[int, WeightPatch] = {}
    found: dict[int, tuple[PruningPlan, Evidence]] = {}

    def loss_without(size: int) -> float:
        """Held-out loss of the repaired model; its patch is at hand afterwards."""
        patch = patches[size] = recall_repair(view, *found[size], fitting, recovery, journal)
        with view.skipping(found[size][0].dropped), view.patched(patch.tensors):
            return mean_loss(view, held_out.input_ids, held_out.micro_batch)

    def give_up(size: int) -> None:
        patches.pop(size, None)
        if size in found:
            journal.within(name_plan(found.pop(size)[0])).conclude(HELD_OUT_LOSS, size)

    intact = partial(mean_loss, view, held_out.input_ids, held_out.micro_batch)
    dense = journal.recall_number(HELD_OUT_LOSS, "dense", intact)
    plan_of_size = plan_sizes(view, fitting, request)
    trials: dict[int, float] = {}
    refusal: PlanError | None = None
    while fails - fits > 1:
        size = (fits + fails) // 2
        try:
            found[size] = plan_of_size(size)
        except PlanError as error:  # no plan has this size, so it meets no limit
            fails, refusal = size, error
            continue
        own = journal.within(name_plan(found[size][0]))
        loss = own.recall_number(HELD_OUT_LOSS, size, partial(loss_without, size))
        trials[size] = math.exp(loss - dense)
        progress.status(f"{size} layers: perplexity × {trials[size]:.3f}")
        if trials[size] <= max_perplexity_ratio:
            give_up(fits)
            fits = size
        else:
            give_up(size)
            fails = size
    if fits not in found:
        raise _no_size_error(max_perplexity_ratio, trials.get(1), refusal)
    plan, evidence = found[fits]
    patch = patches.get(fits) or recall_repair(view, plan, evidence, fitting, recovery, journal)
    return replace(plan, trials=dict(sorted(trials.items()))), evidence, patch


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

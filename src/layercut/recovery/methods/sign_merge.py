"""Add the important weights of dropped layers to the kept ones that agree in sign (GradPruner).

Source   arXiv:2601.19503 §3.2; which layers are merged is a reading (docs/methods.md#sign-merge)
Formula  Ŵ_j = W_j where F_j is among its ⌈keep·numel⌉ largest entries, else 0
         W_k ← W_k + s · Σ_j Ŵ_j ⊙ [sign(Ŵ_j) = sign(W_k)], the sign of the original W_k
         j: merged dropped layers; k: the closest kept layer before j; F_j (out, in): mean squared
         simulated gradient of W_j (scoring/methods/igia.py)
Rule     merge all: every dropped layer; beyond-safe: all but the n_safe lowest-scored ones
         s = 1 is the paper's; probed: the s whose loss on held-out examples is the lowest after a
         short tuning, and 0 unless that is lower by more than its standard error (ours)
Cost     none with scoring igia, whose record is used; else the t steps of an early run. Probed:
         probe_steps more for each s
Limits   needs a kept layer before every cut, and weights of equal shape in both layers
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from layercut import progress
from layercut.errors import PlanError
from layercut.models.output_projections import store_like
from layercut.models.view import DecoderView
from layercut.recipe.base import Count
from layercut.recovery.layer_merging import check_shapes, match_names, merge_targets
from layercut.registry import Method
from layercut.training.early_steps import EarlyRunOptions, check_early_run, prepare_probe, record
from layercut.types import CalibrationBatches, Evidence, GradientRecord, PruningPlan, WeightPatch

STRENGTHS = (0.0, 0.25, 0.5, 1.0)


class Options(EarlyRunOptions):
    """What is merged, and the early run that is made where scoring left no gradients."""

    keep: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.2, description="share of a dropped weight's entries that are merged"
    )
    merge: Literal["all", "beyond-safe"] = Field(
        default="all", description="which dropped layers: all, or those beyond the n_safe lowest"
    )
    n_safe: int = Field(
        default=0, ge=0, description="lowest-scored layers that are discarded by beyond-safe"
    )

    strength: Annotated[float, Field(ge=0, le=1)] | Literal["probed"] = Field(
        default="probed", description="part of the merge that is made, or probed; 1: the paper's"
    )
    probe_steps: Count = Field(default=20, description="optimiser steps behind each probe")

    @model_validator(mode="after")
    def _safe_number_goes_with_beyond_safe(self) -> Options:
        if (self.merge == "beyond-safe") != (self.n_safe > 0):
            raise ValueError("merge: beyond-safe and an n_safe above 0 go together")
        return self


def check_safe_number(options: Options, n_drop: int) -> None:
    """Refuse an ``n_safe`` that leaves nothing to merge of ``n_drop`` layers.

    Raises:
        PlanError: there is nothing left.
    """
    if options.n_safe and options.n_safe >= n_drop:
        raise PlanError(
            f"recovery.options.n_safe is {options.n_safe}, but only {n_drop} layers are dropped: "
            "none is left to merge. Lower n_safe, or set recovery.method: none."
        )


def check(view: DecoderView, batches: CalibrationBatches, options: Options, n_drop: int) -> None:
    """Refuse an impossible early run, and an ``n_safe`` that leaves nothing to merge."""
    check_safe_number(options, n_drop)
    check_early_run(view, batches, options)


METHOD = Method(
    needs_previous_layer=True,
    needs_gradient_log=True,
    needs_tasks=True,
    streams=False,
    several_ranks=False,
    check=check,
)


def fit(
    view: DecoderView,
    plan: PruningPlan,
    evidence: Evidence | None,
    batches: CalibrationBatches,
    options: Options,
) -> WeightPatch:
    """Sparsify each merged layer's weights by their own F and add what agrees in sign."""
    check_safe_number(options, len(plan.dropped))
    into = merge_targets(plan)
    check_shapes(view, into)
    log = _gradients(view, plan, evidence, batches, options)
    discarded = sort_by_score(plan, log)[: options.n_safe] if options.n_safe else []
    for layer in discarded:
        del into[layer]
    patch = merge(view, into, log, options.keep)
    if options.strength == "probed":
        strength, probes = _probe_strengths(view, plan, batches, options, patch.tensors)
    else:
        strength, probes = options.strength, {}
    tensors = scale_merge(view, patch.tensors, strength)
    patch = replace(patch, tensors=tensors, notes={**patch.notes, "strength": strength, **probes})
    notes = {
        "merged_into": {str(layer): kept for layer, kept in into.items()},
        "discarded": sorted(discarded),
        "recorded_steps": log.n_steps,
    }
    return replace(patch, notes={**notes, **patch.notes})


def _probe_strengths(
    view: DecoderView,
    plan: PruningPlan,
    batches: CalibrationBatches,
    options: Options,
    merged: Mapping[str, Tensor],
) -> tuple[float, dict[str, Any]]:
    """The part of the merge that a short tuning is best with, and the loss behind each."""
    losses: dict[float, Tensor] = {}
    probe = prepare_probe(view, batches, options, options.probe_steps)
    for strength in STRENGTHS:
        with view.skipping(plan.dropped), view.patched(scale_merge(view, merged, strength)):
            losses[strength] = probe()
        progress.status(f"merged by {strength:.0%}: loss {float(losses[strength].mean()):.3f}")
    chosen = choose_strength(losses)
    return chosen, {"probed_losses": {f"{s:g}": float(e.mean()) for s, e in losses.items()}}


def choose_strength(losses: Mapping[float, Tensor]) -> float:
    """The strength with the lowest mean loss; 0 unless it is lower by more than a standard error.

    Args:
        losses: strength → the loss of every held-out example, (n,), the same ones each time.
    """
    best = min(losses, key=lambda strength: float(losses[strength].mean()))
    gain = losses[0.0] - losses[best]
    error = float(gain.std()) / math.sqrt(len(gain)) if len(gain) > 1 else math.inf
    return best if float(gain.mean()) > error else 0.0


def scale_merge(
    view: DecoderView, merged: Mapping[str, Tensor], strength: float
) -> dict[str, Tensor]:
    """W + s · (merged − W) for every tensor, float32; nothing at s = 0."""
    if strength == 0:
        return {}
    return {
        name: torch.lerp(view.model.get_parameter(name).data.to(tensor), tensor, strength)
        for name, tensor in merged.items()
    }


def merge(
    view: DecoderView, into: Mapping[int, int], log: GradientRecord, keep: float
) -> WeightPatch:
    """The kept layers' weights with the dropped ones' important entries, float32.

    Args:
        view: the intact model.
        into: merged layer → the kept layer that takes its weights.
        log: the gradients of the merged layers' weights.
        keep: share of a merged weight's entries that count.
    """
    tensors: dict[str, Tensor] = {}
    n_kept = n_added = 0
    for layer, receiver in progress.track(into.items(), total=len(into)):
        modules = view.linear_modules(layer)
        for name, target in match_names(view, layer, receiver).items():
            weight = view.model.get_parameter(name)
            original = view.model.get_parameter(target)
            importance = store_like(modules[name], log.elementwise(name))
            kept = top_entries(importance, keep).to(weight.device)
            added = kept & (weight.sign() == original.sign())
            total = tensors.get(target, original.float())
            tensors[target] = total + torch.where(added, weight.float(), 0.0)
            n_kept += int(kept.sum())
            n_added += int(added.sum())
    # By chance, half of the signs agree.
    notes = {"entries_kept": n_kept, "entries_added": n_added, "signs_agree": n_added / n_kept}
    return WeightPatch(tensors, "sign-merge", notes)


def top_entries(importance: Tensor, share: float) -> Tensor:
    """Mask of the ⌈share·numel⌉ largest entries; of equal ones, those with the lower index.

    Args:
        importance: of any shape.
        share: above 0, at most 1; taken as the decimal number it is written as.
    """
    flat = importance.flatten()
    # 0.7 · 10 is 7.000000000000001 in binary, and would be rounded up to 8.
    n_kept = math.ceil(Fraction(str(share)) * flat.numel())
    threshold = flat.kthvalue(flat.numel() - n_kept + 1).values
    mask = flat > threshold
    ties = (flat == threshold).nonzero().flatten()
    mask[ties[: n_kept - int(mask.sum())]] = True
    return mask.view_as(importance)


def sort_by_score(plan: PruningPlan, log: GradientRecord) -> list[int]:
    """The dropped layers from the lowest-scored on: in the order in which the plan dropped them.

    Within one decision the scores decide, of equal ones the higher index goes first, as in
    selection. A plan that was given rather than scored is ordered by the record's own scores.
    """
    decisions = [(r.scores, r.dropped) for r in plan.rounds]
    if sum(len(dropped) for _, dropped in decisions) != len(plan.dropped):
        decisions = [(log.layer_scores().values, plan.dropped)]
    return [
        layer
        for scores, dropped in decisions
        for layer in sorted(dropped, key=lambda i: (scores[i] or 0.0, -i))
    ]


def _gradients(
    view: DecoderView,
    plan: PruningPlan,
    evidence: Evidence | None,
    batches: CalibrationBatches,
    options: Options,
) -> GradientRecord:
    """The record that scoring left if it covers the dropped layers, else a new one."""
    log = evidence.gradient_log if evidence else None
    needed = {name for layer in plan.dropped for name in view.linear_weights(layer)}
    if log is not None and needed <= set(log.weights):
        return log
    return record(view, batches, options)

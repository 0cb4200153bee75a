"""Refit the kept layers, in order, towards the dense residual stream.

Source   ours; docs/methods.md#refit
Formula  D = argmin Σ_t w_t ‖e_t − D·a_t‖² + λ·tr(Σ w a aᵀ)/in · ‖D‖²,   W ← W + s·D
         a_t (in): what W reads; e_t (d) = target_t − output_t of the layer, in the model that is
         pruned and refitted so far; target (d): dense input of the next kept layer
         w_t = 1/‖target_t‖²
         behind a factor or a norm: see `layercut.recovery.writer_fit`; routed experts:
         `layercut.recovery.expert_fit`
Rule     attention output first, then down-projection; λ and the part s of the change by held-out
         sequences, then gradient steps on these; what does not lower their loss is not done
Cost     one dense and one to two pruned forward passes without the head, in² sums per weight
Limits   needs a kept layer before every cut
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from layercut import progress
from layercut.engine.journal import NO_JOURNAL, Entry, Journal
from layercut.engine.loss import mean_loss
from layercut.engine.residual_stream import ResidualStream
from layercut.errors import ModelError, NumericsError, RecipeError
from layercut.models.view import DecoderView
from layercut.models.weight_store import collect
from layercut.models.writers import find_writers
from layercut.recovery.gradient_steps import take_steps
from layercut.recovery.layer_fit import (
    choose_held_out,
    mask_held_out_rows,
    refit_layers,
)
from layercut.registry import Method, MethodOptions
from layercut.tensor_maps import ComputedTensors
from layercut.types import CalibrationBatches, Evidence, PruningPlan, WeightPatch

SHRINKAGE_GRID = (1.0, 0.85, 0.7, 0.55, 0.4, 0.25)


class Options(MethodOptions):
    """Which layers and weights are refitted, the share of sequences held out, and the steps.

    The gradient steps move every linear weight of every kept layer, whatever is refitted. There is
    none where fewer than two sequences are held out. They learn from these, a half each time; or
    from sequences that nothing else of the refit sees, each one once, and are judged by the others.
    """

    layers: Literal["cuts", "following"] = Field(
        default="following",
        description="the kept layers before a cut, or all from the first cut on",
    )
    modules: Literal["down", "both"] = Field(
        default="both", description="down-projections alone, or attention outputs as well"
    )
    held_out_every: int = Field(
        default=8, ge=2, description="one of so many calibration sequences is held out"
    )
    gradient_steps: int = Field(
        default=2, ge=0, description="steps towards the dense model's distribution at the end"
    )
    step_share: float = Field(
        default=0,
        ge=0,
        lt=1,
        description="part of the calibration sequences that only these steps learn from, each one "
        "once; 0: they learn from those held out",
    )


def check(view: DecoderView, batches: CalibrationBatches, options: Options, n_drop: int) -> None:
    """Refuse a model that nothing could be corrected of, and text that cannot be shared out."""
    n_fresh = int(mark_fresh(batches.n_sequences, options.step_share).sum())
    if n_fresh > max(0, batches.n_sequences - 2):
        raise RecipeError(
            f"recovery.options.step_share {options.step_share} leaves {n_fresh} of "
            f"{batches.n_sequences} calibration sequences to the gradient steps, and the fit needs "
            "two. Use more sequences or a smaller share."
        )
    if 0 < n_fresh < options.gradient_steps:
        warnings.warn(
            f"{n_fresh} gradient steps are taken instead of {options.gradient_steps}: the steps "
            f"have {n_fresh} of {batches.n_sequences} calibration sequences, and each needs one",
            stacklevel=2,
        )
    if any(find_writers(view)):
        return
    why = (
        f"no layer of this {view.layout.model_type} model writes to the residual stream by a "
        "projection that a refit could correct (a gate for each token, or a norm over stream and "
        "output, stands between)"
    )
    if not options.gradient_steps:
        raise ModelError(f"{why}. Allow gradient steps, or set recovery.method: none.")
    warnings.warn(f"{why}: it is repaired by gradient steps alone.", stacklevel=2)


METHOD = Method(
    needs_previous_layer=True,
    shares_dense_stream=True,
    records_steps=True,
    revision=4,
    check=check,
)


def fit(
    view: DecoderView,
    plan: PruningPlan,
    evidence: Evidence | None,
    batches: CalibrationBatches,
    options: Options,
    *,
    dense: ResidualStream | None = None,
    journal: Journal = NO_JOURNAL,
) -> WeightPatch:
    """Walk the dense and the pruned model side by side and correct the pruned one as it goes."""
    writers = find_writers(view)
    is_fresh = mark_fresh(batches.n_sequences, options.step_share)
    fresh, n_steps = batches.input_ids[is_fresh], options.gradient_steps
    if len(fresh):  # the shared stream is that of all of the text
        batches, dense = replace(batches, input_ids=batches.input_ids[~is_fresh]), None
        n_steps = min(n_steps, len(fresh))
    refitted = refit_layers(
        view,
        plan,
        view.ranks.share_batches(batches),
        mask_held_out_rows(batches, options.held_out_every, view.ranks),
        layers=options.layers,
        modules=options.modules,
        dense=dense,
        writers=writers,
        journal=journal,
    )
    sequences = batches.input_ids[choose_held_out(batches, options.held_out_every)]
    tensors = refitted.tensors
    choose = partial(_choose_shrinkage, view, plan, tensors, sequences, batches.micro_batch)
    notes = dict(journal.recall("shrinkage", "chosen", lambda: Entry(choose())).values)
    share = notes["shrinkage"]
    if experts := _tell_experts(view, plan, refitted.experts):
        notes["experts"] = experts
    repaired = collect(view, interpolate(view, tensors, share)) if share else {}
    patch = WeightPatch(repaired, "refit", notes)
    if n_steps and len(sequences) > 1:
        patch = _take_gradient_steps(
            view,
            plan,
            patch,
            sequences,
            fresh,
            batches.micro_batch,
            n_steps,
            journal,
        )
    return patch


def mark_fresh(n_sequences: int, share: float) -> Tensor:
    """Mask over the calibration sequences, (n_sequences,): True for those of the steps, spread."""
    place = torch.arange(n_sequences + 1, dtype=torch.float64)
    counts = (place * share + 1e-9).floor()
    return counts[1:] > counts[:-1]


def _tell_experts(
    view: DecoderView, plan: PruningPlan, fitted: Mapping[int, Sequence[Mapping[str, int]]]
) -> list[dict[str, int]]:
    """Of every block of experts: its layer, how many experts, and what was done with them."""
    told = []
    for layer, counts in sorted(fitted.items()):
        told += [{"layer": layer, **count} for count in counts]
        stored = (w for name, w in view.expert_weights(layer).items() if ".experts." in name)
        if not counts and (weight := next(stored, None)) is not None:
            told.append({"layer": layer, "experts": len(weight), "mapped": 0, "fitted": 0})
    return told


def _choose_shrinkage(
    view: DecoderView,
    plan: PruningPlan,
    tensors: Mapping[str, Tensor],
    sequences: Tensor,
    micro_batch: int,
) -> dict[str, Any]:
    """The part of every change that lowers the held-out cross-entropy most, as a patch's notes."""
    losses: dict[float, float] = {}
    with view.skipping(plan.dropped):
        without = mean_loss(view, sequences, micro_batch)
        for share in SHRINKAGE_GRID:
            with view.patched(interpolate(view, tensors, share)):
                losses[share] = mean_loss(view, sequences, micro_batch)
            progress.status(f"{share:.0%} of the change: loss {losses[share]:.3f}")
            if losses[share] > min(losses.values()):
                break
    best = min(losses, key=lambda share: losses[share])
    accepted = losses[best] < without
    return {
        "held_out_loss_without": without,
        "held_out_loss_with": losses[best],
        "accepted": accepted,
        "shrinkage": best if accepted else 0.0,
        "tensors_changed": len(tensors) if accepted else 0,
    }


def _take_gradient_steps(
    view: DecoderView,
    plan: PruningPlan,
    patch: WeightPatch,
    sequences: Tensor,
    fresh: Tensor,
    micro_batch: int,
    n_steps: int,
    journal: Journal,
) -> WeightPatch:
    """The patch after gradient steps, and the cross-entropy on the sequences held out."""
    try:
        tensors, lengths = take_steps(
            view,
            plan,
            patch.tensors,
            sequences,
            fresh=fresh,
            n_steps=n_steps,
            micro_batch=micro_batch,
            journal=journal,
        )
    except NumericsError as error:
        if view.ranks.world > 1:  # the others may have met nothing of the kind, and go on
            raise
        warnings.warn(f"the refit goes without gradient steps: {error}", stacklevel=2)
        return patch
    with view.skipping(plan.dropped), view.patched(tensors):
        loss = mean_loss(view, sequences, micro_batch)
    before = patch.notes["held_out_loss_with" if patch.tensors else "held_out_loss_without"]
    if not loss < before:
        return replace(patch, notes={**patch.notes, "steps": ()})
    notes = {
        **patch.notes,
        "accepted": True,
        "tensors_changed": len(tensors),
        "steps": lengths,
        "loss_after_steps": loss,
    }
    return replace(patch, tensors=tensors, notes=notes)


def interpolate(view: DecoderView, tensors: Mapping[str, Tensor], share: float) -> ComputedTensors:
    """W + share · (tensor − W) for every tensor, when it is asked for; W is the model's own."""

    def compute(name: str) -> Tensor:
        own = view.model.get_parameter(name).data
        return torch.lerp(own.to(tensors[name]), tensors[name], share)

    return ComputedTensors(tensors, compute)

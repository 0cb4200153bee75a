"""Refit the kept layers, in order, towards the dense residual stream.

Source   ours; METHODS §3
Formula  D = argmin Σ_t w_t ‖e_t − D·a_t‖² + λ·tr(Σ w a aᵀ)/in · ‖D‖²,   W ← W + D
           = (Σ w e aᵀ)(Σ w a aᵀ + λ̂ I)⁻¹
         a_t (in): what W reads; e_t (d) = target_t − output_t of the layer, in the model that is
         pruned and refitted so far; target (d): dense input of the next kept layer
         w_t = 1/‖target_t‖²: a few tokens carry massive activations; unweighted they decide the fit
Rule     from the first cut on, every kept layer (layers: following) or those before a cut (layers:
         cuts); its attention output first (modules: both), then its down-projection. λ from a grid
         on held-out sequences; a change that does not lower their error is not made. In the end
         W + s·D, with the s that has the lowest held-out cross-entropy: least squares overshoots
         where text is short. No change at all if none lowers it. Then gradient_steps steps on the
         held-out sequences (gradient_step.py), half of them for each, the other half its judge.
Cost     one dense and one to two pruned forward passes without the head, in² sums per weight
Limits   needs a kept layer before every cut; exact only where the output is added to the stream
         without a norm in between
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from layercut import progress
from layercut.engine.loss import mean_loss
from layercut.engine.residual_stream import ResidualStream, dense_stream, workplace
from layercut.errors import DataError, NumericsError
from layercut.models.hooks import capture
from layercut.models.output_projections import (
    LinearMap,
    as_stored,
    attention_output,
    check_exact,
    down_projection,
    in_features,
)
from layercut.models.view import DecoderView
from layercut.recovery.gradient_steps import descend
from layercut.registry import MethodOptions
from layercut.spool import Spool
from layercut.types import CalibrationBatches, Evidence, PruningPlan, WeightPatch

NEEDS_PRECEDING = True
REVISION = 2
"""Of what the method computes; figures of an earlier one are not this one's."""

PENALTY_GRID = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
STEP_GRID = (1.0, 0.85, 0.7, 0.55, 0.4, 0.25)


class Options(MethodOptions):
    """Which layers and weights are refitted, the share of sequences held out, and the steps.

    The gradient steps move every linear weight of every kept layer, whatever is refitted. There is
    none where fewer than two sequences are held out.
    """

    layers: Literal["cuts", "following"] = "following"
    modules: Literal["down", "both"] = "both"
    held_out_every: int = Field(default=8, ge=2)
    gradient_steps: int = Field(default=2, ge=0)

    def check(self, view: DecoderView, batches: CalibrationBatches, n_drop: int) -> None:
        """Refuse a model whose MLPs are not one down-projection each, added to the stream."""
        check_refit(view)


def fit(
    view: DecoderView,
    plan: PruningPlan,
    evidence: Evidence | None,
    batches: CalibrationBatches,
    options: Options,
) -> WeightPatch:
    """Walk the dense and the pruned model side by side and correct the pruned one as it goes."""
    held_out = held_out_rows(batches, options.held_out_every)
    tensors = walk(view, plan, dense_stream(view, batches, evidence), held_out, options)
    sequences = batches.input_ids[held_out[:: batches.seq_len]]
    patch = _best_step(view, plan, tensors, sequences, batches.micro_batch)
    if options.gradient_steps and len(sequences) > 1:
        patch = _stepped(view, plan, patch, sequences, batches.micro_batch, options.gradient_steps)
    return patch


def check_refit(view: DecoderView) -> None:
    """Refuse a model that a refit cannot correct exactly, before any long work.

    Raises:
        ModelError: a layer has no single down-projection, or its output is not added as it is.
    """
    for layer in range(view.n_layers):
        down_projection(view, layer)
    check_exact(view, range(view.n_layers))


def walk(
    view: DecoderView,
    plan: PruningPlan,
    dense: ResidualStream,
    held_out: Tensor,
    options: Options,
) -> dict[str, Tensor]:
    """The refitted tensors by name, each fitted in the model that the earlier ones made.

    Args:
        view: the intact model.
        plan: which layers go; not layer 0.
        dense: the calibration set's stream at layer 0; it is moved through the dense model.
        held_out: mask of the tokens that choose λ.
        options: what is refitted.
    """
    first = plan.cuts[0][0] - 1
    while dense.layer < first:
        dense.advance(dense.layer)
    pruned = dense.fork()
    tensors: dict[str, Tensor] = {}
    remaining = [layer for layer in plan.kept if layer >= first]
    for layer in progress.track(remaining, total=len(remaining)):
        while dense.layer < plan.target_of(layer):
            dense.advance(dense.layer)
        if options.layers == "cuts" and plan.target_of(layer) == layer + 1:
            pruned.advance(layer)
        else:
            tensors |= _refit_layer(view, layer, dense, pruned, held_out, options)
    return tensors


def held_out_rows(batches: CalibrationBatches, every: int) -> Tensor:
    """Mask over all calibration tokens: True in every ``every``-th sequence.

    Raises:
        DataError: fewer than two sequences.
    """
    if batches.n_sequences < 2:
        raise DataError(
            f"{batches.n_sequences} calibration sequence is too few to hold any out. Use at least "
            "2, or another recovery."
        )
    every = min(every, batches.n_sequences)
    chosen = torch.arange(batches.n_sequences) % every == every - 1
    return chosen.repeat_interleave(batches.seq_len)


def _refit_layer(
    view: DecoderView,
    layer: int,
    dense: ResidualStream,
    pruned: ResidualStream,
    held_out: Tensor,
    options: Options,
) -> dict[str, Tensor]:
    """Refit one layer's weights and move ``pruned`` past it."""
    changed: dict[str, Tensor] = {}
    attention = attention_output(view, layer) if options.modules == "both" else None
    if attention is not None:
        prefix, module = attention
        ahead = pruned.fork()
        inputs = advance_capturing(ahead, layer, module)
        change = solve(inputs, ahead.states, dense.states, held_out, view.device)
        if change is not None:
            step = as_stored(module, change)
            changed[f"{prefix}.weight"] = module.weight + step.to(module.weight)
    prefix, module = down_projection(view, layer)
    with view.patched(changed):
        inputs = advance_capturing(pruned, layer, module)
    change = solve(inputs, pruned.states, dense.states, held_out, view.device)
    if change is not None:
        changed[f"{prefix}.weight"] = module.weight + as_stored(module, change).to(module.weight)
        # The layer's output is linear in its down-projection: no second forward pass is needed.
        step = change.float().T
        for rows, a in zip(pruned.states.slices(), inputs.slices(), strict=True):
            rows += (a.to(step.device) @ step).to(rows.device)
    return changed


def advance_capturing(stream: ResidualStream, layer: int, module: LinearMap) -> Spool:
    """Move ``stream`` past ``layer`` and return what ``module`` read, (n_tokens, in)."""
    inputs = Spool(len(stream.states), in_features(module))
    with inputs.filling() as write, capture(module, lambda given, _: write(given, given)):
        stream.advance(layer)
    return inputs


def solve(
    inputs: Spool,
    outputs: Spool,
    targets: Spool,
    held_out: Tensor,
    device: torch.device,
) -> Tensor | None:
    """The change D that lowers the held-out error most, (out, in) float64; ``None`` if none does.

    Args:
        inputs: a, (n_tokens, in).
        outputs: the layer's output, (n_tokens, d).
        targets: what it should be, (n_tokens, d).
        held_out: mask of the tokens that choose λ and are not fitted.
        device: where D is computed, and is then, if there is memory for it; else the CPU.
    """
    width, out = inputs.rows.shape[1], outputs.rows.shape[1]
    # Both Gram matrices, the ridged one and its factor; as many of D's shape; slices of rows.
    place = workplace(device, 8 * width * (6 * width + 6 * out) + 2**28)
    gram = torch.zeros(2, width, width, dtype=torch.float64, device=place)
    cross = torch.zeros(2, out, width, dtype=torch.float64, device=place)
    slices = zip(inputs.slices(), outputs.slices(), targets.slices(), strict=True)
    for spooled, held in zip(slices, held_out.split(4096), strict=True):
        # Products of 4,096 rows in float32, their sums in float64.
        (a, output, target), mask = (rows.to(place) for rows in spooled), held.to(place)
        weight = target.norm(dim=1, keepdim=True).clamp_min(1e-6).reciprocal()
        a, e = a * weight, (target - output) * weight
        for part, rows in enumerate((~mask, mask)):
            gram[part] += a[rows].T @ a[rows]
            cross[part] += e[rows].T @ a[rows]
    best, lowest = None, 0.0
    for penalty in PENALTY_GRID:
        ridged = gram[0].clone()
        ridged.diagonal().add_(penalty * gram[0].diagonal().mean())
        factor, info = torch.linalg.cholesky_ex(ridged)
        if int(info) != 0:
            continue
        change = torch.cholesky_solve(cross[0].T, factor).T
        # ‖e − D·a‖² − ‖e‖², summed over the held-out tokens.
        gain = (change @ gram[1] * change).sum() - 2 * (change * cross[1]).sum()
        if float(gain) < lowest:
            best, lowest = change, float(gain)
    return best


def _best_step(
    view: DecoderView,
    plan: PruningPlan,
    tensors: dict[str, Tensor],
    sequences: Tensor,
    micro_batch: int,
) -> WeightPatch:
    """The patch, as large a part of every change as lowers the held-out cross-entropy most."""
    losses: dict[float, float] = {}
    with view.skipping(plan.dropped):
        without = mean_loss(view, sequences, micro_batch)
        for step in STEP_GRID:
            with view.patched(partly(view, tensors, step)):
                losses[step] = mean_loss(view, sequences, micro_batch)
            progress.status(f"{step:.0%} of the change: loss {losses[step]:.3f}")
            if losses[step] > min(losses.values()):
                break
    best = min(losses, key=lambda step: losses[step])
    accepted = losses[best] < without
    notes = {
        "held_out_loss_without": without,
        "held_out_loss_with": losses[best],
        "accepted": accepted,
        "step": best if accepted else 0.0,
        "tensors_changed": len(tensors) if accepted else 0,
    }
    return WeightPatch(partly(view, tensors, best) if accepted else {}, "refit", notes)


def _stepped(
    view: DecoderView,
    plan: PruningPlan,
    patch: WeightPatch,
    sequences: Tensor,
    micro_batch: int,
    n_steps: int,
) -> WeightPatch:
    """The patch after gradient steps, and the cross-entropy on the sequences that they saw."""
    try:
        tensors, lengths = descend(
            view, plan, patch.tensors, sequences, n_steps=n_steps, micro_batch=micro_batch
        )
    except NumericsError as error:
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


def partly(view: DecoderView, tensors: dict[str, Tensor], step: float) -> dict[str, Tensor]:
    """W + step · (tensor − W) for every tensor; W is the model's own."""
    return {
        name: torch.lerp(view.model.get_parameter(name).data.to(tensor), tensor, step)
        for name, tensor in tensors.items()
    }

"""Least squares with a ridge: the sums, the one solver, and the refit of layer after layer.

Everything here is the ridge regression of docs/methods.md#ridge-solver: D = C (G + λ̂ I)⁻¹ with
C = Σ e aᵀ, G = Σ a aᵀ and λ̂ = λ · tr(G)/in; only the rows e and a and their weights differ.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from layercut.engine.residual_stream import (
    ResidualStream,
    accumulation_device,
    advance_and_record_inputs,
)
from layercut.errors import DataError
from layercut.models.output_projections import (
    attention_output,
    check_exact,
    down_projection,
    store_like,
)
from layercut.models.view import DecoderView
from layercut.recovery.paired_walk import KeptLayer, paired_walk
from layercut.spool import Spool
from layercut.types import CalibrationBatches, PruningPlan

PENALTY_GRID = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)


def check_refit(view: DecoderView) -> None:
    """Refuse a model that a refit cannot correct exactly, before any long work.

    Raises:
        ModelError: a layer has no single down-projection, or its output is not added as it is.
    """
    for layer in range(view.n_layers):
        down_projection(view, layer)
    check_exact(view, range(view.n_layers))


def refit_layers(
    view: DecoderView,
    plan: PruningPlan,
    batches: CalibrationBatches,
    held_out: Tensor,
    *,
    layers: Literal["cuts", "following"] = "following",
    modules: Literal["down", "both"] = "both",
    dense: ResidualStream | None = None,
) -> dict[str, Tensor]:
    """The refitted tensors by name, each fitted in the model that the earlier ones made.

    Args:
        view: the intact model.
        plan: which layers go; not layer 0.
        batches: calibration text.
        held_out: mask of the tokens that choose λ.
        layers: the kept layers before a cut, or all from the first cut on.
        modules: down-projections, or attention outputs as well.
        dense: the intact model's stream where it is shared.
    """
    tensors: dict[str, Tensor] = {}
    for kept in paired_walk(view, plan, batches, dense=dense):
        if kept.before_cut or layers == "following":
            tensors |= _refit_layer(view, kept, held_out, attention=modules == "both")
    return tensors


def mask_held_out_rows(batches: CalibrationBatches, every: int) -> Tensor:
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
    view: DecoderView, kept: KeptLayer, held_out: Tensor, *, attention: bool
) -> dict[str, Tensor]:
    """Refit one layer's weights and move the pruned stream past it."""
    layer, pruned = kept.layer, kept.pruned
    changed: dict[str, Tensor] = {}
    output = attention_output(view, layer) if attention else None
    if output is not None:
        prefix, module = output
        ahead = pruned.fork()
        inputs = advance_and_record_inputs(ahead, layer, module)
        update = fit_ridge_update(inputs, ahead.states, kept.target, held_out, view.device)
        if update is not None:
            stored = store_like(module, update).to(module.weight)
            changed[f"{prefix}.weight"] = module.weight + stored
    prefix, module = down_projection(view, layer)
    with view.patched(changed):
        inputs = advance_and_record_inputs(pruned, layer, module)
    update = fit_ridge_update(inputs, pruned.states, kept.target, held_out, view.device)
    if update is not None:
        changed[f"{prefix}.weight"] = module.weight + store_like(module, update).to(module.weight)
        # The layer's output is linear in its down-projection: no second forward pass is needed.
        right = update.float().T
        for rows, a in zip(pruned.states.slices(), inputs.slices(), strict=True):
            rows += (a.to(right.device) @ right).to(rows.device)
    return changed


def fit_ridge_update(
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
    device = accumulation_device(device, 8 * width * (6 * width + 6 * out) + 2**28)
    gram = torch.zeros(2, width, width, dtype=torch.float64, device=device)
    cross = torch.zeros(2, out, width, dtype=torch.float64, device=device)
    slices = zip(inputs.slices(), outputs.slices(), targets.slices(), strict=True)
    for spooled, held in zip(slices, held_out.split(4096), strict=True):
        # Products of 4,096 rows in float32, their sums in float64.
        (a, output, target), mask = (rows.to(device) for rows in spooled), held.to(device)
        weight = target.norm(dim=1, keepdim=True).clamp_min(1e-6).reciprocal()
        a, e = a * weight, (target - output) * weight
        for part, rows in enumerate((~mask, mask)):
            gram[part] += a[rows].T @ a[rows]
            cross[part] += e[rows].T @ a[rows]
    best, lowest = None, 0.0
    for penalty in PENALTY_GRID:
        factor = factor_ridge(gram[0], penalty)
        if factor is None:
            continue
        change = torch.cholesky_solve(cross[0].T, factor).T
        # ‖e − D·a‖² − ‖e‖², summed over the held-out tokens.
        gain = (change @ gram[1] * change).sum() - 2 * (change * cross[1]).sum()
        if float(gain) < lowest:
            best, lowest = change, float(gain)
    return best


def factor_ridge(gram: Tensor, penalty: float) -> Tensor | None:
    """Cholesky factor of G + λ · tr(G)/in · I, (in, in); ``None`` if that is not positive definite.

    Args:
        gram: G = Σ a aᵀ, (in, in) float64.
        penalty: λ, as a share of the mean square of a.
    """
    ridged = gram.clone()
    ridged.diagonal().add_(penalty * gram.diagonal().mean())
    factor, info = torch.linalg.cholesky_ex(ridged)
    return None if int(info) else factor


def sum_products(residual: Spool, output: Spool) -> tuple[Tensor, Tensor]:
    """Σ_t r_t m_tᵀ and Σ_t m_t m_tᵀ, (d, d) float64 each.

    float64 because a few massive activations exceed the rest by orders of magnitude.
    """
    width = output.rows.shape[1]
    cross = torch.zeros(width, width, dtype=torch.float64)
    gram = torch.zeros(width, width, dtype=torch.float64)
    for r, m in zip(residual.slices(), output.slices(), strict=True):
        m64 = m.double()
        cross += r.double().T @ m64
        gram += m64.T @ m64
    return cross, gram


def mean_squared_errors(residual: Spool, output: Spool, projection: Tensor) -> tuple[float, float]:
    """Mean squared distance to the target before and after the projection."""
    change = (projection - torch.eye(len(projection), dtype=projection.dtype)).float()
    before = after = 0.0
    for r, m in zip(residual.slices(), output.slices(), strict=True):
        before += float(r.square().sum(dtype=torch.float64))
        after += float((r - m @ change.T).square().sum(dtype=torch.float64))
    return before / len(residual), after / len(residual)

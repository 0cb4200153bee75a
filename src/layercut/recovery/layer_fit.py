"""The refit of layer after layer, and the sums of a linear map, by `layercut.recovery.ridge`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping
from typing import Literal

import torch
from torch import Tensor

from layercut.engine.journal import NO_JOURNAL, Journal
from layercut.engine.residual_stream import ResidualStream, advance_and_record_inputs
from layercut.errors import DataError
from layercut.models.output_projections import (
    attention_output,
    check_exact,
    down_projection,
)
from layercut.models.view import DecoderView
from layercut.models.weight_store import make_store
from layercut.recovery.paired_walk import KeptLayer, paired_walk
from layercut.recovery.refit_records import (
    ATTENTION,
    DOWN,
    add_update,
    recall_layers,
    recall_update,
)
from layercut.recovery.ridge import Shape, fast_products, fit_best_penalty
from layercut.spool import SLICE, Spool, choose_device
from layercut.types import CalibrationBatches, PruningPlan


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
    journal: Journal = NO_JOURNAL,
) -> Mapping[str, Tensor]:
    """The refitted tensors by name, each fitted in the model that the earlier ones made.

    Args:
        view: the intact model.
        plan: which layers go; not layer 0.
        batches: calibration text.
        held_out: mask of the tokens that choose λ.
        layers: the kept layers before a cut, or all from the first cut on.
        modules: down-projections, or attention outputs as well.
        dense: the intact model's stream where it is shared.
        journal: records every change.
    """
    cuts_only, both = layers == "cuts", modules == "both"
    known = recall_layers(view, plan, journal, cuts_only=cuts_only, attention=both)
    if known is not None:
        return known
    walk = paired_walk(view, plan, batches, dense=dense)
    return _refit(view, plan, walk, held_out, journal, cuts_only=cuts_only, attention=both)[0]


def refit_cuts(
    view: DecoderView,
    plan: PruningPlan,
    batches: CalibrationBatches,
    held_out: Tensor,
    dense: ResidualStream,
) -> ResidualStream:
    """The stream of the pruned model whose down-projections before the cuts are refitted.

    Args:
        view: the intact model; unchanged afterwards.
        plan: which layers go; not layer 0.
        batches: calibration text.
        held_out: mask of the tokens that choose λ.
        dense: the intact model's stream.

    Returns:
        It, behind the last refitted layer: at the layer after the last cut.
    """
    walk = paired_walk(view, plan, batches, dense=dense)
    return _refit(view, plan, walk, held_out, NO_JOURNAL, cuts_only=True, attention=False)[1]


def _refit(
    view: DecoderView,
    plan: PruningPlan,
    walk: Iterator[KeptLayer],
    held_out: Tensor,
    journal: Journal,
    *,
    cuts_only: bool,
    attention: bool,
) -> tuple[MutableMapping[str, Tensor], ResidualStream]:
    """The refitted tensors, and the pruned stream at the layer after the last refitted one."""
    tensors = make_store(view)
    last = plan.cuts[-1][0] - 1 if cuts_only else plan.kept[-1]
    for kept in walk:
        if kept.before_cut or not cuts_only:
            with view.holding(kept.layer):
                tensors.update(
                    _refit_layer(view, kept, held_out, attention=attention, journal=journal)
                )
        if kept.layer == last:  # nothing behind it is refitted, and nothing need run
            break
    kept.pruned.layer = plan.target_of(last)
    return tensors, kept.pruned


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
    view: DecoderView,
    kept: KeptLayer,
    held_out: Tensor,
    *,
    attention: bool,
    journal: Journal = NO_JOURNAL,
) -> dict[str, Tensor]:
    """Refit one layer's weights and move the pruned stream past it; recorded changes are taken."""
    layer, pruned, target = kept.layer, kept.pruned, kept.target
    changed: dict[str, Tensor] = {}
    output = attention_output(view, layer) if attention else None
    if output is not None:
        prefix, module = output

        def fit_attention() -> Tensor | None:
            ahead = pruned.fork()
            inputs = advance_and_record_inputs(ahead, layer, module)
            return fit_ridge_update(inputs, ahead.states, target, held_out, view.device)

        update = recall_update(journal, ATTENTION, layer, fit_attention)
        if update is not None:
            changed[f"{prefix}.weight"] = add_update(module, update)
    prefix, module = down_projection(view, layer)
    with view.patched(changed):
        inputs = advance_and_record_inputs(pruned, layer, module)

    def fit_down() -> Tensor | None:
        return fit_ridge_update(inputs, pruned.states, target, held_out, view.device)

    update = recall_update(journal, DOWN, layer, fit_down)
    if update is not None:
        changed[f"{prefix}.weight"] = add_update(module, update)
        # The layer's output is linear in its down-projection: no second forward pass is needed.
        right = update.T
        with fast_products(right.device):
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
    """The change D that lowers the held-out error most, (out, in); ``None`` if none does.

    Args:
        inputs: a, (n_tokens, in).
        outputs: the layer's output, (n_tokens, d).
        targets: what it should be, (n_tokens, d).
        held_out: mask of the tokens that choose λ and are not fitted.
        device: where D is computed, and is then, if there is memory for it; else the CPU.
    """
    width, out = inputs.rows.shape[1], outputs.rows.shape[1]
    n_held_out = int(held_out.sum())
    n_fitted = len(held_out) - n_held_out
    side = min(n_fitted, width)
    # The Gram matrix, ridged and factored; two solutions, the right side and D; the rows of the
    # tokens' side and the held-out ones; slices.
    n_bytes = 8 * side * (3 * side + 5 * out) + 4 * (side + n_held_out) * (width + out) + 2**28
    device = choose_device(device, n_bytes)

    def pick(mask: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        slices = zip(inputs.slices(), outputs.slices(), targets.slices(), strict=True)
        for spooled, chosen in zip(slices, mask.split(SLICE), strict=True):
            index = chosen.nonzero().squeeze(1)
            a, output, target = (rows[index.to(rows.device)].to(device) for rows in spooled)
            weight = target.norm(dim=1, keepdim=True).clamp_min(1e-6).reciprocal()
            yield a * weight, (target - output) * weight

    shape = Shape(n_fitted, n_held_out, width, out)
    return fit_best_penalty(pick(~held_out), pick(held_out), shape, device)


def sum_products(residual: Spool, output: Spool) -> tuple[Tensor, Tensor]:
    """Σ_t r_t m_tᵀ and Σ_t m_t m_tᵀ, (d, d) float64 each.

    float64 because a few massive activations exceed the rest by orders of magnitude.
    """
    width = output.rows.shape[1]
    cross = torch.zeros(width, width, dtype=torch.float64, device=output.device)
    gram = torch.zeros_like(cross)
    for r, m in zip(residual.slices(), output.slices(), strict=True):
        m64 = m.double()
        cross += r.to(m64).T @ m64
        gram += m64.T @ m64
    return cross, gram


def mean_squared_errors(residual: Spool, output: Spool, projection: Tensor) -> tuple[float, float]:
    """Mean squared distance to the target before and after the projection."""
    change = (projection - torch.eye(len(projection)).to(projection)).float().to(output.device)
    errors = torch.zeros(2, dtype=torch.float64, device=output.device)
    for r, m in zip(residual.slices(), output.slices(), strict=True):
        r = r.to(m.device)
        errors[0] += r.square().sum(dtype=torch.float64)
        errors[1] += (r - m @ change.T).square().sum(dtype=torch.float64)
    before, after = (errors / len(residual)).tolist()
    return before, after

"""The refit of layer after layer, and the sums of a linear map, by `layercut.recovery.ridge`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from layercut.engine.residual_stream import ResidualStream, advance_and_record
from layercut.errors import DataError, ModelError
from layercut.models.view import DecoderView
from layercut.models.weight_store import make_store
from layercut.models.writers import Writer, find_writers
from layercut.recovery.paired_walk import KeptLayer, paired_walk
from layercut.recovery.ridge import fast_products
from layercut.recovery.writer_fit import WriterRows, fit_writer
from layercut.spool import Spool
from layercut.types import CalibrationBatches, PruningPlan


def check_refit(view: DecoderView) -> None:
    """Refuse a model of which a refit could correct nothing, before any long work.

    Raises:
        ModelError: no layer writes to the residual stream by a way that is known.
    """
    if not any(find_writers(view)):
        raise ModelError(
            f"no layer of this {view.layout.model_type} model writes to the residual stream by a "
            "projection that a refit could correct (a norm over the stream, a gate or experts "
            "stand between). Set recovery.method: none, and selection.strategy: lowest."
        )


def refit_layers(
    view: DecoderView,
    plan: PruningPlan,
    batches: CalibrationBatches,
    held_out: Tensor,
    *,
    layers: Literal["cuts", "following"] = "following",
    modules: Literal["down", "both"] = "both",
    dense: ResidualStream | None = None,
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
    """
    walk = paired_walk(view, plan, batches, dense=dense)
    cuts_only, both = layers == "cuts", modules == "both"
    return _refit(view, plan, walk, held_out, cuts_only=cuts_only, attention=both)[0]


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
    return _refit(view, plan, walk, held_out, cuts_only=True, attention=False)[1]


def _refit(
    view: DecoderView,
    plan: PruningPlan,
    walk: Iterator[KeptLayer],
    held_out: Tensor,
    *,
    cuts_only: bool,
    attention: bool,
) -> tuple[MutableMapping[str, Tensor], ResidualStream]:
    """The refitted tensors, and the pruned stream at the layer after the last refitted one."""
    tensors = make_store(view)
    writers = find_writers(view)
    last = plan.cuts[-1][0] - 1 if cuts_only else plan.kept[-1]
    for kept in walk:
        if kept.before_cut or not cuts_only:
            chosen = [w for w in writers[kept.layer] if attention or w.is_mlp]
            with view.holding(kept.layer):
                tensors.update(_refit_layer(view, kept, held_out, chosen))
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
    view: DecoderView, kept: KeptLayer, held_out: Tensor, writers: Sequence[Writer]
) -> dict[str, Tensor]:
    """Refit one layer's weights, attention before MLP, and move the pruned stream past it."""
    layer, pruned = kept.layer, kept.pruned
    changed: dict[str, Tensor] = {}
    for writer in writers:
        ahead = pruned.fork()
        with view.patched(changed):
            inputs, outputs = advance_and_record(ahead, layer, writer.module)
        rows = WriterRows(inputs, outputs, ahead.states, kept.target, held_out)
        new, change = fit_writer(view, writer, rows)
        changed |= new
        if writer is writers[-1] and ((writer.is_plain and writer.is_mlp) or not new):
            # The layer's output is linear in its down-projection: no second forward pass is needed.
            if change is not None:
                _add_products(ahead.states, inputs, change)
            pruned.states, pruned.layer = ahead.states, ahead.layer
    if pruned.layer <= layer:
        with view.patched(changed):
            pruned.advance(layer)
    return changed


def _add_products(rows: Spool, inputs: Spool, change: Tensor) -> None:
    """Rows += a·Dᵀ."""
    right = change.float().T
    with fast_products(right.device):
        for part, a in zip(rows.slices(), inputs.slices(), strict=True):
            part += (a.to(right.device) @ right).to(part.device)


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

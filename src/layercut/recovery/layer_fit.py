"""The refit of layer after layer, and the sums of a linear map, by `layercut.recovery.ridge`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from layercut.engine.journal import NO_JOURNAL, Journal
from layercut.engine.residual_stream import ResidualStream, advance_and_record
from layercut.errors import DataError
from layercut.models.ranks import ALONE, Ranks
from layercut.models.view import DecoderView
from layercut.models.weight_store import make_store
from layercut.models.writers import Writer, find_writers
from layercut.recovery.expert_fit import fit_experts, is_same_norm, record_writer
from layercut.recovery.paired_walk import KeptLayer, paired_walk
from layercut.recovery.refit_records import (
    RefittedLayer,
    RefittedLayers,
    recall_layer,
    recall_layers,
)
from layercut.recovery.ridge import fast_products
from layercut.recovery.writer_fit import WriterRows, fit_writer
from layercut.spool import Spool
from layercut.types import CalibrationBatches, PruningPlan

LayerWriters = Sequence[Sequence[Writer]]
"""Every layer's writers, attention before MLP."""


def refit_layers(
    view: DecoderView,
    plan: PruningPlan,
    batches: CalibrationBatches,
    held_out: Tensor,
    *,
    layers: Literal["cuts", "following"] = "following",
    modules: Literal["down", "both"] = "both",
    dense: ResidualStream | None = None,
    writers: LayerWriters | None = None,
    journal: Journal = NO_JOURNAL,
) -> RefittedLayers:
    """The refitted layers, each fitted in the model that the earlier ones made.

    Args:
        view: the intact model.
        plan: which layers go; not layer 0.
        batches: this rank's share of the calibration text.
        held_out: mask of its tokens that choose λ.
        layers: the kept layers before a cut, or all from the first cut on.
        modules: down-projections, or attention outputs as well.
        dense: the intact model's stream where it is shared.
        writers: of every layer, where they are known.
        journal: records every change.
    """
    cuts_only, both = layers == "cuts", modules == "both"
    known = recall_layers(plan, journal, cuts_only=cuts_only)
    if known is not None:
        return known
    writers = find_writers(view) if writers is None else writers
    if not both:
        writers = [[w for w in found if w.is_mlp] or found[-1:] for found in writers]
    walk = paired_walk(view, plan, batches, dense=dense)
    return _refit(view, plan, walk, writers, held_out, journal, cuts_only=cuts_only)[0]


def refit_cuts(
    view: DecoderView,
    plan: PruningPlan,
    batches: CalibrationBatches,
    held_out: Tensor,
    dense: ResidualStream,
    writers: LayerWriters,
) -> ResidualStream:
    """The stream of the pruned model whose last writers before the cuts are refitted.

    Args:
        view: the intact model; unchanged afterwards.
        plan: which layers go; not layer 0.
        batches: this rank's share of the calibration text.
        held_out: mask of its tokens that choose λ.
        dense: the intact model's stream.
        writers: of every layer.

    Returns:
        It, behind the last refitted layer: at the layer after the last cut.
    """
    walk = paired_walk(view, plan, batches, dense=dense)
    last = [found[-1:] for found in writers]
    # A block of experts has one map for all of them: whole refits are for the plan that is chosen.
    return _refit(view, plan, walk, last, held_out, NO_JOURNAL, cuts_only=True, one_map=True)[1]


def _refit(
    view: DecoderView,
    plan: PruningPlan,
    walk: Iterator[KeptLayer],
    writers: LayerWriters,
    held_out: Tensor,
    journal: Journal,
    *,
    cuts_only: bool,
    one_map: bool = False,
) -> tuple[RefittedLayers, ResidualStream]:
    """The refitted layers, and the pruned stream at the layer after the last refitted one."""
    tensors, experts = make_store(view), {}
    last = plan.cuts[-1][0] - 1 if cuts_only else plan.kept[-1]
    for kept in walk:
        if kept.before_cut or not cuts_only:
            with view.holding(kept.layer):
                found = writers[kept.layer]
                fitted = _refit_layer(view, kept, held_out, found, journal, one_map=one_map)
                tensors.update(fitted.tensors)
                experts[kept.layer] = fitted.experts
        if kept.layer == last:  # nothing behind it is refitted, and nothing need run
            break
    kept.pruned.layer = plan.target_of(last)
    return RefittedLayers(tensors, experts), kept.pruned


def choose_held_out(batches: CalibrationBatches, every: int) -> Tensor:
    """Mask over all sequences, (n_sequences,): True for every ``every``-th.

    Raises:
        DataError: fewer than two sequences.
    """
    if batches.n_sequences < 2:
        raise DataError(
            f"{batches.n_sequences} calibration sequence is too few to hold any out. Use at least "
            "2, or another recovery."
        )
    every = min(every, batches.n_sequences)
    return torch.arange(batches.n_sequences) % every == every - 1


def mask_held_out_rows(batches: CalibrationBatches, every: int, ranks: Ranks = ALONE) -> Tensor:
    """Mask over the tokens of this rank's share of ``batches``: True in the sequences held out.

    Raises:
        DataError: fewer than two sequences.
    """
    return ranks.share(choose_held_out(batches, every)).repeat_interleave(batches.seq_len)


def _refit_layer(
    view: DecoderView,
    kept: KeptLayer,
    held_out: Tensor,
    writers: Sequence[Writer],
    journal: Journal = NO_JOURNAL,
    *,
    one_map: bool = False,
) -> RefittedLayer:
    """Refit one layer's weights and move the pruned stream past it; a recorded refit is taken."""
    layer, pruned = kept.layer, kept.pruned
    states: list[Spool] = []

    def fit() -> RefittedLayer:
        fitted, ahead = _fit_writers(view, kept, held_out, writers, one_map=one_map)
        if ahead is not None:
            states.append(ahead.states)
        return fitted

    fitted = recall_layer(journal, layer, fit)
    if states:
        pruned.states, pruned.layer = states[0], layer + 1
    elif fitted.change is not None:
        last = f"{writers[-1].prefix}."
        before = {n: t for n, t in fitted.tensors.items() if not n.startswith(last)}
        with view.patched(before):
            inputs = advance_and_record(pruned, layer, writers[-1].module)
        _add_products(pruned.states, inputs, fitted.change)
    else:
        with view.patched(fitted.tensors):
            pruned.advance(layer)
    return fitted


def _fit_writers(
    view: DecoderView,
    kept: KeptLayer,
    held_out: Tensor,
    writers: Sequence[Writer],
    *,
    one_map: bool,
) -> tuple[RefittedLayer, ResidualStream | None]:
    """The refitted layer, attention before MLP.

    Returns:
        It; and the pruned stream behind the layer, where it is known without another forward pass.
    """
    fitted = RefittedLayer()
    beside: list[tuple[Writer, Spool, Tensor]] = []
    for place, writer in enumerate(writers):
        ahead = kept.pruned.fork()
        with view.patched(fitted.tensors):
            inputs, outputs, routing = record_writer(ahead, kept.layer, writer, routing=not one_map)
        rows = WriterRows(inputs, outputs, ahead.states, kept.target, held_out, view.ranks)
        if writer.experts is not None:
            new, counts = fit_experts(view, writer, rows, routing, beside)
            fitted.experts += (counts,)
            change = None
        else:
            # A gain is fitted once, behind the last of the writers that its norm reads.
            later = writers[place + 1 :]
            shared = writer.norm and any(is_same_norm(other, writer) for other in later)
            new, change = fit_writer(view, writer, rows, gain=not shared)
        fitted.tensors |= new
        if writer.is_mlp and writer.experts is None and writers[-1].experts is not None:
            name = f"{writer.prefix}.weight"
            beside.append((writer, inputs, fitted.tensors.get(name, writer.module.weight)))
        if writer is not writers[-1]:
            continue
        if not new:
            return fitted, ahead
        if writer.is_mlp and change is not None:
            _add_products(ahead.states, inputs, change)
            fitted.change = change
            return fitted, ahead
    return fitted, None


def _add_products(rows: Spool, inputs: Spool, change: Tensor) -> None:
    """Rows += a·Dᵀ."""
    right = change.float().T
    with fast_products(right.device):
        for part, a in zip(rows.slices(), inputs.slices(), strict=True):
            part += (a.to(right.device) @ right).to(part.device)


def sum_products(residual: Spool, output: Spool, ranks: Ranks = ALONE) -> tuple[Tensor, Tensor]:
    """Σ_t r_t m_tᵀ and Σ_t m_t m_tᵀ over all ranks' rows, (d, d) float64 each.

    float64 because a few massive activations exceed the rest by orders of magnitude.
    """
    width = output.rows.shape[1]
    cross = torch.zeros(width, width, dtype=torch.float64, device=output.device)
    gram = torch.zeros_like(cross)
    for r, m in zip(residual.slices(), output.slices(), strict=True):
        m64 = m.double()
        cross += r.to(m64).T @ m64
        gram += m64.T @ m64
    ranks.sum_(cross, gram)
    return cross, gram


def mean_squared_errors(
    residual: Spool, output: Spool, projection: Tensor, ranks: Ranks = ALONE
) -> tuple[float, float]:
    """Mean squared distance to the target before and after the projection, of all ranks' rows."""
    change = (projection - torch.eye(len(projection)).to(projection)).float().to(output.device)
    errors = torch.zeros(2, dtype=torch.float64, device=output.device)
    for r, m in zip(residual.slices(), output.slices(), strict=True):
        r = r.to(m.device)
        errors[0] += r.square().sum(dtype=torch.float64)
        errors[1] += (r - m @ change.T).square().sum(dtype=torch.float64)
    before, after, n_rows = ranks.total(*errors.tolist(), len(residual))
    return before / n_rows, after / n_rows

"""How far the mean output of every kept layer moves when layers are dropped (GradMAP, stage 2).

Source   arXiv:2602.14649, stage 2; docs/methods.md#projection
Formula  δ_k = ‖mean_t(h^pruned_{k,out} − target_k)‖₂;  relative: δ_k / mean_t ‖target_k‖₂
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from layercut.engine.residual_stream import ResidualStream, advance_and_record_outputs
from layercut.errors import NumericsError
from layercut.models.output_projections import mlp_output
from layercut.models.view import DecoderView
from layercut.recovery.paired_walk import paired_walk
from layercut.spool import Spool
from layercut.types import CalibrationBatches, PruningPlan


@dataclass(frozen=True, slots=True)
class Size:
    """How far one kept layer's mean output moves.

    Attributes:
        layer: its index in the input model.
        before_cut: whether the next layer is dropped.
        norm: δ.
        relative: δ over the mean length of the target.
    """

    layer: int
    before_cut: bool
    norm: float
    relative: float


@dataclass(slots=True)
class Shift:
    """A mean shift with the rows that a fit needs.

    Attributes:
        size: how far, and where.
        residual: r, (n_tokens, d).
        output: m, (n_tokens, d).
        lengths: ‖target‖, (n_tokens, 1).
    """

    size: Size
    residual: Spool
    output: Spool
    lengths: Tensor

    def weigh(self) -> None:
        """Divide the rows by the target's length, and multiply them by its mean, in place."""
        weights = self.lengths.mean() / self.lengths.clamp_min(1e-6)
        for rows in (self.residual, self.output):
            rows.rows.mul_(weights.to(rows.device))


def walk_shifts(
    view: DecoderView,
    plan: PruningPlan,
    batches: CalibrationBatches,
    dense: ResidualStream | None,
    is_wanted: Callable[[Size], bool],
) -> Iterator[Shift]:
    """Walk the dense and the pruned model side by side and compare every kept layer's output.

    Args:
        view: the intact model.
        plan: which layers go.
        batches: calibration text of all ranks.
        dense: the intact model's stream over this rank's share, where it is known.
        is_wanted: whether rows are made of a layer, and it is given on.
    """
    own, n_tokens = view.ranks.share_batches(batches), batches.n_sequences * batches.seq_len
    for kept in paired_walk(view, plan, own, dense=dense):
        module = mlp_output(view, kept.layer).module
        output = advance_and_record_outputs(kept.pruned, kept.layer, module)
        total = torch.zeros(view.hidden_size + 1, dtype=torch.float64)
        lengths = []
        for ours, target in zip(kept.pruned.states.slices(), kept.target.slices(), strict=True):
            moved = (ours - target.to(ours.device)).sum(dim=0, dtype=torch.float64)
            lengths.append(target.norm(dim=1, keepdim=True))
            total[:-1] += moved.to(total.device)
            total[-1] += lengths[-1].sum(dtype=torch.float64).to(total.device)
        view.ranks.sum_(total)
        norm = float((total[:-1] / n_tokens).norm())
        relative = norm * n_tokens / max(float(total[-1]), 1e-30)
        size = Size(kept.layer, kept.before_cut, norm, relative)
        if is_wanted(size):
            yield Shift(size, kept.missing(), output, torch.cat(lengths))


def find_largest_mean_shift(
    view: DecoderView,
    plan: PruningPlan,
    batches: CalibrationBatches,
    dense: ResidualStream | None = None,
    *,
    relative: bool = False,
) -> Shift:
    """The kept layer whose mean output moves furthest, or furthest for its length.

    Raises:
        NumericsError: no kept layer's mean shift is a number.
    """
    largest = -1.0

    def is_larger(size: Size) -> bool:
        nonlocal largest
        own = size.relative if relative else size.norm
        larger = own > largest
        largest = own if larger else largest
        return larger

    best = None
    for shift in walk_shifts(view, plan, batches, dense, is_larger):
        best = shift
    if best is None:
        raise NumericsError(
            "the mean shift is NaN at every kept layer: the pruned model's activations are not "
            "finite. Drop fewer layers, or use dtype: float32."
        )
    return best

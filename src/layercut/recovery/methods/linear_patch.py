"""One scale per rotated channel at every cut, in memory (LinearPatch, untrained).

Source   arXiv:2505.24680 §3, untrained; docs/methods.md#linear-patch
Formula  x ← x·A,  A = H·diag(r)·Hᵀ,  r_k = mean_s ‖(target·H)_{s,k}‖₁ / ‖(x·H)_{s,k}‖₁
         x (d): output of the kept layer before the cut, in the model that is pruned and repaired so
         far; target (d): dense input of the next kept layer; norms over the tokens of sequence s
         [released code]; H (d, d): normalised Hadamard matrix, in equal blocks where d is no power
         of two [our reading]
Cost     one dense and one pruned forward pass without the head
Limits   needs a kept layer before every cut; no checkpoint holds the result, so `compare` alone
         takes it
"""

from __future__ import annotations

import torch
from torch import Tensor

from layercut.engine.residual_stream import ResidualStream
from layercut.models.ranks import ALONE, Ranks
from layercut.models.view import DecoderView
from layercut.recovery.methods.magnitude_rescale import channel_ratios
from layercut.recovery.runtime_maps import fit_maps
from layercut.registry import Method, MethodOptions
from layercut.spool import Spool
from layercut.types import CalibrationBatches, Evidence, PruningPlan, RuntimeMaps


class Options(MethodOptions):
    """No options."""


METHOD = Method(needs_previous_layer=True, shares_dense_stream=True, stores=False)


def fit(
    view: DecoderView,
    plan: PruningPlan,
    evidence: Evidence | None,
    batches: CalibrationBatches,
    options: Options,
    *,
    dense: ResidualStream | None = None,
) -> RuntimeMaps:
    """Walk the dense and the pruned model side by side and fit A at every cut."""
    maps = fit_maps(
        view,
        plan,
        batches,
        lambda kept: fit_map(kept.pruned.states, kept.target, batches.seq_len, view.ranks),
        dense=dense,
    )
    return RuntimeMaps(maps, "linear-patch")


def fit_map(stream: Spool, target: Spool, seq_len: int, ranks: Ranks = ALONE) -> Tensor:
    """A = H·diag(r)·Hᵀ, (d, d) float32."""
    rotation = hadamard(stream.rows.shape[1]).to(stream.device)
    ratios = channel_ratios(stream, target, seq_len, rotation, ranks).float()
    return rotation * ratios @ rotation.T


def hadamard(width: int) -> Tensor:
    """Normalised Hadamard matrix, or blocks of one; orthogonal, (width, width) float32.

    Sylvester's construction needs a power of two: other widths get equal blocks of the largest
    power of two that divides them, e.g. 9 of 64 for 576.
    """
    largest = width & -width
    block = torch.ones(1, 1)
    while len(block) < largest:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    return torch.kron(torch.eye(width // largest), block / largest**0.5)

"""One matrix at every cut, by ridge regression towards the identity, in memory (Ghosted Layers).

Source   Ghosted Layers, arXiv:2605.15491; docs/methods.md#ghost
Formula  x ← x·A,  A = I + (XᵀX + ε̂I)⁻¹Xᵀ(target − X),  ε̂ = ε·tr(XᵀX)/d [our reading: a share of
         the mean square, so that it does not depend on tokens or scale]
         x (d), X (tokens, d): output of the kept layer before the cut, in the model that is pruned
         and repaired so far; target (tokens, d): dense input of the next kept layer
Cost     one dense and one pruned forward pass without the head; d² float64 sums per cut
Limits   needs a kept layer before every cut; no checkpoint holds the result, so `compare` alone
         takes it
"""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from layercut.engine.residual_stream import ResidualStream
from layercut.models.ranks import ALONE, Ranks
from layercut.models.view import DecoderView
from layercut.recovery.methods.projection import solve_closed_form
from layercut.recovery.runtime_maps import fit_maps
from layercut.registry import Method, MethodOptions
from layercut.spool import Spool
from layercut.types import CalibrationBatches, Evidence, PruningPlan, RuntimeMaps


class Options(MethodOptions):
    """The ridge penalty."""

    epsilon: float = Field(
        default=1e-4,
        gt=0,
        allow_inf_nan=False,
        description="ridge penalty, as a share of the stream's mean square",
    )


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
        lambda kept: fit_map(kept.missing(), kept.pruned.states, options.epsilon, view.ranks),
        dense=dense,
    )
    return RuntimeMaps(maps, "ghost")


def fit_map(missing: Spool, stream: Spool, epsilon: float, ranks: Ranks = ALONE) -> Tensor:
    """A, (d, d) float32: the projection's equations with the whole stream as the MLP's output."""
    return solve_closed_form(missing, stream, epsilon, ranks).T.float()

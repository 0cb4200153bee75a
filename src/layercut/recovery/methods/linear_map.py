"""One linear map of the MLP's output before every cut, folded into its weights (ReplaceMe).

Source   arXiv:2505.02819 §3, the least-squares form; docs/methods.md#linear-map
Formula  T = argmin Σ_t ‖m_t·T + y_t − target_t‖² + α̂‖T‖²
           = (Σ m mᵀ + α̂ I)⁻¹ Σ m (target − y)ᵀ,  α̂ = α·tr(Σ m mᵀ)/d
         m (d): output of the MLP of the kept layer before the cut, with its bias; y (d): what the
         layer adds it to; target (d): dense input of the next kept layer
Cost     one dense and one pruned forward pass without the head; d² float64 sums per cut
Limits   needs a kept layer before every cut; exact only where the MLP's output is added to the
         stream without a norm in between. The penalty pulls T towards 0, i.e. towards no MLP at all
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from layercut.engine.residual_stream import ResidualStream, advance_and_record_outputs
from layercut.errors import NumericsError
from layercut.models.output_projections import check_exact, fold, mlp_output
from layercut.models.ranks import ALONE, Ranks
from layercut.models.view import DecoderView
from layercut.recovery.layer_fit import mean_squared_errors, sum_products
from layercut.recovery.paired_walk import paired_walk
from layercut.recovery.ridge import factor_ridge
from layercut.registry import Method, MethodOptions
from layercut.spool import Spool
from layercut.types import CalibrationBatches, Evidence, PruningPlan, WeightPatch

LEAST_ALPHA = 1e-9
"""Of directions that m does not span, float64 then takes none, and of the others nearly all."""


class Options(MethodOptions):
    """The ridge penalty."""

    alpha: float = Field(
        default=0.0,
        ge=0,
        allow_inf_nan=False,
        description="penalty on the squared map, as a share of the MLP output's mean square",
    )


METHOD = Method(
    needs_previous_layer=True,
    shares_dense_stream=True,
    check=lambda view, batches, options, n_drop: check_exact(view, range(view.n_layers)),
)


def fit(
    view: DecoderView,
    plan: PruningPlan,
    evidence: Evidence | None,
    batches: CalibrationBatches,
    options: Options,
    *,
    dense: ResidualStream | None = None,
) -> WeightPatch:
    """Walk the dense and the pruned model side by side and fit a map at every cut."""
    tensors: dict[str, Tensor] = {}
    cuts = []
    ranks = view.ranks
    for kept in paired_walk(view, plan, ranks.share_batches(batches), dense=dense):
        if not kept.before_cut:
            continue
        mlp = mlp_output(view, kept.layer)
        output = advance_and_record_outputs(kept.pruned, kept.layer, mlp.module)
        missing = kept.missing()
        projection = fit_linear_map(missing, output, options.alpha, ranks)
        before, after = mean_squared_errors(missing, output, projection, ranks)
        _map_outputs(kept.pruned.states, output, projection)
        with view.holding(kept.layer):
            tensors |= fold(view, mlp, projection)
        cuts.append({"layer": kept.layer, "squared_error_before": before, "squared_error": after})
    return WeightPatch(tensors, "linear-map", {"cuts": cuts})


def fit_linear_map(missing: Spool, mlp: Spool, alpha: float, ranks: Ranks = ALONE) -> Tensor:
    """Tᵀ, (d, d) float64; the identity where the MLP adds nothing that could be mapped.

    Args:
        missing: target − y − m, (n_tokens, d).
        mlp: m, (n_tokens, d).
        alpha: penalty, as a share of the mean square of m.
        ranks: who has the other rows.

    Raises:
        NumericsError: the normal equations cannot be solved.
    """
    cross, gram = sum_products(missing, mlp, ranks)
    if float(gram.diagonal().mean()) == 0:
        return torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    factor = factor_ridge(gram, max(alpha, LEAST_ALPHA))
    if factor is None:
        raise NumericsError(
            "the linear map's normal equations cannot be solved: the activations are not finite. "
            "Drop fewer layers, or use dtype: float32."
        )
    # Σ (target − y) mᵀ = Σ (missing + m) mᵀ
    return torch.cholesky_solve((cross + gram).T, factor).T


def _map_outputs(outputs: Spool, mlp: Spool, projection: Tensor) -> None:
    """Turn y + m into y + m·T, in place: the layer's output is linear in its MLP's."""
    change = (projection - torch.eye(len(projection)).to(projection)).float()
    for rows, m in zip(outputs.slices(), mlp.slices(), strict=True):
        rows += (m @ change.T.to(m.device)).to(rows.device)

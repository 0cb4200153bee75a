"""One linear map of the MLP's output before every cut, folded into its weights (ReplaceMe).

Source   arXiv:2505.02819 §3, the least-squares form
Formula  T = argmin Σ_t ‖m_t·T + y_t − target_t‖² + α̂‖T‖²
           = (Σ m mᵀ + α̂ I)⁻¹ Σ m (target − y)ᵀ,  α̂ = α·tr(Σ m mᵀ)/d
         m (d): output of the MLP of the kept layer before the cut, with its bias; y (d): what the
         layer adds it to; target (d): dense input of the next kept layer
         W_down ← Tᵀ·W_down, bias ← Tᵀ·bias; the same for every expert where the MLP is a mixture
Rule     cuts in order, m and y those of the model that is pruned and repaired so far. α is a share
         of the mean square of m [our reading: the paper's is absolute, so that its effect changes
         with the number of tokens and the scale of the model]; the released default is 0
Cost     one dense and one pruned forward pass without the head; d² float64 sums per cut
Limits   needs a kept layer before every cut; exact only where the MLP's output is added to the
         stream without a norm in between. The penalty pulls T towards 0, i.e. towards no MLP at all
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from layercut import progress
from layercut.engine.residual_stream import dense_stream
from layercut.errors import NumericsError
from layercut.models.hooks import capture
from layercut.models.output_projections import check_exact, fold, mlp_output
from layercut.models.view import DecoderView
from layercut.recovery.methods.projection import errors, normal_equations
from layercut.registry import MethodOptions
from layercut.spool import Spool
from layercut.types import CalibrationBatches, Evidence, PruningPlan, WeightPatch

NEEDS_PRECEDING = True
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

    def check(self, view: DecoderView, batches: CalibrationBatches, n_drop: int) -> None:
        """Refuse a model whose MLPs do not add their output to the stream as it is."""
        check_exact(view, range(view.n_layers))


def fit(
    view: DecoderView,
    plan: PruningPlan,
    evidence: Evidence | None,
    batches: CalibrationBatches,
    options: Options,
) -> WeightPatch:
    """Walk the dense and the pruned model side by side and fit a map at every cut."""
    first = plan.cuts[0][0] - 1
    dense = dense_stream(view, batches, evidence)
    while dense.layer < first:
        dense.advance(dense.layer)
    pruned = dense.fork()
    tensors: dict[str, Tensor] = {}
    cuts = []
    remaining = [layer for layer in plan.kept if layer >= first]
    for layer in progress.track(remaining, total=len(remaining)):
        target = plan.target_of(layer)
        while dense.layer < target:
            dense.advance(dense.layer)
        if target == layer + 1:
            pruned.advance(layer)
            continue
        mlp = mlp_output(view, layer)
        output = Spool(len(pruned.states), view.hidden_size)
        with output.filling() as write, capture(mlp.module, write):
            pruned.advance(layer)
        projection, error = repair(pruned.states, output, dense.states, options.alpha)
        tensors |= fold(view, mlp, projection)
        cuts.append({"layer": layer, "squared_error_before": error[0], "squared_error": error[1]})
    return WeightPatch(tensors, "linear-map", {"cuts": cuts})


def repair(
    outputs: Spool, mlp: Spool, targets: Spool, alpha: float
) -> tuple[Tensor, tuple[float, float]]:
    """Fit the map at one cut and move the layer's outputs as it does.

    Args:
        outputs: y + m, (n_tokens, d); changed to y + m·T.
        mlp: m, (n_tokens, d).
        targets: what the layer's output should be, (n_tokens, d).
        alpha: penalty, as a share of the mean square of m.

    Returns:
        Tᵀ, (d, d) float64, and the mean squared error before and after.
    """
    missing = Spool(len(outputs), outputs.rows.shape[1])
    torch.sub(targets.rows, outputs.rows, out=missing.rows)
    projection = solve(missing, mlp, alpha)
    # The layer's output is linear in its MLP's: no second forward pass is needed.
    change = (projection - torch.eye(len(projection), dtype=projection.dtype)).float()
    for rows, m in zip(outputs.slices(), mlp.slices(), strict=True):
        rows += m @ change.T
    return projection, errors(missing, mlp, projection)


def solve(missing: Spool, mlp: Spool, alpha: float) -> Tensor:
    """Tᵀ, (d, d) float64; the identity where the MLP adds nothing that could be mapped.

    Args:
        missing: target − y − m, (n_tokens, d).
        mlp: m, (n_tokens, d).
        alpha: penalty, as a share of the mean square of m.

    Raises:
        NumericsError: the normal equations cannot be solved.
    """
    cross, gram = normal_equations(missing, mlp)
    identity = torch.eye(len(gram), dtype=gram.dtype)
    mean_square = gram.diagonal().mean()
    if float(mean_square) == 0:
        return identity
    factor, info = torch.linalg.cholesky_ex(gram + max(alpha, LEAST_ALPHA) * mean_square * identity)
    if int(info) != 0:
        raise NumericsError(
            "the linear map's normal equations cannot be solved: the activations are not finite. "
            "Drop fewer layers, or use dtype: float32."
        )
    # Σ (target − y) mᵀ = Σ (missing + m) mᵀ
    return torch.cholesky_solve((cross + gram).T, factor).T

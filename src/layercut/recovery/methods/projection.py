"""Correct the largest mean shift with one projection, folded into the weights (GradMAP, stage 2).

Source   arXiv:2602.14649, stage 2; docs/methods.md#projection
Formula  k = argmax over kept layers of ‖mean_t(h^pruned_{k,out} − target_k)‖₂
         P = argmin mean_t ‖u_t + P·m_t − target_t‖² + λ̂‖P − I‖² / n_tokens
           = I + (Σ_t r_t m_tᵀ)(Σ_t m_t m_tᵀ + λ̂ I)⁻¹,  r = target − u − m,  λ̂ = λ·tr(Σ m mᵀ)/d
         u (d): residual stream before the MLP's output is added; m (d): that output, with its
         bias, both in the pruned model; target (d): dense input of the next kept layer
         folded as W_down ← P·W_down; the ridge pulls towards the identity, "change nothing"
Cost     one dense and one pruned forward pass without the head; d² float64 sums; one Cholesky
Limits   exact only where the MLP's output is added to the stream without a norm in between
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from layercut.engine.residual_stream import ResidualStream, advance_and_record_outputs
from layercut.errors import DataError, NumericsError
from layercut.models.output_projections import check_exact, fold, mlp_output
from layercut.models.ranks import ALONE, Ranks
from layercut.models.view import DecoderView
from layercut.recovery.layer_fit import mean_squared_errors, sum_products
from layercut.recovery.paired_walk import paired_walk
from layercut.recovery.ridge import factor_ridge
from layercut.registry import Method, MethodOptions
from layercut.spool import Spool
from layercut.types import CalibrationBatches, Evidence, PruningPlan, WeightPatch

PENALTY_GRID = (0.01, 0.03, 0.1, 0.3, 1.0)


class Options(MethodOptions):
    """λ, or ``held-out`` to choose it from a grid on sequences the fit has not seen; the solver."""

    penalty: Annotated[float, Field(gt=0)] | Literal["held-out"] = Field(
        default=0.1, description="λ, as a share of the MLP output's mean square, or held-out"
    )
    solver: Literal["closed-form", "gradient-descent"] = Field(
        default="closed-form", description="closed-form, or gradient-descent as the paper trains it"
    )


METHOD = Method(
    shares_dense_stream=True,
    check=lambda view, batches, options, n_drop: check_exact(view, range(view.n_layers)),
)


@dataclass(slots=True)
class Shift:
    """The kept layer whose mean output moved furthest, with the rows a fit needs.

    Attributes:
        layer: its index in the input model.
        norm: ‖mean shift‖₂.
        residual: r, (n_tokens, d).
        output: m, (n_tokens, d).
    """

    layer: int
    norm: float
    residual: Spool
    output: Spool


def fit(
    view: DecoderView,
    plan: PruningPlan,
    evidence: Evidence | None,
    batches: CalibrationBatches,
    options: Options,
    *,
    dense: ResidualStream | None = None,
) -> WeightPatch:
    """Find the largest mean shift, fit P there and fold it."""
    shift = find_largest_mean_shift(view, plan, batches, dense)
    penalty = options.penalty
    if penalty == "held-out":
        penalty = _held_out_penalty(shift, batches, view.ranks)
    solve = solve_closed_form if options.solver == "closed-form" else solve_gradient_descent
    projection = solve(shift.residual, shift.output, penalty, view.ranks)
    before, after = mean_squared_errors(shift.residual, shift.output, projection, view.ranks)
    with view.holding(shift.layer):
        tensors = fold(view, mlp_output(view, shift.layer), projection)
    return WeightPatch(
        tensors=tensors,
        method="projection",
        notes={
            "layer": shift.layer,
            "mean_shift": shift.norm,
            "penalty": penalty,
            "squared_error_before": before,
            "squared_error_after": after,
        },
    )


def find_largest_mean_shift(
    view: DecoderView,
    plan: PruningPlan,
    batches: CalibrationBatches,
    dense: ResidualStream | None = None,
) -> Shift:
    """Walk the dense and the pruned model side by side and compare every kept layer's output.

    Raises:
        NumericsError: no kept layer's mean shift is a number.
    """
    best: Shift | None = None
    own, n_tokens = view.ranks.share_batches(batches), batches.n_sequences * batches.seq_len
    for kept in paired_walk(view, plan, own, dense=dense):
        module = mlp_output(view, kept.layer).module
        output = advance_and_record_outputs(kept.pruned, kept.layer, module)
        total = torch.zeros(view.hidden_size, dtype=torch.float64)
        for ours, target in zip(kept.pruned.states.slices(), kept.target.slices(), strict=True):
            total += (
                (ours - target.to(ours.device)).sum(dim=0, dtype=torch.float64).to(total.device)
            )
        view.ranks.sum_(total)
        norm = float((total / n_tokens).norm())
        if norm > (-1.0 if best is None else best.norm):
            best = Shift(kept.layer, norm, kept.missing(), output)
    if best is None:
        raise NumericsError(
            "the mean shift is NaN at every kept layer: the pruned model's activations are not "
            "finite. Drop fewer layers, or use dtype: float32."
        )
    return best


def solve_closed_form(
    residual: Spool, output: Spool, penalty: float, ranks: Ranks = ALONE
) -> Tensor:
    """P = I + Σrmᵀ·(Σmmᵀ + λ̂I)⁻¹ by Cholesky, (d, d) float64.

    Raises:
        NumericsError: the ridged Gram matrix is not positive definite.
    """
    cross, gram = sum_products(residual, output, ranks)
    factor = factor_ridge(gram, penalty)
    if factor is None:
        raise NumericsError(
            "the projection's normal equations are singular. Use a recovery penalty above 0 or "
            "more calibration text."
        )
    return (
        torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        + torch.cholesky_solve(cross.T, factor).T
    )


def solve_gradient_descent(
    residual: Spool,
    output: Spool,
    penalty: float,
    ranks: Ranks = ALONE,
    *,
    tolerance: float = 1e-6,
    max_steps: int = 20_000,
) -> Tensor:
    """The same P by gradient descent over all rows, as the paper trains it; for comparison.

    Nesterov's method with step 1/Lipschitz, until the gradient is ``tolerance`` of the first one.

    Raises:
        NumericsError: no convergence within ``max_steps``.
    """
    cross, gram = sum_products(residual, output, ranks)
    ridge = penalty * gram.diagonal().mean()
    highest = torch.linalg.eigvalsh(gram)[-1] + ridge
    root = (ridge / highest).sqrt()
    momentum = (1 - root) / (1 + root)
    change: Tensor = torch.zeros_like(gram)  # D = P − I
    previous = change
    for _ in range(max_steps):
        ahead = change + momentum * (change - previous)
        gradient = torch.zeros_like(gram)
        for r, m in zip(residual.slices(), output.slices(), strict=True):
            m64 = m.double()
            gradient += (m64 @ ahead.T - r.to(m64)).T @ m64
        ranks.sum_(gradient)
        gradient += ridge * ahead
        previous, change = change, ahead - gradient / highest
        if gradient.norm() <= tolerance * cross.norm():
            return change + torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    raise NumericsError(
        f"gradient descent did not converge in {max_steps} steps. Use recovery.options.solver: "
        "closed-form or a larger penalty."
    )


def _held_out_penalty(shift: Shift, batches: CalibrationBatches, ranks: Ranks) -> float:
    """The grid's best λ on the last quarter of the sequences, fitted on the others."""
    n_held_out = batches.n_sequences // 4
    if n_held_out < 1:
        raise DataError(
            f"{batches.n_sequences} calibration sequences are too few to hold any out. Use at "
            "least 4, or a fixed penalty."
        )
    own = ranks.share(range(batches.n_sequences))
    split = sum(i < batches.n_sequences - n_held_out for i in own) * batches.seq_len
    seen = shift.residual.part(0, split), shift.output.part(0, split)
    held_out = shift.residual.part(split, None), shift.output.part(split, None)
    remaining = {
        penalty: mean_squared_errors(*held_out, solve_closed_form(*seen, penalty, ranks), ranks)[1]
        for penalty in PENALTY_GRID
    }
    return min(remaining, key=lambda penalty: remaining[penalty])

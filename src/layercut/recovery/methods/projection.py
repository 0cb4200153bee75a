"""Correct the largest mean shift with one projection, folded into the weights (GradMAP, stage 2).

Source   arXiv:2602.14649, stage 2; METHODS §2 step 3
Formula  k = argmax over kept layers of ‖mean_t(h^pruned_{k,out} − target_k)‖₂
         P = argmin mean_t ‖u_t + P·m_t − target_t‖² + λ̂‖P − I‖² / n_tokens
           = I + (Σ_t r_t m_tᵀ)(Σ_t m_t m_tᵀ + λ̂ I)⁻¹,  r = target − u − m,  λ̂ = λ·tr(Σ m mᵀ)/d
         u (d): residual stream before the MLP's output is added; m (d): that output, with its
         bias, both in the pruned model; target (d): dense input of the next kept layer
         W_down ← P·W_down, bias ← P·bias; the same for every expert where the MLP is a mixture
Meaning  one matrix at one layer; the ridge pulls towards the identity, i.e. "change nothing"
Cost     one dense and one pruned forward pass without the head; d² float64 sums; one Cholesky
Limits   exact only where the MLP's output is added to the stream without a norm in between
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from layercut import progress
from layercut.engine.residual_stream import dense_stream
from layercut.errors import DataError, NumericsError
from layercut.models.hooks import capture
from layercut.models.output_projections import check_exact, fold, mlp_output
from layercut.models.view import DecoderView
from layercut.registry import MethodOptions
from layercut.spool import Spool
from layercut.types import CalibrationBatches, Evidence, PruningPlan, WeightPatch

PENALTY_GRID = (0.01, 0.03, 0.1, 0.3, 1.0)


class Options(MethodOptions):
    """λ, or ``held-out`` to choose it from a grid on sequences the fit has not seen; the solver."""

    penalty: Annotated[float, Field(gt=0)] | Literal["held-out"] = 0.1
    solver: Literal["closed-form", "gradient-descent"] = "closed-form"

    def check(self, view: DecoderView, batches: CalibrationBatches, n_drop: int) -> None:
        """Refuse a model whose MLPs do not add their output to the stream as it is."""
        check_exact(view, range(view.n_layers))


@dataclass(slots=True)
class Shift:
    """The kept layer whose mean output moved furthest, with the rows a fit needs.

    Attributes:
        layer: its index in the input model; −1 before any layer was seen.
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
) -> WeightPatch:
    """Find the largest mean shift, fit P there and fold it."""
    shift = largest_mean_shift(view, plan, batches, evidence)
    penalty = options.penalty
    if penalty == "held-out":
        penalty = _held_out_penalty(shift, batches)
    solve = solve_closed_form if options.solver == "closed-form" else solve_gradient_descent
    projection = solve(shift.residual, shift.output, penalty)
    before, after = errors(shift.residual, shift.output, projection)
    return WeightPatch(
        tensors=fold(view, mlp_output(view, shift.layer), projection),
        method="projection",
        notes={
            "layer": shift.layer,
            "mean_shift": shift.norm,
            "penalty": penalty,
            "squared_error_before": before,
            "squared_error_after": after,
        },
    )


def largest_mean_shift(
    view: DecoderView,
    plan: PruningPlan,
    batches: CalibrationBatches,
    evidence: Evidence | None = None,
) -> Shift:
    """Walk the dense and the pruned model side by side and compare every kept layer's output."""
    dense = dense_stream(view, batches, evidence)
    pruned = dense.fork()
    n_tokens = len(dense.states)
    best = Shift(-1, -1.0, *(Spool(n_tokens, view.hidden_size) for _ in range(2)))
    output = Spool(n_tokens, view.hidden_size)
    for layer in progress.track(plan.kept, total=len(plan.kept)):
        with output.filling() as write, capture(mlp_output(view, layer).module, write):
            pruned.advance(layer)
        while dense.layer < plan.target_of(layer):
            dense.advance(dense.layer)
        total = torch.zeros(view.hidden_size, dtype=torch.float64)
        pairs = zip(pruned.states.slices(), dense.states.slices(), strict=True)
        for ours, target in pairs:
            total += (ours - target).sum(dim=0, dtype=torch.float64)
        norm = float((total / n_tokens).norm())
        if norm > best.norm:
            best.layer, best.norm = layer, norm
            best.output, output = output, best.output
            torch.sub(dense.states.rows, pruned.states.rows, out=best.residual.rows)
    if best.layer < 0:
        raise NumericsError(
            "the mean shift is NaN at every kept layer: the pruned model's activations are not "
            "finite. Drop fewer layers, or use dtype: float32."
        )
    return best


def normal_equations(residual: Spool, output: Spool) -> tuple[Tensor, Tensor]:
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


def solve_closed_form(residual: Spool, output: Spool, penalty: float) -> Tensor:
    """P = I + Σrmᵀ·(Σmmᵀ + λ̂I)⁻¹ by Cholesky, (d, d) float64.

    Raises:
        NumericsError: the ridged Gram matrix is not positive definite.
    """
    cross, gram = normal_equations(residual, output)
    identity = torch.eye(len(gram), dtype=gram.dtype)
    factor, info = torch.linalg.cholesky_ex(gram + _ridge(gram, penalty) * identity)
    if int(info) != 0:
        raise NumericsError(
            "the projection's normal equations are singular. Use a recovery penalty above 0 or "
            "more calibration text."
        )
    return identity + torch.cholesky_solve(cross.T, factor).T


def solve_gradient_descent(
    residual: Spool,
    output: Spool,
    penalty: float,
    *,
    tolerance: float = 1e-6,
    max_steps: int = 20_000,
) -> Tensor:
    """The same P by gradient descent over all rows, as the paper trains it; for comparison.

    Nesterov's method with step 1/Lipschitz, until the gradient is ``tolerance`` of the first one.

    Raises:
        NumericsError: no convergence within ``max_steps``.
    """
    cross, gram = normal_equations(residual, output)
    ridge = _ridge(gram, penalty)
    highest = torch.linalg.eigvalsh(gram)[-1] + ridge
    root = (ridge / highest).sqrt()
    momentum = (1 - root) / (1 + root)
    change: Tensor = torch.zeros_like(gram)  # D = P − I
    previous = change
    for _ in range(max_steps):
        ahead = change + momentum * (change - previous)
        gradient = ridge * ahead
        for r, m in zip(residual.slices(), output.slices(), strict=True):
            m64 = m.double()
            gradient += (m64 @ ahead.T - r).T @ m64
        previous, change = change, ahead - gradient / highest
        if gradient.norm() <= tolerance * cross.norm():
            return change + torch.eye(len(gram), dtype=gram.dtype)
    raise NumericsError(
        f"gradient descent did not converge in {max_steps} steps. Use recovery.options.solver: "
        "closed-form or a larger penalty."
    )


def _ridge(gram: Tensor, penalty: float) -> Tensor:
    """λ̂ = λ·tr(Σ m mᵀ)/d."""
    return gram.diagonal().mean() * penalty


def errors(residual: Spool, output: Spool, projection: Tensor) -> tuple[float, float]:
    """Mean squared distance to the target before and after the projection."""
    change = (projection - torch.eye(len(projection), dtype=projection.dtype)).float()
    before = after = 0.0
    for r, m in zip(residual.slices(), output.slices(), strict=True):
        before += float(r.square().sum(dtype=torch.float64))
        after += float((r - m @ change.T).square().sum(dtype=torch.float64))
    return before / len(residual), after / len(residual)


def _held_out_penalty(shift: Shift, batches: CalibrationBatches) -> float:
    """The grid's best λ on the last quarter of the sequences, fitted on the others."""
    n_held_out = batches.n_sequences // 4
    if n_held_out < 1:
        raise DataError(
            f"{batches.n_sequences} calibration sequences are too few to hold any out. Use at "
            "least 4, or a fixed penalty."
        )
    split = (batches.n_sequences - n_held_out) * batches.seq_len
    seen = shift.residual.part(0, split), shift.output.part(0, split)
    held_out = shift.residual.part(split, None), shift.output.part(split, None)
    remaining = {
        penalty: errors(*held_out, solve_closed_form(*seen, penalty))[1] for penalty in PENALTY_GRID
    }
    return min(remaining, key=lambda penalty: remaining[penalty])

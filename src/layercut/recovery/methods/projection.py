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

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from layercut.engine.loss import mean_loss
from layercut.engine.residual_stream import ResidualStream
from layercut.errors import DataError, NumericsError, PlanError
from layercut.models.output_projections import check_exact, fold, mlp_output
from layercut.models.ranks import ALONE, Ranks
from layercut.models.view import DecoderView
from layercut.recovery.layer_fit import choose_held_out, mean_squared_errors, sum_products
from layercut.recovery.mean_shift import Shift, find_largest_mean_shift, walk_shifts
from layercut.recovery.ridge import factor_ridge
from layercut.registry import Method, MethodOptions
from layercut.spool import Spool
from layercut.types import CalibrationBatches, Evidence, PruningPlan, WeightPatch

PENALTY_GRID = (0.01, 0.03, 0.1, 0.3, 1.0)
GUARD_EVERY = 4
"""One of so many sequences judges, where there is a guard, and is not fitted to."""
SHARES = (1.0, 0.5, 0.25)
"""Parts of P − I that a guard tries."""


class Options(MethodOptions):
    """Where, how strongly and by which solver; the defaults are the paper's, read literally."""

    penalty: Annotated[float, Field(gt=0)] | Literal["held-out"] = Field(
        default=0.1, description="λ, as a share of the MLP output's mean square, or held-out"
    )
    solver: Literal["closed-form", "gradient-descent"] = Field(
        default="closed-form", description="closed-form, or gradient-descent as the paper trains it"
    )
    place: (
        Literal["largest-shift", "largest-relative-shift", "cuts"] | Annotated[int, Field(ge=0)]
    ) = Field(
        default="largest-shift",
        description="the kept layer with the largest mean shift, or with the largest for its "
        "length, each kept layer before a cut (the guard takes one), or a kept layer by its number",
    )
    weights: Literal["none", "inverse-norm"] = Field(
        default="none",
        description="inverse-norm: tokens count by the inverse length of their target",
    )
    guard: bool = Field(
        default=False,
        description="hold out every fourth sequence: what does not lower its loss is not done",
    )

    @model_validator(mode="after")
    def _cuts_need_a_judge(self) -> Options:
        if self.place == "cuts" and not self.guard:
            raise ValueError("place: cuts needs guard: true, which chooses one of them")
        return self


METHOD = Method(
    shares_dense_stream=True,
    revision=1,
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
    """Find the place, fit P there and fold it; with a guard, if that lowers the held-out loss."""
    if not options.guard:
        shift = _find_place(view, plan, batches, options, dense)
        projection, notes = _solve(view, shift, batches, options)
        return WeightPatch(_fold(view, shift.size.layer, projection), "projection", notes)
    held_out = choose_held_out(batches, GUARD_EVERY)
    judges = batches.input_ids[held_out]
    fitted = replace(batches, input_ids=batches.input_ids[~held_out])
    shifts: Iterator[Shift]
    if options.place == "cuts":
        shifts = walk_shifts(view, plan, fitted, None, lambda size: size.before_cut)
    else:
        shifts = iter([_find_place(view, plan, fitted, options, None)])
    solved = [(shift.size.layer, *_solve(view, shift, fitted, options)) for shift in shifts]

    def loss_with(tensors: dict[str, Tensor]) -> float:
        with view.skipping(plan.dropped), view.patched(tensors):
            return mean_loss(view, judges, batches.micro_batch)

    without = lowest = loss_with({})
    best: dict[str, Tensor] = {}
    chosen: dict[str, Any] = {"share": 0.0}
    for layer, projection, notes in solved:
        unit = torch.eye(len(projection)).to(projection)
        for share in SHARES:
            tensors = _fold(view, layer, torch.lerp(unit, projection, share))
            loss = loss_with(tensors)
            if loss < lowest:
                lowest, best, chosen = loss, tensors, {**notes, "share": share}
    told = {"held_out_loss_without": without, "held_out_loss_with": lowest, "accepted": bool(best)}
    return WeightPatch(best, "projection", {**chosen, **told})


def _find_place(
    view: DecoderView,
    plan: PruningPlan,
    batches: CalibrationBatches,
    options: Options,
    dense: ResidualStream | None,
) -> Shift:
    """The layer that the options name, with its rows."""
    if not isinstance(options.place, int):
        relative = options.place == "largest-relative-shift"
        return find_largest_mean_shift(view, plan, batches, dense, relative=relative)
    for shift in walk_shifts(view, plan, batches, dense, lambda size: size.layer == options.place):
        return shift
    raise PlanError(
        f"recovery.options.place names layer {options.place}, which is dropped or lies before what "
        "the cuts change. Name a kept layer behind them, or the one before the first."
    )


def _solve(
    view: DecoderView, shift: Shift, batches: CalibrationBatches, options: Options
) -> tuple[Tensor, dict[str, Any]]:
    """P of one place, (d, d), and what is noted of it."""
    if options.weights == "inverse-norm":
        shift.weigh()
    penalty = options.penalty
    if penalty == "held-out":
        penalty = _held_out_penalty(shift, batches, view.ranks)
    solve = solve_closed_form if options.solver == "closed-form" else solve_gradient_descent
    projection = solve(shift.residual, shift.output, penalty, view.ranks)
    before, after = mean_squared_errors(shift.residual, shift.output, projection, view.ranks)
    return projection, {
        "layer": shift.size.layer,
        "mean_shift": shift.size.norm,
        "penalty": penalty,
        "squared_error_before": before,
        "squared_error_after": after,
    }


def _fold(view: DecoderView, layer: int, projection: Tensor) -> dict[str, Tensor]:
    with view.holding(layer):
        return fold(view, mlp_output(view, layer), projection)


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

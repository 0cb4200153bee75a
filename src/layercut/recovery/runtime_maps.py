"""Repairs that no weight can hold: one more matrix at every cut, in memory, for comparisons only.

Source   linear-patch: arXiv:2505.24680 §3, untrained; ghost: Ghosted Layers. METHODS §4
Formula  x ← x·A at every cut; x (d): output of the kept layer before it, in the model that is
         pruned and repaired so far; target (d): dense input of the next kept layer
         linear-patch  A = H·diag(r)·Hᵀ,  r_k = mean_s ‖(target·H)_{s,k}‖₁ / ‖(x·H)_{s,k}‖₁, the
                       norms over the tokens of sequence s [released code]
         ghost         A = I + (XᵀX + ε̂I)⁻¹Xᵀ(target − X),  ε̂ = ε·tr(XᵀX)/d [our reading: a share
                       of the mean square, so that it does not depend on tokens or scale]
         H (d, d): normalised Hadamard matrix. Sylvester's construction needs a power of two; for
         other widths, equal blocks of the largest power of two that divides d, e.g. 9 of 64 for
         576: still orthogonal, but an outlier spreads over its own block only [our reading]
Cost     one dense and one pruned forward pass without the head; at run time d² operations per token
         and cut, which pruned checkpoints do not have to pay
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from layercut import progress
from layercut.engine.residual_stream import dense_stream
from layercut.errors import PlanError, RecipeError, suggestion
from layercut.models.droppable import check_dropped
from layercut.models.view import DecoderView
from layercut.recovery.methods.magnitude_rescale import channel_ratios
from layercut.recovery.methods.projection import solve_closed_form
from layercut.registry import check_runs_alone
from layercut.spool import Spool
from layercut.types import CalibrationBatches, Evidence, PruningPlan

Unfoldable = Literal["ghost", "linear-patch"]


def fit_unfoldable(
    view: DecoderView,
    plan: PruningPlan,
    batches: CalibrationBatches,
    method: Unfoldable,
    *,
    epsilon: float = 1e-4,
    evidence: Evidence | None = None,
) -> dict[int, Tensor]:
    """Fit one matrix per cut, in order, each in the model that the earlier ones repaired.

    Args:
        view: the intact model; unchanged afterwards.
        plan: which layers go; not layer 0.
        batches: calibration text.
        method: ``linear-patch`` or ``ghost``.
        epsilon: ghost's ridge penalty, as a share of the stream's mean square.
        evidence: may hold the intact model's stream.

    Returns:
        Kept layer before a cut → A, (d, d) float32, to be used with `unfolded`.

    Raises:
        RecipeError: unknown method, or an impossible penalty.
        PlanError: layer 0 is dropped.
        ModelError: the model cannot be pruned so, or its layers cannot be run one by one.
        NumericsError: the fit has no solution.
    """
    _check(view, plan, method, epsilon)
    first = plan.cuts[0][0] - 1
    dense = dense_stream(view, batches, evidence)
    while dense.layer < first:
        dense.advance(dense.layer)
    pruned = dense.fork()
    operations = {}
    remaining = [layer for layer in plan.kept if layer >= first]
    for layer in progress.track(remaining, total=len(remaining)):
        while dense.layer < plan.target_of(layer):
            dense.advance(dense.layer)
        pruned.advance(layer)
        if plan.target_of(layer) == layer + 1:
            continue
        if method == "ghost":
            matrix = ghost(pruned.states, dense.states, epsilon)
        else:
            matrix = linear_patch(pruned.states, dense.states, batches.seq_len)
        operations[layer] = matrix
        for rows in pruned.states.slices():
            rows.copy_(rows @ matrix)
    return operations


@contextmanager
def unfolded(
    view: DecoderView, plan: PruningPlan, operations: Mapping[int, Tensor]
) -> Iterator[None]:
    """Apply ``operations`` at the cuts inside the block; go with ``view.skipping(plan.dropped)``.

    Args:
        view: the intact model.
        plan: which layers go.
        operations: kept layer before a cut → A, (d, d).

    Raises:
        PlanError: an operation does not stand at a cut of the plan.
    """
    wrong = sorted(set(operations) - {first - 1 for first, _ in plan.cuts})
    if wrong:
        raise PlanError(
            f"an operation stands behind layer {wrong[0]}, where the plan has no cut. Fit the "
            "operations to this plan."
        )
    handles = [
        view.layers[layer].register_forward_hook(_operation(matrix.to(view.device)))
        for layer, matrix in operations.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def ghost(stream: Spool, target: Spool, epsilon: float) -> Tensor:
    """A = I + M of ghost, (d, d) float32."""
    missing = Spool(len(stream), stream.rows.shape[1])
    torch.sub(target.rows, stream.rows, out=missing.rows)
    # The projection's normal equations with the whole stream in the place of the MLP's output.
    return solve_closed_form(missing, stream, epsilon).T.float()


def linear_patch(stream: Spool, target: Spool, seq_len: int) -> Tensor:
    """A = H·diag(r)·Hᵀ of linear-patch, (d, d) float32."""
    rotation = hadamard(stream.rows.shape[1])
    ratios = channel_ratios(stream, target, seq_len, rotation).float()
    return rotation * ratios @ rotation.T


def hadamard(width: int) -> Tensor:
    """Normalised Hadamard matrix, or blocks of one; orthogonal, (width, width) float32."""
    largest = width & -width
    block = torch.ones(1, 1)
    while len(block) < largest:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    return torch.kron(torch.eye(width // largest), block / largest**0.5)


def _operation(matrix: Tensor) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        stream = output if isinstance(output, Tensor) else output[0]
        # Autocast would round the whole residual stream to bfloat16.
        with torch.autocast(stream.device.type, enabled=False):
            changed = (stream.float() @ matrix).to(stream.dtype)
        return changed if isinstance(output, Tensor) else (changed, *output[1:])

    return hook


def _check(view: DecoderView, plan: PruningPlan, method: str, epsilon: float) -> None:
    known = get_args(Unfoldable)
    if method not in known:
        hint = suggestion(method, known)
        raise RecipeError(f"unknown method '{method}'{hint} (known: {', '.join(known)})")
    if not 0 < epsilon < float("inf"):
        raise RecipeError(f"epsilon is {epsilon}, but must be a number above 0.")
    if 0 in plan.dropped:
        raise PlanError(
            f"{method} needs a kept layer before every cut, but layer 0 is dropped. Protect it."
        )
    check_runs_alone(view, f"recovery '{method}'")
    check_dropped(view, plan.dropped)

"""Layer importance from the magnitude of weight gradients (GradMAP, stage 1).

Source   arXiv:2602.14649, stage 1; the norm and the reduction are not public and stay options
Formula  s_l = Σ_b Σ_{W in l} ‖∇_b W‖
         ∇_b W (out, in): gradient of group b's summed token loss / all calibration targets
         norm: l1 = Σ|g|, l2 = √Σg², l2sq = Σg²; reduction: sum, or mean per parameter of layer l
Meaning  higher = keep; comparable only within one model and one calibration set
Cost     one forward and backward pass over the calibration set
Limits   linear weights only; depends on gradient_batch (norms of sums are not sums of norms), but
         never on micro_batch
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from layercut.engine.layerwise import walk_gradients
from layercut.models.view import DecoderView
from layercut.registry import Method, MethodOptions
from layercut.types import CalibrationBatches, LayerScores

Norm = Literal["l1", "l2", "l2sq"]


class Options(MethodOptions):
    """GradMAP's readings."""

    norm: Norm = Field(default="l1", description="l1: Σ|g|, l2: √Σg², or l2sq: Σg²")
    reduction: Literal["sum", "mean"] = Field(
        default="sum", description="over a layer's weights: their sum, or the mean per parameter"
    )


METHOD = Method(rounds="each")


def score(view: DecoderView, batches: CalibrationBatches, options: Options) -> LayerScores:
    """One forward-backward over ``batches``; every gradient is reduced and freed at once."""
    totals = torch.zeros(view.n_layers, dtype=torch.float64, device=view.device)
    for gradients in walk_gradients(
        view,
        view.ranks.share(list(batches.groups())),
        micro_batch=batches.micro_batch,
        n_targets=batches.n_targets,
    ):
        for gradient in gradients.weights.values():
            totals[gradients.layer] += magnitude(gradient, options.norm)
    view.ranks.sum_(totals)
    values = totals.tolist()
    if options.reduction == "mean":
        values = [total / _n_weights(view, layer) for layer, total in enumerate(values)]
    return LayerScores(tuple(values), n_targets=batches.n_targets)


def magnitude(gradient: Tensor, norm: Norm) -> Tensor:
    """The norm of one gradient, (), accumulated in float64: float32 sums of 10⁷ terms drift."""
    if norm == "l1":
        return gradient.abs().sum(dtype=torch.float64)
    squares = torch.stack([rows.double().square().sum() for rows in gradient.split(256)]).sum()
    return squares.sqrt() if norm == "l2" else squares


def _n_weights(view: DecoderView, layer: int) -> int:
    return sum(weight.numel() for weight in view.linear_weights(layer).values())

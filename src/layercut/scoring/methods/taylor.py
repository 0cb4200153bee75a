"""Layer importance from what setting its weights to zero does to first order (Taylor).

Source   arXiv:2402.02834 §3.1
Formula  s_l = Σ_{W in l} Σ_jk |W_jk · ∇_jk|
         W (out, in): the linear weights of layer l; ∇ (out, in): gradient of the mean token loss of
         the whole calibration set, summed with its signs before any absolute value is taken
Meaning  higher = keep; comparable only within one model and one calibration set
Cost     one forward and backward pass over the calibration set; one float32 number for every
         linear weight of the model, twice the memory of a bfloat16 model
Limits   linear weights only; published as Taylor+ with the first 4 and the last 2 layers protected:
         name them with selection.protect
"""

from __future__ import annotations

import torch
from torch import Tensor

from layercut.engine.gradient_sums import walk_summed_gradients
from layercut.models.view import DecoderView
from layercut.registry import Method, MethodOptions
from layercut.types import CalibrationBatches, LayerScores


class Options(MethodOptions):
    """No options."""


METHOD = Method()


def score(view: DecoderView, batches: CalibrationBatches, options: Options) -> LayerScores:
    """One forward-backward over ``batches``; sums do not depend on how it is divided."""
    totals = [0.0] * view.n_layers
    # One micro-batch at a time: bfloat16 parameters would add several up in bfloat16.
    parts = list(view.ranks.share_batches(batches).micro_batches())
    for layer, gradients in walk_summed_gradients(
        view, parts, micro_batch=batches.micro_batch, n_targets=batches.n_targets
    ):
        totals[layer] = _first_order(view, layer, gradients)
    return LayerScores(tuple(totals), n_targets=batches.n_targets)


def _first_order(view: DecoderView, layer: int, gradients: dict[str, Tensor]) -> float:
    """Σ |W ⊙ ∇| over a layer's weights, in float64: float32 sums of 10⁷ terms drift."""
    weights = view.linear_weights(layer)
    return sum(
        float((weights[name].detach() * gradient).abs().sum(dtype=torch.float64))
        for name, gradient in gradients.items()
    )

"""Layer importance from what a layer adds to the residual stream, and what that is worth.

Source   ours; docs/methods.md#residual-sensitivity
Formula  s_l = Σ_t ‖∇h_{l+1,t}‖₂ · ‖h_{l+1,t} − h_{l,t}‖₂
         h_l (tokens, d): residual stream entering layer l; ∇ of the summed token loss
Meaning  higher = keep; a first-order bound, in nats, on what removing the layer's contribution
         does to the loss
Cost     one forward and one backward pass through activations; no weight gradient is allocated
"""

from __future__ import annotations

import torch

from layercut.engine.layerwise import walk_gradients
from layercut.models.view import DecoderView
from layercut.registry import Method, MethodOptions
from layercut.types import CalibrationBatches, LayerScores


class Options(MethodOptions):
    """No options."""


METHOD = Method()


def score(view: DecoderView, batches: CalibrationBatches, options: Options) -> LayerScores:
    """One forward-backward over ``batches``; tokens are independent, so groups do not matter."""
    totals = torch.zeros(view.n_layers, dtype=torch.float64, device=view.device)
    parts = list(view.ranks.share_batches(batches).micro_batches())
    for gradients in walk_gradients(view, parts, micro_batch=batches.micro_batch, weights=False):
        (before,), (after,) = gradients.hidden_in, gradients.hidden_out
        change = (after.float() - before.float()).norm(dim=-1)
        slope = gradients.grad_out[0].float().norm(dim=-1)
        totals[gradients.layer] += (slope * change).sum(dtype=torch.float64)
    view.ranks.sum_(totals)
    return LayerScores(tuple(totals.tolist()), n_targets=batches.n_targets)

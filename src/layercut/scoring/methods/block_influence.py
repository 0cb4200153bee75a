"""Layer importance from how far a layer turns the residual stream (ShortGPT's Block Influence).

Source   arXiv:2403.03853 §2.2
Formula  s_l = 1 − mean_t cos(h_{l,t}, h_{l+1,t})
         h_l (tokens, d): residual stream entering layer l
Meaning  higher = keep; between 0 and 2
Cost     one forward pass
Limits   looks at angles only: a layer that rescales the stream counts for nothing
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from layercut import progress
from layercut.engine.residual_stream import ResidualStream
from layercut.models.view import DecoderView
from layercut.registry import Method, MethodOptions
from layercut.types import CalibrationBatches, LayerScores


class Options(MethodOptions):
    """No options."""


METHOD = Method()


@torch.no_grad()
def score(view: DecoderView, batches: CalibrationBatches, options: Options) -> LayerScores:
    """One forward pass over ``batches``."""
    totals = torch.zeros(view.n_layers, dtype=torch.float64, device=view.device)
    stream = ResidualStream(view, view.ranks.share_batches(batches))
    for layer in progress.track(range(view.n_layers), total=view.n_layers):

        def add(before: Tensor, after: Tensor, layer: int = layer) -> None:
            cosine = functional.cosine_similarity(before.float(), after.float(), dim=-1)
            totals[layer] += cosine.sum(dtype=torch.float64)

        stream.advance(layer, add)
    view.ranks.sum_(totals)
    n_tokens = batches.n_sequences * batches.seq_len
    return LayerScores(tuple((1 - totals / n_tokens).tolist()))

"""Layer importance from the size of its weights (Shortened LLaMA's Mag).

Source   arXiv:2402.02834 §3.1
Formula  s_l = Σ_{W in l} Σ_jk |W_jk|
         W (out, in): the linear weights of layer l
Meaning  higher = keep; comparable only within one model
Cost     one pass over the weights, none over the text
Limits   blind to what the layer does; published as Mag+ with the first 4 and the last 2 layers
         protected: name them with selection.protect
"""

from __future__ import annotations

from layercut.models.view import DecoderView
from layercut.registry import Method, MethodOptions
from layercut.scoring.methods.gradmap import magnitude
from layercut.types import CalibrationBatches, LayerScores


class Options(MethodOptions):
    """No options."""


METHOD = Method()


def score(view: DecoderView, batches: CalibrationBatches, options: Options) -> LayerScores:
    """No pass over ``batches``."""
    return LayerScores(tuple(_sum_weights(view, layer) for layer in range(view.n_layers)))


def _sum_weights(view: DecoderView, layer: int) -> float:
    with view.holding(layer):
        weights = view.linear_weights(layer).values()
        return float(sum(magnitude(weight.detach(), "l1") for weight in weights))

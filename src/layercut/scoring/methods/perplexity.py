"""Layer importance from the loss of the model without the layer (Shortened LLaMA's PPL; SLEB).

Source   arXiv:2402.02834 §3.1; with selection.rounds: each and the first and last layer protected,
         SLEB (arXiv:2402.09025)
Formula  s_l = mean_t loss_t of the model whose layer l is the identity
Meaning  higher = keep; nats per token, comparable between models of one vocabulary
Cost     per token L·(L + 1)/2 layers, since none before l runs again for l, and L times the head;
         in rounds, that for every decision
Limits   the search of SLEB is greedy: it never takes a decision back
"""

from __future__ import annotations

import torch

from layercut import progress
from layercut.engine.residual_stream import ResidualStream, split_for_walk
from layercut.models.view import DecoderView
from layercut.registry import Method, MethodOptions
from layercut.types import CalibrationBatches, LayerScores


class Options(MethodOptions):
    """No options."""


METHOD = Method()


def score(view: DecoderView, batches: CalibrationBatches, options: Options) -> LayerScores:
    """The calibration loss without each layer in turn."""
    totals = [0.0] * view.n_layers
    parts = split_for_walk(view, view.ranks.share_batches(batches))
    for part in progress.track(parts, total=len(parts)):
        for layer, loss in measure_losses_without(view, part).items():
            totals[layer] += loss / batches.n_targets
    return LayerScores(tuple(view.ranks.total(*totals)), n_targets=batches.n_targets)


def measure_losses_without(view: DecoderView, batches: CalibrationBatches) -> dict[int, float]:
    """Every layer that ``view`` does not skip, and the summed token loss without it, in nats.

    All models with one layer left out pass a layer before the next one: each starts, as a copy of
    the dense stream, where its layer is passed over.

    Args:
        view: the model.
        batches: the text.
    """
    dense = ResidualStream(view, batches)
    without: dict[int, ResidualStream] = {}
    for layer in range(view.n_layers):
        if layer in view.skipped:
            continue
        started = dense.fork()
        with view.holding(layer):
            for stream in (*without.values(), dense):
                stream.advance(layer)
        without[layer] = started
    losses = {
        layer: [part.sum(dtype=torch.float64) for part in stream.losses(batches.input_ids)]
        for layer, stream in without.items()
    }
    return {layer: float(sum(parts)) for layer, parts in losses.items()}

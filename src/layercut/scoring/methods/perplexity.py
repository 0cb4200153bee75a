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

from collections.abc import Iterator

import torch
from torch import Tensor

from layercut import progress
from layercut.models.view import DecoderView
from layercut.registry import Method, MethodOptions
from layercut.types import CalibrationBatches, LayerScores


class Options(MethodOptions):
    """No options."""


METHOD = Method()


def score(view: DecoderView, batches: CalibrationBatches, options: Options) -> LayerScores:
    """The calibration loss without each layer in turn."""
    totals = [0.0] * view.n_layers
    losses = (pair for ids in batches.micro_batches() for pair in measure_losses_without(view, ids))
    n_slices = -(-batches.n_sequences // batches.micro_batch)
    n_left = view.n_layers - len(view.skipped)
    for layer, loss in progress.track(losses, total=n_slices * n_left):
        totals[layer] += loss / batches.n_targets
    return LayerScores(tuple(totals), n_targets=batches.n_targets)


@torch.no_grad()
def measure_losses_without(view: DecoderView, input_ids: Tensor) -> Iterator[tuple[int, float]]:
    """Every layer that ``view`` does not skip, and the summed token loss without it, in nats.

    The residual stream advances by one layer at a time; from each place, only the layers behind
    the one that is left out run.

    Args:
        view: the model.
        input_ids: one micro-batch, (batch, seq).
    """
    inputs = view.embed(input_ids)
    order = [layer for layer in range(view.n_layers) if layer not in view.skipped]
    hidden = inputs.hidden
    for position, layer in enumerate(order):
        without = hidden
        for later in order[position + 1 :]:
            without = view.run_layer(later, without, inputs)
        losses = view.stream_losses(without, input_ids)
        yield layer, float(losses.sum(dtype=torch.float64))
        hidden = view.run_layer(layer, hidden, inputs)

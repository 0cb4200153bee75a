"""Gradients of the calibration loss, one layer at a time.

A forward pass cuts the autograd graph at every layer boundary. The backward pass then walks from
the last layer to the first and hands out each layer's gradients before it touches the next, so
that never two layers' weight gradients are alive at once, however many micro-batches a gradient
group is split into. The forward graph is kept with one micro-batch per group, and with several on a
GPU that has room for all of theirs; else only the boundary activations are, and each layer runs
forward once more when its turn comes.

Layers that are read from their files are walked once for all groups (`layerwise_streamed`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from layercut import progress
from layercut.engine.layer_gradients import (
    LayerGradients,
    LossGradient,
    differentiate_all,
    requiring_gradients,
    take_gradients,
    token_loss,
)
from layercut.engine.layerwise_streamed import walk_streamed_gradients
from layercut.models.view import DecoderView, LayerInputs
from layercut.spool import choose_device


def walk_gradients(
    view: DecoderView,
    groups: Sequence[Tensor],
    *,
    micro_batch: int,
    n_targets: int = 1,
    weights: bool = True,
    loss: LossGradient | None = None,
) -> Iterator[LayerGradients]:
    """Differentiate each group's loss, layer by layer.

    Args:
        view: the model; layers that it currently skips are passed over.
        groups: the gradient groups that this rank differentiates, (n_sequences, seq) each.
        micro_batch: sequences in memory at once.
        n_targets: what the summed token loss is divided by: all calibration targets, so that groups
            of any size add up to the mean loss.
        weights: whether gradients of the linear weights are wanted.
        loss: what is differentiated in the place of the token loss.

    Yields:
        The gradients of each layer that is not skipped and each group: layers from the last to the
        first within a group, groups in order within a layer; whether layers or groups come first
        depends on where the weights are. They are freed when the next are asked for; until then,
        the layer's weights are in memory.

    Raises:
        NumericsError: the loss or a weight gradient is not finite.
    """
    loss = loss or token_loss(view, n_targets)
    if not groups:
        return
    if view.source is not None:
        yield from walk_streamed_gradients(view, groups, micro_batch, loss, weights=weights)
        return
    first = 0
    for index, group in progress.track(enumerate(groups), total=len(groups)):
        parts = list(group.split(micro_batch))
        for gradients in _walk_group(view, parts, first, loss, weights=weights):
            gradients.group = index
            yield gradients
            gradients.weights.clear()
        first += len(parts)


@dataclass(slots=True)
class _Segment:
    """One layer's part of one micro-batch's graph; ``output`` carries a graph if it was kept."""

    hidden: Tensor
    output: Tensor


def _walk_group(
    view: DecoderView, parts: list[Tensor], first: int, loss: LossGradient, *, weights: bool
) -> Iterator[LayerGradients]:
    """The gradients of one group's micro-batches, from the last layer to the first."""
    order = [i for i in range(view.n_layers) if i not in view.skipped]
    with requiring_gradients(view, order) if weights else nullcontext():
        inputs = [view.embed(ids) for ids in parts]
        before = _allocated_bytes(view)
        keep_graph = len(inputs) == 1 or view.device.type == "cuda"
        chains = [_forward(view, inputs[0], order, keep_graph=keep_graph)]
        graph = _allocated_bytes(view) - before
        if len(inputs) > 1 and not (keep_graph and _has_room(view, len(inputs) * graph)):
            keep_graph = False
            chains = [[_Segment(s.hidden, s.output.detach()) for s in chains[0]]]
        chains += [_forward(view, i, order, keep_graph=keep_graph) for i in inputs[1:]]
        outputs = [chain[-1].output for chain in chains]
        upstream = list(differentiate_all(loss, outputs, parts, first))
        del outputs
        for layer in reversed(order):
            result = LayerGradients(layer, 0, {}, [], [], list(upstream))
            for i, chain in enumerate(chains):
                segment = chain.pop()
                output = segment.output
                if not keep_graph:
                    with torch.enable_grad():
                        output = view.run_layer(layer, segment.hidden, inputs[i])
                output.backward(upstream[i])
                assert segment.hidden.grad is not None
                upstream[i] = segment.hidden.grad
                result.hidden_in.append(segment.hidden.detach())
                result.hidden_out.append(output.detach())
            del segment, output
            if weights:
                result.weights = take_gradients(view, layer)
            yield result


def _forward(
    view: DecoderView, inputs: LayerInputs, order: list[int], *, keep_graph: bool
) -> list[_Segment]:
    """Run the layers with the graph cut between them."""
    chain = []
    hidden = inputs.hidden
    for layer in order:
        leaf = hidden.detach().requires_grad_()
        with torch.set_grad_enabled(keep_graph):
            hidden = view.run_layer(layer, leaf, inputs)
        chain.append(_Segment(leaf, hidden))
    return chain


def _allocated_bytes(view: DecoderView) -> int:
    return torch.cuda.memory_allocated(view.device) if view.device.type == "cuda" else 0


def _has_room(view: DecoderView, n_bytes: int) -> bool:
    """Whether graphs of that size leave half of the GPU's free memory to gradients."""
    return choose_device(view.device, 2 * n_bytes) == view.device

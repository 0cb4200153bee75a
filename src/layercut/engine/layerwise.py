"""Gradients of the calibration loss, one layer at a time.

A forward pass cuts the autograd graph at every layer boundary. The backward pass then walks from
the last layer to the first and hands out each layer's gradients before it touches the next, so
that never two layers' weight gradients are alive at once, however many micro-batches a gradient
group is split into. The forward graph is kept with one micro-batch per group, and with several on a
GPU that has room for all of theirs; else only the boundary activations are, and each layer runs
forward once more when its turn comes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from layercut.errors import NumericsError
from layercut.models.view import DecoderView, LayerInputs
from layercut.spool import choose_device


@dataclass(slots=True)
class LayerGradients:
    """Gradients that one layer received from one gradient group.

    Attributes:
        layer: its index.
        weights: linear weight name → gradient of the scaled loss, shape of the weight, float32;
            empty when only activations were asked for.
        hidden_in: h_l per micro-batch, (batch, seq, d).
        hidden_out: h_{l+1} per micro-batch, (batch, seq, d).
        grad_out: gradient with respect to h_{l+1} per micro-batch, (batch, seq, d).
    """

    layer: int
    weights: dict[str, Tensor]
    hidden_in: list[Tensor]
    hidden_out: list[Tensor]
    grad_out: list[Tensor]


@dataclass(slots=True)
class _Segment:
    """One layer's part of one micro-batch's graph; ``output`` carries a graph if it was kept."""

    hidden: Tensor
    output: Tensor


def layer_gradients(
    view: DecoderView,
    input_ids: Tensor,
    *,
    micro_batch: int,
    n_targets: int,
    weights: bool = True,
) -> Iterator[LayerGradients]:
    """Differentiate one group's summed token loss divided by ``n_targets``, layer by layer.

    Args:
        view: the model; layers that it currently skips are passed over.
        input_ids: the gradient group, (n_sequences, seq).
        micro_batch: sequences in memory at once.
        n_targets: all calibration targets, so that groups of any size add up to the mean loss.
        weights: whether gradients of the linear weights are wanted.

    Yields:
        The gradients of each layer that is not skipped, from the last to the first. They are
        freed when the next layer is asked for.

    Raises:
        NumericsError: the loss or a weight gradient is not finite.
    """
    micro_batches = list(input_ids.split(micro_batch))
    order = [i for i in range(view.n_layers) if i not in view.skipped]
    with _requires_grad(view, order if weights else []):
        inputs = [view.embed(ids) for ids in micro_batches]
        before = _allocated_bytes(view)
        keep_graph = len(inputs) == 1 or view.device.type == "cuda"
        chains = [_forward(view, inputs[0], order, keep_graph=keep_graph)]
        graph = _allocated_bytes(view) - before
        if len(inputs) > 1 and not (keep_graph and _has_room(view, len(inputs) * graph)):
            keep_graph = False
            chains = [[_Segment(s.hidden, s.output.detach()) for s in chains[0]]]
        chains += [_forward(view, i, order, keep_graph=keep_graph) for i in inputs[1:]]
        upstream = _loss_gradients(view, [c[-1].output for c in chains], micro_batches, n_targets)
        for layer in reversed(order):
            result = LayerGradients(layer, {}, [], [], list(upstream))
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
                result.weights = _take_gradients(view, layer)
            yield result
            result.weights.clear()


def _loss_gradients(
    view: DecoderView, outputs: list[Tensor], micro_batches: list[Tensor], n_targets: int
) -> list[Tensor]:
    """The gradient of the loss with respect to h_L of every micro-batch."""
    pairs = [view.loss_gradient(h, ids) for h, ids in zip(outputs, micro_batches, strict=True)]
    total = float(torch.stack([loss for _, loss in pairs]).sum())
    if not math.isfinite(total):
        raise NumericsError(
            f"the calibration loss is {total}: the model or its data yields values that are not "
            "finite. Check the weights, or use dtype: float32."
        )
    return [gradient / n_targets for gradient, _ in pairs]


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


@contextmanager
def _requires_grad(view: DecoderView, layers: list[int]) -> Iterator[None]:
    parameters = [weight for layer in layers for weight in view.linear_weights(layer).values()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


def _take_gradients(view: DecoderView, layer: int) -> dict[str, Tensor]:
    taken = {}
    for name, parameter in view.linear_weights(layer).items():
        gradient = parameter.grad
        parameter.grad = None
        if gradient is None:  # no token was routed there
            gradient = torch.zeros_like(parameter)
        taken[name] = gradient
    # One answer for all weights: a GPU would be waited for at each.
    finite = torch.stack([gradient.isfinite().all() for gradient in taken.values()])
    if not bool(finite.all()):
        name = next(n for n, good in zip(taken, finite.tolist(), strict=True) if not good)
        raise NumericsError(
            f"the gradient of {name} is not finite. Look for broken calibration text, or use "
            "dtype: float32."
        )
    return {name: gradient.float() for name, gradient in taken.items()}

"""The same gradients where a layer's weights are in memory for a moment only.

All groups pass a layer before the next one is read: forward with every boundary's rows kept, then
backward, where each layer runs once more with its graph. The weights are read twice in all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from layercut import progress
from layercut.engine.layer_gradients import (
    LayerGradients,
    LossGradient,
    differentiate_all,
    requiring_gradients,
    take_gradients,
)
from layercut.models.view import DecoderView, LayerInputs
from layercut.spool import Spool


@dataclass(frozen=True, slots=True)
class _Part:
    """One micro-batch: where its rows are, and what its layers are given beside them."""

    ids: Tensor
    start: int
    rest: Any
    dtype: torch.dtype

    def read(self, rows: Spool, device: torch.device) -> Tensor:
        """Its rows, (batch, seq, d), in the stream's dtype."""
        stop = self.start + self.ids.numel()
        hidden = rows.rows[self.start : stop].to(device, self.dtype)
        return hidden.view(*self.ids.shape, -1)


def walk_streamed_gradients(
    view: DecoderView,
    groups: Sequence[Tensor],
    micro_batch: int,
    loss: LossGradient,
    *,
    weights: bool,
) -> Iterator[LayerGradients]:
    """As `layercut.engine.layerwise.walk_gradients`, layers before groups."""
    order = [i for i in range(view.n_layers) if i not in view.skipped]
    rows, divided = _embed(view, groups, micro_batch)
    history = _run_forward(view, rows, [p for parts in divided for p in parts], order)
    upstream = _start_backward(view, history[-1], divided, loss)
    for layer in progress.track(reversed(order), total=len(order)):
        history.pop()
        with view.holding(layer):
            for group, parts in enumerate(divided):
                # Weights are asked anew: a layer that was read again has other parameters.
                with requiring_gradients(view, [layer]) if weights else nullcontext():
                    result = _differentiate_layer(view, layer, parts, history[-1], upstream)
                    if weights:
                        result.weights = take_gradients(view, layer)
                result.group = group
                yield result
                result.weights.clear()


def _embed(
    view: DecoderView, groups: Sequence[Tensor], micro_batch: int
) -> tuple[Spool, list[list[_Part]]]:
    """The rows that enter layer 0, and every group's micro-batches."""
    rows = _empty(view, sum(group.numel() for group in groups))
    divided, start = [], 0
    shared: dict[torch.Size, Any] = {}
    for group in groups:
        parts = []
        for ids in group.split(micro_batch):
            inputs = view.embed(ids)
            rows.write(start, inputs.hidden)
            # Packed windows have no padding: masks and rotary tables depend on the shape alone.
            rest = shared.setdefault(ids.shape, inputs.rest)
            parts.append(_Part(ids, start, rest, inputs.hidden.dtype))
            start += ids.numel()
        divided.append(parts)
    return rows, divided


@torch.no_grad()
def _run_forward(
    view: DecoderView, rows: Spool, parts: list[_Part], order: list[int]
) -> list[Spool]:
    """The rows at every boundary, from those that enter the first layer on."""
    history = [rows]
    for layer in order:
        after = _empty(view, len(rows))
        with view.holding(layer):
            for part in parts:
                hidden = part.read(history[-1], view.device)
                after.write(
                    part.start, view.run_layer(layer, hidden, LayerInputs(hidden, part.rest))
                )
        history.append(after)
    return history


def _start_backward(
    view: DecoderView, last: Spool, divided: list[list[_Part]], loss: LossGradient
) -> Spool:
    """The gradient with respect to h_L, as rows."""
    upstream = _empty(view, len(last))
    parts = [part for group in divided for part in group]
    outputs = (part.read(last, view.device) for part in parts)
    gradients = differentiate_all(loss, outputs, [part.ids for part in parts], 0)
    for part, gradient in zip(parts, gradients, strict=True):
        upstream.write(part.start, gradient)
    return upstream


def _differentiate_layer(
    view: DecoderView, layer: int, parts: list[_Part], before: Spool, upstream: Spool
) -> LayerGradients:
    """Run one group through a layer, and its gradient back; ``upstream`` then is that of h_l."""
    result = LayerGradients(layer, 0, {}, [], [], [])
    for part in parts:
        leaf = part.read(before, view.device).requires_grad_()
        with torch.enable_grad():
            output = view.run_layer(layer, leaf, LayerInputs(leaf, part.rest))
        gradient = part.read(upstream, view.device).to(output.dtype, copy=True)
        output.backward(gradient)
        assert leaf.grad is not None
        upstream.write(part.start, leaf.grad)
        result.hidden_in.append(leaf.detach())
        result.hidden_out.append(output.detach())
        result.grad_out.append(gradient)
    return result


def _empty(view: DecoderView, n_rows: int) -> Spool:
    return Spool(n_rows, view.hidden_size, device=view.device)

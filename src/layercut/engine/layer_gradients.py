"""What one layer receives from a backward pass, and how its weights give it up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from layercut.errors import NumericsError
from layercut.models.view import DecoderView

LossGradient = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
"""h_L of a micro-batch (batch, seq, d), its ids (batch, seq) and its place among all micro-batches
→ the loss's gradient with respect to h_L, and the loss, ()."""


@dataclass(slots=True)
class LayerGradients:
    """Gradients that one layer received from one gradient group.

    Attributes:
        layer: its index.
        group: that of the gradient group.
        weights: linear weight name → gradient of the loss, shape of the weight, float32; empty
            when only activations were asked for.
        hidden_in: h_l per micro-batch, (batch, seq, d).
        hidden_out: h_{l+1} per micro-batch, (batch, seq, d).
        grad_out: gradient with respect to h_{l+1} per micro-batch, (batch, seq, d).
    """

    layer: int
    group: int
    weights: dict[str, Tensor]
    hidden_in: list[Tensor]
    hidden_out: list[Tensor]
    grad_out: list[Tensor]


def token_loss(view: DecoderView, n_targets: int) -> LossGradient:
    """The summed token loss divided by ``n_targets``."""

    def differentiate(hidden: Tensor, ids: Tensor, _: int) -> tuple[Tensor, Tensor]:
        gradient, loss = view.loss_gradient(hidden, ids)
        return gradient / n_targets, loss / n_targets

    return differentiate


def differentiate_all(
    loss: LossGradient, outputs: Iterable[Tensor], parts: Sequence[Tensor], first: int
) -> Iterator[Tensor]:
    """The gradient with respect to h_L of every micro-batch; the device is waited for once.

    Args:
        loss: what is differentiated.
        outputs: h_L of each.
        parts: ids of each.
        first: place of the first of them among all micro-batches.

    Raises:
        NumericsError: the loss is not finite.
    """
    losses = []
    for place, (hidden, ids) in enumerate(zip(outputs, parts, strict=True), first):
        gradient, value = loss(hidden, ids, place)
        losses.append(value.detach())
        yield gradient
    total = float(torch.stack(losses).sum())
    if not math.isfinite(total):
        raise NumericsError(
            f"the calibration loss is {total}: the model or its data yields values that are not "
            "finite. Check the weights, or use dtype: float32."
        )


@contextmanager
def requiring_gradients(view: DecoderView, layers: Iterable[int]) -> Iterator[None]:
    """Let the layers' linear weights, which are in memory, receive gradients inside the block."""
    parameters = [weight for layer in layers for weight in view.linear_weights(layer).values()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None


def take_gradients(view: DecoderView, layer: int) -> dict[str, Tensor]:
    """The gradients of a layer's linear weights, float32, by name; the weights keep none.

    Raises:
        NumericsError: one is not finite.
    """
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

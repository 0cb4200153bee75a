"""Weights of dropped layers, and those of the same name in the kept layer before them."""

from __future__ import annotations

from collections.abc import Mapping

from layercut.errors import ModelError
from layercut.models.view import DecoderView
from layercut.types import PruningPlan


def merge_targets(plan: PruningPlan) -> dict[int, int]:
    """Dropped layer → the closest kept layer before it; the plan keeps layer 0."""
    return {layer: max(k for k in plan.kept if k < layer) for layer in plan.dropped}


def match_names(view: DecoderView, layer: int, kept: int) -> dict[str, str]:
    """Names of ``layer``'s linear weights → those of the same weights in ``kept``."""
    before, after = (f"{view.layout.layers}.{number}." for number in (layer, kept))
    return {name: after + name.removeprefix(before) for name in view.linear_weights(layer)}


def check_shapes(view: DecoderView, into: Mapping[int, int]) -> None:
    """Refuse layers whose weights cannot be added to each other.

    Args:
        view: the model.
        into: dropped layer → the kept layer that takes its weights.

    Raises:
        ModelError: the kept layer has no weight of that name and shape.
    """
    for layer, kept in into.items():
        weights, others = view.linear_weights(layer), view.linear_weights(kept)
        for name, target in match_names(view, layer, kept).items():
            if target not in others or others[target].shape != weights[name].shape:
                raise ModelError(
                    f"{name} cannot be merged: layer {kept} has no {target} of its shape "
                    f"{list(weights[name].shape)}. Choose another recovery."
                )

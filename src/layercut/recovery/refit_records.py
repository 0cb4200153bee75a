"""Refitted layers in the journal: their changes, from which a walk is repeated without a solve.

The pruned stream is moved on by the change itself, not by the weight that was rounded to its type.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from layercut.engine.journal import Entry, Journal
from layercut.models.output_projections import (
    LinearMap,
    attention_output,
    down_projection,
    store_like,
)
from layercut.models.view import DecoderView
from layercut.types import PruningPlan

ATTENTION, DOWN = "refitted attention outputs", "refitted layers"


def recall_update(
    journal: Journal, kind: str, layer: int, fit: Callable[[], Tensor | None]
) -> Tensor | None:
    """The change D of one weight, (out, in) float32: the recorded one, or that of ``fit``.

    ``None`` if no change lowers the error.
    """

    def compute() -> Entry:
        update = fit()
        return Entry(tensors={} if update is None else {"change": update.float()})

    return journal.recall(kind, layer, compute).tensors.get("change")


def recall_layers(
    view: DecoderView, plan: PruningPlan, journal: Journal, *, cuts_only: bool, attention: bool
) -> dict[str, Tensor] | None:
    """All refitted tensors by name where every change is recorded: no stream is needed then.

    Args:
        view: the intact model.
        plan: which layers go; not layer 0.
        journal: what is recorded.
        cuts_only: the kept layers before a cut alone, or all from the first cut on.
        attention: attention outputs as well.
    """
    tensors: dict[str, Tensor] = {}
    layers = [layer for layer in plan.kept if layer >= plan.cuts[0][0] - 1]
    if cuts_only:
        layers = [layer for layer in layers if plan.target_of(layer) > layer + 1]
    for layer in reversed(layers):  # from the last one, which is not there where anything is not
        output = attention_output(view, layer) if attention else None
        places = [(DOWN, down_projection(view, layer)), *([(ATTENTION, output)] if output else [])]
        for kind, (prefix, module) in places:
            known = journal.find(kind, layer)
            if known is None:
                return None
            if known.tensors:
                tensors[f"{prefix}.weight"] = add_update(module, known.tensors["change"])
    # In the order of a walk, which puts the attention output first.
    return dict(reversed(tensors.items()))


def add_update(module: LinearMap, update: Tensor) -> Tensor:
    """The module's weight with a change (out, in) in it, in the weight's own type and layout."""
    weight: Tensor = module.weight
    return weight + store_like(module, update).to(weight)

"""Refitted layers in the journal: from them a walk is repeated without a solve.

A pruned stream that was moved on by a change itself, and not by the weight that was rounded to its
type, is moved on by it again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from layercut.engine.journal import Entry, Journal
from layercut.types import PruningPlan

KIND = "refitted layers"
CHANGE = "change of the last writer"


@dataclass(slots=True)
class RefittedLayer:
    """What a refit makes of one layer.

    Attributes:
        tensors: the replaced ones by name.
        change: the last writer's D, (out, in), where the layer's output is linear in it.
        experts: of each block of routed experts, how many they are, how many were fitted one by
            one, and how many no token reached.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    change: Tensor | None = None
    experts: tuple[Mapping[str, int], ...] = ()


@dataclass(slots=True)
class RefittedLayers:
    """What a refit makes of all of them: the replaced tensors by name, and ``experts`` by layer."""

    tensors: Mapping[str, Tensor]
    experts: Mapping[int, tuple[Mapping[str, int], ...]]


def recall_layer(journal: Journal, layer: int, fit: Callable[[], RefittedLayer]) -> RefittedLayer:
    """A refitted layer.

    Args:
        journal: has it, or records what ``fit`` gives.
        layer: its index.
        fit: computes it.
    """

    def compute() -> Entry:
        fitted = fit()
        extra = {} if fitted.change is None else {CHANGE: fitted.change.float()}
        return Entry({"experts": list(fitted.experts)}, {**fitted.tensors, **extra})

    return _read(journal.recall(KIND, layer, compute))


def recall_layers(plan: PruningPlan, journal: Journal, *, cuts_only: bool) -> RefittedLayers | None:
    """All refitted layers where every one is recorded: no stream is needed then.

    Args:
        plan: which layers go; not layer 0.
        journal: what is recorded.
        cuts_only: the kept layers before a cut alone, or all from the first cut on.
    """
    layers = [layer for layer in plan.kept if layer >= plan.cuts[0][0] - 1]
    if cuts_only:
        layers = [layer for layer in layers if plan.target_of(layer) > layer + 1]
    found: dict[int, RefittedLayer] = {}
    for layer in reversed(layers):  # from the last one, which is not there where anything is not
        known = journal.find(KIND, layer)
        if known is None:
            return None
        found[layer] = _read(known)
    tensors = {n: t for layer in layers for n, t in found[layer].tensors.items()}
    return RefittedLayers(tensors, {layer: found[layer].experts for layer in layers})


def _read(entry: Entry) -> RefittedLayer:
    tensors = dict(entry.tensors)
    change = tensors.pop(CHANGE, None)
    return RefittedLayer(tensors, change, tuple(entry.values["experts"]))

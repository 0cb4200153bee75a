"""Refitted layers in the journal: from them a walk is repeated without a solve.

A pruned stream that was moved on by a change itself, and not by the weight that was rounded to its
type, is moved on by it again.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from layercut.engine.journal import Entry, Journal
from layercut.types import PruningPlan

KIND = "refitted layers"
CHANGE = "change of the last writer"


def recall_layer(
    journal: Journal, layer: int, fit: Callable[[], tuple[dict[str, Tensor], Tensor | None]]
) -> tuple[dict[str, Tensor], Tensor | None]:
    """A layer's replaced tensors by name, and the change D (out, in) that its output is linear in.

    Args:
        journal: has them, or records what ``fit`` gives.
        layer: its index.
        fit: computes both.
    """

    def compute() -> Entry:
        changed, change = fit()
        return Entry(tensors=changed if change is None else {**changed, CHANGE: change.float()})

    tensors = dict(journal.recall(KIND, layer, compute).tensors)
    change = tensors.pop(CHANGE, None)
    return tensors, change


def recall_layers(
    plan: PruningPlan, journal: Journal, *, cuts_only: bool
) -> dict[str, Tensor] | None:
    """All refitted tensors by name where every layer is recorded: no stream is needed then.

    Args:
        plan: which layers go; not layer 0.
        journal: what is recorded.
        cuts_only: the kept layers before a cut alone, or all from the first cut on.
    """
    layers = [layer for layer in plan.kept if layer >= plan.cuts[0][0] - 1]
    if cuts_only:
        layers = [layer for layer in layers if plan.target_of(layer) > layer + 1]
    found = []
    for layer in reversed(layers):  # from the last one, which is not there where anything is not
        known = journal.find(KIND, layer)
        if known is None:
            return None
        found.append({n: t for n, t in known.tensors.items() if n != CHANGE})
    return {name: tensor for tensors in reversed(found) for name, tensor in tensors.items()}

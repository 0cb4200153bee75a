"""Gradient steps in the journal: the next one needs only the weights behind the last one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from layercut.engine.journal import Entry, Journal

STEPS = "gradient steps"


def recall_steps(
    journal: Journal, tensors: Mapping[str, Tensor], n_steps: int
) -> tuple[Mapping[str, Tensor], list[float]]:
    """The weights behind the last recorded step, and every step's length; none: ``tensors``."""
    for step in range(n_steps, 0, -1):
        known = journal.find(STEPS, step)
        if known is not None:
            return known.tensors, list(known.values["lengths"])
    return tensors, []


def record_step(journal: Journal, reached: Mapping[str, Tensor], lengths: Sequence[float]) -> None:
    """Record the step that was just taken, and discard the one before it."""
    if journal.record(STEPS, len(lengths), Entry({"lengths": list(lengths)}, reached)):
        journal.discard(STEPS, len(lengths) - 1)

"""A repair that is fitted once: the finished patch is in the journal."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from layercut.engine.journal import Entry, Journal
from layercut.recovery.fit import fit_repair
from layercut.registry import MethodCall
from layercut.types import CalibrationBatches, Evidence, PruningPlan, WeightPatch

if TYPE_CHECKING:
    from layercut.models.view import DecoderView

REPAIR = "repairs"


def recall_repair(
    view: DecoderView,
    plan: PruningPlan,
    evidence: Evidence | None,
    batches: CalibrationBatches,
    recovery: MethodCall,
    journal: Journal,
) -> WeightPatch:
    """As `fit_repair`, of a method whose result a checkpoint can hold; recorded as it goes.

    Args:
        view: the intact model; unchanged afterwards.
        plan: which layers go.
        evidence: what selection left, or ``None``.
        batches: calibration text.
        recovery: the method with its options.
        journal: knows the finished patch, or the steps towards it.

    Raises:
        LayercutError: as for `fit_repair`.
    """
    own = journal.within(name_plan(plan))

    def compute() -> Entry:
        patch = fit_repair(view, plan, evidence, batches, recovery, journal=own)
        assert isinstance(patch, WeightPatch)
        values = {"method": patch.method, "notes": patch.notes, "rescaled": patch.rescaled}
        return Entry(values, patch.tensors)

    entry = own.recall(REPAIR, recovery.name, compute)
    own.conclude(REPAIR, recovery.name)
    return WeightPatch(tensors=entry.tensors, **entry.values)


def name_plan(plan: PruningPlan) -> str:
    """A name for the layers that a plan drops, short however many they are."""
    return hashlib.sha256(str(plan.dropped).encode()).hexdigest()[:12]

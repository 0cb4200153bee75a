"""Leave the kept weights as they are: the control for every recovery."""

from __future__ import annotations

from layercut.models.view import DecoderView
from layercut.registry import Method, MethodOptions
from layercut.types import CalibrationBatches, Evidence, PruningPlan, WeightPatch


class Options(MethodOptions):
    """No options."""


METHOD = Method(reads_model=False)


def fit(
    view: DecoderView,
    plan: PruningPlan,
    evidence: Evidence | None,
    batches: CalibrationBatches,
    options: Options,
) -> WeightPatch:
    """An empty patch."""
    return WeightPatch(tensors={}, method="none")

"""Repairs of both kinds, fitted as the comparison fits them."""

from __future__ import annotations

from typing import Any

from layercut.models.view import DecoderView
from layercut.recovery.fit import fit_repair
from layercut.registry import resolve
from layercut.types import CalibrationBatches, PruningPlan, RuntimeMaps


def fitted_maps(
    view: DecoderView, plan: PruningPlan, batches: CalibrationBatches, method: str, **options: Any
) -> RuntimeMaps:
    """The matrices of a recovery that no checkpoint can hold."""
    repair = fit_repair(view, plan, None, batches, resolve("recovery", method, options))
    assert isinstance(repair, RuntimeMaps)
    return repair

"""Repair of the kept weights: a patch of named tensors, read-only on the model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from layercut import registry
from layercut.checkpoints.patch import round_patch
from layercut.engine.journal import NO_JOURNAL, Journal
from layercut.errors import NumericsError, PlanError, RecipeError
from layercut.models.check_method import check_method
from layercut.models.droppable import check_dropped
from layercut.registry import MethodCall
from layercut.types import CalibrationBatches, Evidence, PruningPlan, RuntimeMaps, WeightPatch

if TYPE_CHECKING:
    from layercut.engine.residual_stream import ResidualStream
    from layercut.models.view import DecoderView


def fit(
    view: DecoderView,
    plan: PruningPlan,
    evidence: Evidence | None,
    batches: CalibrationBatches,
    *,
    method: str = "refit",
    **options: Any,
) -> WeightPatch:
    """Fit replacements for some of the kept weights.

    Args:
        view: the intact model; unchanged afterwards.
        plan: which layers go.
        evidence: what selection left, or ``None``.
        batches: calibration text.
        method: a file of ``layercut/recovery/methods``, with ``-`` for ``_``.
        **options: that method's own options.

    Returns:
        Tensors in the dtype that the checkpoint stores, so that memory and file agree.

    Raises:
        RecipeError: unknown method or option, or a method whose result no checkpoint holds.
        PlanError: the method needs a kept layer before every cut, and layer 0 is dropped.
        ModelError: the model cannot be pruned so, or not repaired exactly by this method.
        NumericsError: a fitted tensor is not finite.
    """
    registry.check_stores(method)
    patch = fit_repair(view, plan, evidence, batches, registry.resolve("recovery", method, options))
    assert isinstance(patch, WeightPatch)
    return patch


def fit_repair(
    view: DecoderView,
    plan: PruningPlan,
    evidence: Evidence | None,
    batches: CalibrationBatches,
    recovery: MethodCall,
    *,
    dense: ResidualStream | None = None,
    journal: Journal = NO_JOURNAL,
) -> WeightPatch | RuntimeMaps:
    """Fit what makes up for the dropped layers: weights, or matrices for run time.

    Args:
        view: the intact model; unchanged afterwards.
        plan: which layers go.
        evidence: what selection left, or ``None``.
        batches: calibration text.
        recovery: the method with its options.
        dense: the intact model's stream over ``batches``, where several recoveries share it.
        journal: where a method that can do so records its steps.

    Raises:
        PlanError: the method needs a kept layer before every cut, and layer 0 is dropped.
        ModelError: the model cannot be pruned so, or not repaired exactly by this method.
        NumericsError: a fitted tensor is not finite.
    """
    if recovery.method.needs_previous_layer and 0 in plan.dropped:
        raise PlanError(
            f"{recovery.name} needs a kept layer before every cut, but layer 0 is dropped. Protect "
            "layer 0, or choose another recovery."
        )
    check_dropped(view, plan.dropped)
    check_method(recovery, view, batches, len(plan.dropped))
    shared: dict[str, Any] = {"dense": dense} if recovery.method.shares_dense_stream else {}
    shared |= {"journal": journal} if recovery.method.records_steps else {}
    repair: Any = recovery.function(view, plan, evidence, batches, recovery.options, **shared)
    expected = WeightPatch if recovery.method.stores else RuntimeMaps
    if not isinstance(repair, expected):
        raise RecipeError(
            f"recovery '{recovery.name}' returned a {type(repair).__name__} where its METHOD "
            f"promises a {expected.__name__}. Correct its method file."
        )
    if isinstance(repair, RuntimeMaps):
        tensors = {f"the map behind layer {layer}": a for layer, a in repair.maps.items()}
    else:
        for name in repair.tensors:
            if view.layout.new_name(name, plan.new_index) is None:
                raise PlanError(
                    f"recovery '{recovery.name}' changes {name}, which the pruned model does not "
                    "have. Its method file must change kept layers only."
                )
        repair = round_patch(view.path, view.layout, replace(repair, method=recovery.name))
        tensors = dict(repair.tensors)
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise NumericsError(
                f"recovery '{recovery.name}' made values in {name} that are not finite. "
                "Use more calibration text, or recovery.method: none."
            )
    return cast(WeightPatch | RuntimeMaps, repair)

"""Repair of the kept weights: a patch of named tensors, read-only on the model."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from layercut import registry
from layercut.checkpoints.patch import round_patch
from layercut.errors import NumericsError, PlanError
from layercut.models.droppable import check_dropped
from layercut.types import CalibrationBatches, Evidence, PruningPlan, WeightPatch

if TYPE_CHECKING:
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
        method: a file of ``layercut/recovery``, with ``-`` for ``_``.
        **options: that method's own options.

    Returns:
        Tensors in the dtype that the checkpoint stores, so that memory and file agree.

    Raises:
        RecipeError: unknown method or option.
        PlanError: the method needs a kept layer before every cut, and layer 0 is dropped.
        ModelError: the model cannot be pruned so, or not repaired exactly by this method.
        NumericsError: a fitted tensor is not finite.
    """
    module = registry.load_method("recovery", method)
    parsed = registry.parse_options("recovery", method, options)
    if getattr(module, "NEEDS_PRECEDING", False) and 0 in plan.dropped:
        raise PlanError(
            f"{method} needs a kept layer before every cut, but layer 0 is dropped. Protect layer "
            "0, or choose another recovery."
        )
    registry.check_model("recovery", method, view)
    check_dropped(view, plan.dropped)
    parsed.check(view, batches, len(plan.dropped))
    patch: WeightPatch = module.fit(view, plan, evidence, batches, parsed)
    patch = round_patch(view.path, view.layout, replace(patch, method=method))
    for name, tensor in patch.tensors.items():
        if not bool(tensor.isfinite().all()):
            raise NumericsError(
                f"recovery '{method}' made values in {name} that are not finite. "
                "Use more calibration text, or recovery.method: none."
            )
    return patch

"""Matrices that no weight can hold, applied to the residual stream at every cut, in memory.

At run time each takes d² operations per token, which a pruned checkpoint does not have to pay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from layercut.engine.residual_stream import ResidualStream
from layercut.errors import PlanError
from layercut.models.view import DecoderView
from layercut.recovery.paired_walk import KeptLayer, paired_walk
from layercut.types import CalibrationBatches, PruningPlan, RuntimeMaps


def fit_maps(
    view: DecoderView,
    plan: PruningPlan,
    batches: CalibrationBatches,
    fit_map: Callable[[KeptLayer], Tensor],
    *,
    dense: ResidualStream | None,
) -> dict[int, Tensor]:
    """One matrix per cut, in order, each fitted in the model that the earlier ones repaired.

    Args:
        view: the intact model; unchanged afterwards.
        plan: which layers go; not layer 0.
        batches: calibration text.
        fit_map: A, (d, d) float32, from the stream behind the kept layer before a cut.
        dense: the intact model's stream where it is shared.
    """
    maps = {}
    own = view.ranks.share_batches(batches)
    for kept in paired_walk(view, plan, own, dense=dense):
        if kept.before_cut:
            kept.pruned.advance(kept.layer)
            maps[kept.layer] = fit_map(kept)
            for rows in kept.pruned.states.slices():
                rows.copy_(rows @ maps[kept.layer].to(rows.device))
    return maps


@contextmanager
def applied_maps(view: DecoderView, plan: PruningPlan, repair: RuntimeMaps) -> Iterator[None]:
    """Apply the matrices at the cuts inside the block; go with ``view.skipping(plan.dropped)``.

    Args:
        view: the intact model.
        plan: which layers go.
        repair: what was fitted to this plan.

    Raises:
        PlanError: a matrix does not stand at a cut of the plan.
    """
    wrong = sorted(set(repair.maps) - {first - 1 for first, _ in plan.cuts})
    if wrong:
        raise PlanError(
            f"an operation stands behind layer {wrong[0]}, where the plan has no cut. Fit the "
            "operations to this plan."
        )
    handles = [
        view.layers[layer].register_forward_hook(_multiply_output(matrix.to(view.device)))
        for layer, matrix in repair.maps.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _multiply_output(matrix: Tensor) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        stream = output if isinstance(output, Tensor) else output[0]
        # Autocast would round the whole residual stream to bfloat16.
        with torch.autocast(stream.device.type, enabled=False):
            changed = (stream.float() @ matrix).to(stream.dtype)
        return changed if isinstance(output, Tensor) else (changed, *output[1:])

    return hook

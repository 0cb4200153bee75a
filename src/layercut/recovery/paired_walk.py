"""The dense and the pruned model side by side: both residual streams at every kept layer.

Before the first cut both are the same, so the walk starts at the kept layer in front of it. The
pruned stream carries every repair made so far: what changes a layer's output changes ``pruned``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from layercut import progress
from layercut.engine.residual_stream import ResidualStream, start_dense_stream
from layercut.models.view import DecoderView
from layercut.spool import Spool
from layercut.types import CalibrationBatches, PruningPlan


@dataclass(slots=True)
class KeptLayer:
    """One place of the walk.

    Attributes:
        layer: the kept layer's index in the input model.
        before_cut: whether the next layer is dropped.
        dense: the intact model's stream, at the input of the next kept layer: the target.
        pruned: the pruned model's stream in front of the layer; the walk runs it through the
            layer afterwards, unless that was done meanwhile.
    """

    layer: int
    before_cut: bool
    dense: ResidualStream
    pruned: ResidualStream

    @property
    def target(self) -> Spool:
        """What the layer's output should be, (n_tokens, d)."""
        return self.dense.states

    def missing(self) -> Spool:
        """What the layer's output lacks of the target, (n_tokens, d), once the layer has run."""
        outputs = self.pruned.states
        rows = Spool(len(outputs), outputs.rows.shape[1], device=outputs.device)
        for missing, target, output in zip(
            rows.slices(), self.target.slices(), outputs.slices(), strict=True
        ):
            missing.copy_(target.to(output.device) - output)
        return rows


def paired_walk(
    view: DecoderView,
    plan: PruningPlan,
    batches: CalibrationBatches,
    *,
    dense: ResidualStream | None = None,
) -> Iterator[KeptLayer]:
    """Go through the kept layers from the first cut on, each with its dense target.

    Args:
        view: the intact model; unchanged afterwards.
        plan: which layers go.
        batches: the text that this rank walks.
        dense: the intact model's stream over ``batches`` where several recoveries share it.
    """
    dense = start_dense_stream(view, batches, dense)
    first = max(0, plan.cuts[0][0] - 1) if plan.cuts else 0
    dense.advance_to(first)
    pruned = dense.fork()
    remaining = [layer for layer in plan.kept if layer >= first]
    for layer in progress.track(remaining, total=len(remaining)):
        target = plan.target_of(layer)
        dense.advance_to(target)
        yield KeptLayer(layer, target > layer + 1, dense, pruned)
        if pruned.layer <= layer:
            pruned.advance(layer)

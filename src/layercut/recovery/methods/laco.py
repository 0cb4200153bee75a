"""Add to a kept layer how every dropped layer behind it differs from it (LaCo).

Source   arXiv:2402.11187 §2.2, reserving-differences-while-seeking-common merge
Formula  W_k ← W_k + Σ_j (W_j − W_k)
         j: the dropped layers between k and the next kept layer; W: linear weights of equal name,
         the differences to the original W_k
Meaning  one dropped layer replaces W_k; m of them extrapolate: Σ_j W_j − (m − 1)·W_k
Cost     one pass over the weights, none over the text; float32 copies of the merged weights
Limits   needs a kept layer before every cut, and weights of equal shape in both layers. LaCo's own
         search for the layers to merge, by the similarity of outputs, is not part of it
"""

from __future__ import annotations

from layercut import progress
from layercut.models.view import DecoderView
from layercut.models.weight_store import make_store
from layercut.recovery.layer_merging import check_shapes, match_names, merge_targets
from layercut.registry import Method, MethodOptions
from layercut.types import CalibrationBatches, Evidence, PruningPlan, WeightPatch


class Options(MethodOptions):
    """No options."""


METHOD = Method(needs_previous_layer=True)


def fit(
    view: DecoderView,
    plan: PruningPlan,
    evidence: Evidence | None,
    batches: CalibrationBatches,
    options: Options,
) -> WeightPatch:
    """Sum the differences in float32; ``batches`` are not read."""
    into = merge_targets(plan)
    check_shapes(view, into)
    tensors = make_store(view)
    for layer, kept in progress.track(into.items(), total=len(into)):
        with view.holding(kept), view.holding(layer):
            for name, target in match_names(view, layer, kept).items():
                original = view.model.get_parameter(target).data.float()
                difference = view.model.get_parameter(name).data.float() - original
                tensors[target] = tensors.get(target, original) + difference
    notes = {"merged_into": {str(layer): kept for layer, kept in into.items()}}
    return WeightPatch(tensors, "laco", notes)

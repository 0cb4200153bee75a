"""Drop the one contiguous block of layers that turns the residual stream least (UIDL).

Source   arXiv:2403.17887 §3
Formula  l* = argmin_l mean_t arccos(cos(h_{l,t}, h_{l+n,t})) / π; layers l*…l*+n−1 go
         h_l (tokens, d): residual stream entering layer l; h_L is the one before the final norm
Ties     the block that starts later goes
Cost     one forward pass, for blocks of every size
Limits   never more than one cut; a protected layer cannot lie within it
"""

from __future__ import annotations

import time

from layercut.engine.journal import Entry
from layercut.errors import PlanError
from layercut.models.check_method import check_model
from layercut.models.view import DecoderView
from layercut.registry import Method, MethodOptions
from layercut.scoring.methods.angular_distance import angular_distances
from layercut.scoring.score import with_provenance
from layercut.selection.pattern import keeps_one, keeps_pattern, no_such_plan_error
from layercut.selection.select import PlanOfSize, Request
from layercut.types import CalibrationBatches, Evidence, LayerScores, LayerSet, PruningPlan, Round


class Options(MethodOptions):
    """No options."""


METHOD = Method(needs_scoring="angular-distance")


def plan(view: DecoderView, batches: CalibrationBatches, request: Request) -> PlanOfSize:
    """Measure every angle once; each size is then a look along one diagonal."""
    check_model(request.scoring, view)
    start = time.perf_counter()
    measured = request.journal.recall(
        "angles",
        "all",
        lambda: Entry(tensors={"mean": angular_distances(view, batches, request.scoring.options)}),
    )
    distances = measured.tensors["mean"]
    bare = LayerScores(tuple(distances.diagonal(1).tolist()))
    seconds = time.perf_counter() - start
    scores = with_provenance(view, batches, bare, request.scoring, seconds)

    def plan_size(n_drop: int) -> tuple[PruningPlan, Evidence]:
        dropped = find_closest_block(distances.diagonal(n_drop).tolist(), n_drop, request)
        chosen = PruningPlan(
            model=view.name,
            n_layers=view.n_layers,
            dropped=dropped,
            method="block",
            rounds=(Round(scores.values, dropped, None),),
            fingerprint=scores.fingerprint,
        )
        return chosen, Evidence(scores=(scores,))

    return plan_size


def find_closest_block(distances: list[float], n_drop: int, request: Request) -> LayerSet:
    """The allowed block of ``n_drop`` layers with the smallest distance between its ends.

    Args:
        distances: of the block that starts at layer 0, 1, …
        n_drop: its length.
        request: what must stay, and the pattern that the others must follow.

    Raises:
        PlanError: there is none.
    """
    n_layers = len(distances) + n_drop - 1
    blocks = {start: tuple(range(start, start + n_drop)) for start in range(len(distances))}
    free = {
        start: block
        for start, block in blocks.items()
        if not request.protect & set(block) and keeps_one(request.keep_one_of, block)
    }
    if not free:
        raise PlanError(
            f"no block of {n_drop} of {n_layers} layers lies between the protected ones. Lower "
            "drop_layers, protect fewer, or set selection.strategy: lowest."
        )
    allowed = [start for start, block in free.items() if keeps_pattern(request.layer_types, block)]
    if not allowed:
        raise no_such_plan_error(n_drop, n_layers)
    return blocks[min(allowed, key=lambda start: (distances[start], -start))]

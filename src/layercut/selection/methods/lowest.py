"""Drop the lowest-scored layers, at once or one decision at a time.

Source   one-shot: arXiv:2403.03853; in rounds: arXiv:2602.14649 (one forward-backward a decision)
Rule     one-shot: the n lowest scores go; each: score, drop the lowest, score the rest again
Ties     the lower index stays
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

from layercut import progress
from layercut.models.view import DecoderView
from layercut.registry import Method, MethodOptions
from layercut.selection.pattern import choose_lowest_in_pattern, keeps_one
from layercut.selection.select import PlanOfSize, Request
from layercut.types import (
    CalibrationBatches,
    Evidence,
    GradientRecord,
    LayerScores,
    PruningPlan,
    Round,
)


class Options(MethodOptions):
    """No options."""


METHOD = Method(reads_model=False)


def plan(view: DecoderView, batches: CalibrationBatches, request: Request) -> PlanOfSize:
    """Score ``view`` once, or after every drop; dropped layers are skipped, not cut."""
    memory: list[LayerScores] = []
    gradient_log: GradientRecord | None = None

    def plan_size(n_drop: int) -> tuple[PruningPlan, Evidence]:
        nonlocal gradient_log
        n_each = 1 if request.rounds == "each" else n_drop
        dropped: list[int] = []
        rounds: list[Round] = []
        while len(dropped) < n_drop:
            progress.status(f"decision {len(rounds) + 1} of {n_drop // n_each}")
            if len(rounds) == len(memory):
                with view.skipping(dropped):
                    new = request.scorer(view, batches, request.scoring)
                # Later rounds no longer see the dropped layers, and each record is large.
                gradient_log = gradient_log or new.gradient_log
                memory.append(replace(new, gradient_log=None))
            scores = memory[len(rounds)]
            chosen, margin = _choose(scores.values, n_each, request, dropped)
            dropped += chosen
            rounds.append(Round(scores.values, tuple(chosen), margin))
        evidence = Evidence(tuple(memory[: len(rounds)]), gradient_log=gradient_log)
        chosen_plan = PruningPlan(
            model=view.name,
            n_layers=view.n_layers,
            dropped=tuple(sorted(dropped)),
            method=request.scoring.name,
            rounds=tuple(rounds),
            fingerprint=evidence.scores[-1].fingerprint,
        )
        return chosen_plan, evidence

    return plan_size


def _choose(
    values: Sequence[float | None], n: int, request: Request, dropped: Sequence[int]
) -> tuple[list[int], float | None]:
    if request.layer_types is None:
        left = request.keep_one_of - set(dropped)
        chosen, margin = choose_lowest(values, n, protect=request.protect)
        if keeps_one(left, chosen):
            return chosen, margin
        # The best that can be done is to keep the one with the highest score, ties the lower.
        best = max(left, key=lambda layer: (cast(float, values[layer]), -layer))
        return choose_lowest(values, n, protect=request.protect | {best})
    # One-shot: every layer has a score.
    scored = [value for value in values if value is not None]
    plan = choose_lowest_in_pattern(
        scored, request.layer_types, n, request.protect, request.keep_one_of
    )
    return list(plan), None


def choose_lowest(
    values: Sequence[float | None], n: int, *, protect: frozenset[int] = frozenset()
) -> tuple[list[int], float | None]:
    """The ``n`` lowest-scored free layers, and how clear the cut was.

    Returns:
        The layers in ascending order, and the margin: the gap in score between the last dropped
        and the first kept candidate over the range of all candidates; ``None`` if no candidate
        is left or all scores are equal.
    """
    ranked = sorted(
        ((value, -layer) for layer, value in enumerate(values) if value is not None),
    )
    ranked = [(value, tie) for value, tie in ranked if -tie not in protect]
    chosen = sorted(-tie for _, tie in ranked[:n])
    spread = ranked[-1][0] - ranked[0][0]
    if len(ranked) == n or spread == 0:
        return chosen, None
    return chosen, (ranked[n][0] - ranked[n - 1][0]) / spread

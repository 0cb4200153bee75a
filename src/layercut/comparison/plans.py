"""Layers for every choice and size; each scoring is computed once and its time counted for all.

A scoring is known by its method, its options and the layers that were skipped: SLEB's first round
is Shortened-LLaMA's, and six rounds are the first six of twelve. What a choice costs is what it
would have cost alone: the seconds of every scoring that its size needs, shared or not.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from layercut import progress, registry
from layercut.comparison.entries import LayerChoice
from layercut.comparison.store import Store, digest
from layercut.errors import DataError, ModelError, NumericsError, PlanError, RecipeError
from layercut.models.check_method import check_method
from layercut.models.droppable import check_dropped
from layercut.registry import MethodCall
from layercut.scoring.score import score_layers
from layercut.selection.select import PlanOfSize, Request, plan_sizes, resolve_request
from layercut.types import (
    CalibrationBatches,
    Evidence,
    GradientRecord,
    LayerScores,
    PruningPlan,
    Round,
)

if TYPE_CHECKING:
    from layercut.models.view import DecoderView

NOT_APPLICABLE = (RecipeError, PlanError, ModelError, DataError, NumericsError)
"""What says that a method cannot work here; everything else is the machine's fault or ours."""


@dataclass(frozen=True, slots=True)
class CachedPlan:
    """A plan, and what it would have cost to choose it alone.

    Attributes:
        plan: which layers go.
        seconds: ``score`` and ``select``.
    """

    plan: PruningPlan
    seconds: dict[str, float]


class ScoreCache:
    """`layercut.scoring.score.score_layers` with a memory that outlives the process.

    Attributes:
        fresh_seconds: time spent in scorings that were not remembered.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.fresh_seconds = 0.0
        self._log: tuple[str, GradientRecord] | None = None

    def __call__(
        self, view: DecoderView, batches: CalibrationBatches, scoring: MethodCall
    ) -> LayerScores:
        """As `layercut.scoring.score.score_layers`; without a record of gradients.

        `gradient_log` has that.
        """
        skipped = sorted(view.skipped)
        key = self._key(scoring, skipped)
        record = self.store.scores.get(key)
        if record is None:
            new = score_layers(view, batches, scoring)
            self.fresh_seconds += new.seconds
            if new.gradient_log is not None and not skipped:
                self._log = key, new.gradient_log
            marks = {
                "skipped": skipped,
                "strategy": "lowest",
                "gradient_log": new.gradient_log is not None,
            }
            record = self.store.scores.add(key, new.to_json(view.name) | marks)
        return LayerScores(
            values=tuple(record["scores"]),
            method=scoring.name,
            options=record["options"],
            n_targets=record["n_targets"],
            seconds=record["seconds"],
            fingerprint=record["fingerprint"],
        )

    def gradient_log(
        self, view: DecoderView, batches: CalibrationBatches, scoring: MethodCall
    ) -> GradientRecord | None:
        """The gradients behind a scoring of the intact model, if it made a record of them.

        A record is too large to be kept on disk: where another process scored, it is made again.
        """
        key = self._key(scoring, [])
        known = self.store.scores.get(key)
        if known is None or not known["gradient_log"]:
            return None
        if self._log is None or self._log[0] != key:
            log = score_layers(view, batches, scoring).gradient_log
            self._log = None if log is None else (key, log)
        return None if self._log is None else self._log[1]

    def _key(self, scoring: MethodCall, skipped: list[int]) -> str:
        revision = [scoring.method.revision] if scoring.method.revision > 1 else []
        options = scoring.options.model_dump(mode="json")
        return digest(scoring.name, options, skipped, *revision)


class PlanCache:
    """Plans of one model and text for any choice and size."""

    def __init__(
        self, view: DecoderView, batches: CalibrationBatches, store: Store, *, seed: int
    ) -> None:
        self.view = view
        self.batches = batches
        self.store = store
        self.seed = seed
        self.scores = ScoreCache(store)

    def choose(
        self, choice: LayerChoice, sizes: Sequence[int], recovery: MethodCall
    ) -> dict[int, CachedPlan | str]:
        """Size → the plan, or why there is none. What the sizes share is computed once.

        Args:
            choice: how layers are chosen.
            sizes: layers to drop.
            recovery: what repairs the model, which may need a layer that the choice does not.
        """
        scoring = self.resolve(choice)
        plans: dict[int, CachedPlan | str] = {}
        plan_of_size: PlanOfSize | None = None
        for size in sizes:
            try:
                request = resolve_request(
                    self.view,
                    scoring=scoring,
                    strategy=choice.strategy,
                    rounds=choice.rounds,
                    drop_layers=size,
                    protect=sorted(choice.protect(self.view.n_layers)),
                    recovery=recovery,
                    scorer=self.scores,
                )
                key = digest(asdict(choice), self.seed, sorted(request.protect), size)
                record = self.store.plans.get(key)
                if record is None:
                    if plan_of_size is None:
                        check_method(scoring, self.view, self.batches, size)
                        plan_of_size = plan_sizes(self.view, self.batches, request)
                    record = self.store.plans.add(key, self._plan(plan_of_size, request, size))
            except NOT_APPLICABLE as error:
                plans[size] = str(error)
                continue
            plans[size] = CachedPlan(read_plan(record["plan"], self.view.name), record["seconds"])
        return plans

    def evidence(self, choice: LayerChoice, *, gradients: bool) -> Evidence:
        """What the choice leaves for recovery: the record of gradients, where one is wanted."""
        if not gradients:
            return Evidence(scores=())
        log = self.scores.gradient_log(self.view, self.batches, self.resolve(choice))
        return Evidence(scores=(), gradient_log=log)

    def resolve(self, choice: LayerChoice) -> MethodCall:
        """The choice's scoring, with the seed where it takes one."""
        return registry.resolve("scoring", choice.scoring, dict(choice.options), seed=self.seed)

    def _plan(self, plan_of_size: PlanOfSize, request: Request, size: int) -> dict[str, Any]:
        scored = self.scores.fresh_seconds
        start = time.perf_counter()
        plan, evidence = plan_of_size(size)
        whole = time.perf_counter() - start
        check_dropped(self.view, plan.dropped)
        if request.strategy != "lowest":  # what scores by itself, for the plot of all scores
            self._keep(request, evidence.scores[0])
        seconds = {
            "score": sum(scores.seconds for scores in evidence.scores),
            # The search alone: what was scored on the way is in `score`, remembered or not.
            "select": max(0.0, whole - (self.scores.fresh_seconds - scored)),
        }
        progress.status(f"{size} layers: {', '.join(map(str, plan.dropped))}")
        return {"plan": plan.to_json(), "seconds": seconds}

    def _keep(self, request: Request, scores: LayerScores) -> None:
        key = digest(request.strategy, request.scoring.name, self.seed)
        if self.store.scores.get(key) is None:
            marks = {"skipped": [], "strategy": request.strategy, "gradient_log": False}
            self.store.scores.add(key, scores.to_json(self.view.name) | marks)


def read_plan(content: dict[str, Any], model: str) -> PruningPlan:
    """The plan that `PruningPlan.to_json` wrote."""
    return PruningPlan(
        model=model,
        n_layers=content["n_layers"],
        dropped=tuple(content["dropped"]),
        method=content["method"],
        rounds=tuple(
            Round(tuple(r["scores"]), tuple(r["dropped"]), r["margin"]) for r in content["rounds"]
        ),
        curve={int(n): price for n, price in content["curve"].items()},
    )

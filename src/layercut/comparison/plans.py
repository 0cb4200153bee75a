"""Layers for every choice and size, each scoring made once and its time booked to all who use it.

A scoring is known by its method, its options and the layers that were skipped: SLEB's first round
is Shortened-LLaMA's, and six rounds are the first six of twelve. What a choice costs is what it
would have cost alone: the seconds of every scoring that its size needs, shared or not.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from layercut import progress, registry
from layercut.comparison.entries import Choice
from layercut.comparison.store import Store, digest
from layercut.errors import DataError, ModelError, NumericsError, PlanError, RecipeError
from layercut.models.droppable import check_dropped, fixed_layers
from layercut.scoring.score import score
from layercut.selection.select import Planner, Request, check_request, planner
from layercut.types import CalibrationBatches, Evidence, LayerScores, PruningPlan, Round

if TYPE_CHECKING:
    from layercut.gradients.log import GradientLog
    from layercut.models.view import DecoderView

CANNOT = (RecipeError, PlanError, ModelError, DataError, NumericsError)
"""What says that a method cannot work here; everything else is the machine's fault or ours."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """A plan, and what it would have cost to choose it alone.

    Attributes:
        plan: which layers go.
        seconds: ``score`` and ``select``.
    """

    plan: PruningPlan
    seconds: dict[str, float]


class Scorings:
    """`layercut.scoring.score.score` with a memory that outlives the process.

    Attributes:
        fresh_seconds: time spent in scorings that were not remembered.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.fresh_seconds = 0.0
        self._log: tuple[str, GradientLog] | None = None

    def __call__(
        self, view: DecoderView, batches: CalibrationBatches, *, method: str, **options: Any
    ) -> LayerScores:
        """As `layercut.scoring.score.score`; without a record of gradients (see `gradient_log`)."""
        skipped = sorted(view.skipped)
        key = self._key(method, options, skipped)
        record = self.store.scores.get(key)
        if record is None:
            new = score(view, batches, method=method, **options)
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
            method=method,
            options=record["options"],
            n_targets=record["n_targets"],
            seconds=record["seconds"],
            fingerprint=record["fingerprint"],
        )

    def gradient_log(
        self, view: DecoderView, batches: CalibrationBatches, method: str, options: dict[str, Any]
    ) -> GradientLog | None:
        """The gradients behind a scoring of the intact model, if it made a record of them.

        A record is too large to be kept on disk: where another process scored, it is made again.
        """
        key = self._key(method, options, [])
        known = self.store.scores.get(key)
        if known is None or not known["gradient_log"]:
            return None
        if self._log is None or self._log[0] != key:
            log = score(view, batches, method=method, **options).gradient_log
            self._log = None if log is None else (key, log)
        return None if self._log is None else self._log[1]

    def _key(self, method: str, options: dict[str, Any], skipped: list[int]) -> str:
        parsed = registry.parse_options("scoring", method, options)
        return digest(method, parsed.model_dump(mode="json"), skipped)


class Chooser:
    """Plans of one model and text for any choice and size."""

    def __init__(
        self, view: DecoderView, batches: CalibrationBatches, store: Store, *, seed: int
    ) -> None:
        self.view = view
        self.batches = batches
        self.store = store
        self.seed = seed
        self.scorings = Scorings(store)

    def choose(
        self, choice: Choice, sizes: Sequence[int], *, protect: Sequence[int] = ()
    ) -> dict[int, Chosen | str]:
        """Size → the plan, or why there is none. What the sizes share is computed once.

        Args:
            choice: how layers are chosen.
            sizes: layers to drop.
            protect: layers that must stay besides those of the choice and of the family.
        """
        view = self.view
        kept = {*protect, *choice.protect(view.n_layers), *fixed_layers(view)}
        keys = {size: digest(choice.to_json(), self.seed, sorted(kept), size) for size in sizes}
        found: dict[int, Chosen | str] = {}
        plan_of: Planner | None = None
        for size in sizes:
            record = self.store.plans.get(keys[size])
            if record is None:
                try:
                    check_request(view.n_layers, drop_layers=size, protect=sorted(kept))
                    plan_of = plan_of or self._planner(choice, frozenset(kept), size)
                    record = self._planned(plan_of, choice, size)
                except CANNOT as error:
                    found[size] = str(error)
                    continue
                record = self.store.plans.add(keys[size], record)
            found[size] = Chosen(plan_from(record["plan"], view.name), record["seconds"])
        return found

    def evidence(self, choice: Choice, *, gradients: bool) -> Evidence:
        """What the choice leaves for recovery: the record of gradients, where one is wanted."""
        if not gradients:
            return Evidence(scores=())
        options = self.options(choice)
        log = self.scorings.gradient_log(self.view, self.batches, choice.scoring, options)
        return Evidence(scores=(), gradient_log=log)

    def options(self, choice: Choice) -> dict[str, Any]:
        """The scoring's options, with the seed where it takes one."""
        return seeded("scoring", choice.scoring, choice.options, self.seed)

    def _planner(self, choice: Choice, protect: frozenset[int], size: int) -> Planner:
        registry.check_model("scoring", choice.scoring, self.view)
        options = self.options(choice)
        parsed = registry.parse_options("scoring", choice.scoring, options)
        parsed.check(self.view, self.batches, size)
        request = Request(
            protect=protect,
            scoring=choice.scoring,
            scoring_options=options,
            rounds=choice.rounds,
            scorer=self.scorings,
        )
        return planner(self.view, self.batches, strategy=choice.strategy, request=request)

    def _planned(self, plan_of: Planner, choice: Choice, size: int) -> dict[str, Any]:
        scored = self.scorings.fresh_seconds
        start = time.perf_counter()
        plan, evidence = plan_of(size)
        whole = time.perf_counter() - start
        check_dropped(self.view, plan.dropped)
        if choice.strategy != "lowest":  # what scores by itself, for the figure of all scores
            self._keep(choice, evidence.scores[0])
        seconds = {
            "score": sum(scores.seconds for scores in evidence.scores),
            # The search alone: what was scored on the way is in `score`, remembered or not.
            "select": max(0.0, whole - (self.scorings.fresh_seconds - scored)),
        }
        progress.status(f"{size} layers: {', '.join(map(str, plan.dropped))}")
        return {"plan": plan.to_json(), "seconds": seconds}

    def _keep(self, choice: Choice, scores: LayerScores) -> None:
        key = digest(choice.to_json(), self.seed)
        if self.store.scores.get(key) is None:
            marks = {"skipped": [], "strategy": choice.strategy, "gradient_log": False}
            self.store.scores.add(key, scores.to_json(self.view.name) | marks)


def seeded(room: registry.Room, name: str, options: Any, seed: int) -> dict[str, Any]:
    """A method's options with the comparison's seed, where it takes one and has none."""
    given = dict(options)
    if "seed" in registry.load_method(room, name).Options.model_fields:
        given.setdefault("seed", seed % 2**32)  # what trainers take
    return given


def plan_from(content: dict[str, Any], model: str) -> PruningPlan:
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

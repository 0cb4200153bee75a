"""One dense model in which every contestant chooses, recovers and is judged."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, cast

from torch import Tensor

from layercut import progress, registry
from layercut.comparison.config import ComparisonSettings
from layercut.comparison.entries import CHOICES, UNFOLDABLE, Contestant, parse_methods
from layercut.comparison.heal_rows import Healer
from layercut.comparison.measure import EMPTY, Judge, forward_seconds
from layercut.comparison.plans import CANNOT, Chooser, Chosen, seeded
from layercut.comparison.result import DENSE
from layercut.comparison.store import HEALING, Store, digest
from layercut.engine.residual_stream import ResidualStream, history_bytes
from layercut.models.view import DecoderView
from layercut.recovery.fit import fit
from layercut.recovery.runtime_maps import Unfoldable, fit_unfoldable, unfolded
from layercut.training.resume import remove_claimed
from layercut.types import CalibrationBatches, Evidence, PruningPlan, WeightPatch

Repair = WeightPatch | dict[int, Tensor]
"""What makes up for dropped layers: weights, or a matrix behind the layer before each cut."""

SHARED_BYTES = 4 * 1024**3
"""The dense activations of all layers are kept for all recoveries up to this; beyond it, each
recovery walks through the dense model anew."""


def started(contestant: Contestant, size: int) -> dict[str, Any]:
    """A row before anything is known but what it is about."""
    return {
        "method": contestant.name,
        "pair": contestant.pair,
        "source": contestant.source,
        "reading": contestant.reading,
        "layers": size,
        "dropped": [],
        **EMPTY,
    }


class Arena:
    """One dense model, its text and its judge, in which every contestant runs."""

    def __init__(
        self,
        view: DecoderView,
        batches: CalibrationBatches,
        store: Store,
        judge: Judge,
        settings: ComparisonSettings,
    ) -> None:
        self.view = view
        self.batches = batches
        self.store = store
        self.judge = judge
        self.settings = settings
        self.stream: ResidualStream | None = None
        self.healer = None
        if settings.heal is not None:
            self.healer = Healer(view, batches, settings, store.folder / HEALING)
        named = parse_methods(settings.heal_methods or settings.methods)
        self.healed_pairs = {contestant.pair for contestant in named}
        self.chooser = Chooser(view, batches, store, seed=settings.seed)

    def dense(self) -> dict[str, Any]:
        """The row of the intact model, and the unit that costs are told in."""
        key = digest(DENSE)
        row = self.store.rows.get(key)
        if row is not None and not self.judge.missing(row):
            return row
        progress.stage("measure the dense model")
        self.judge.see_dense()
        if row is None:
            row = {"method": DENSE, "layers": 0, "dropped": [], "reason": None, **EMPTY}
            row["model"] = self.view.name
            row["forward_seconds"] = forward_seconds(self.view, self.batches)
            row["n_parameters"] = self.judge.n_parameters(())
        return self.store.rows.add(key, row | self.judge.measure(row))

    def run(self, contestant: Contestant) -> None:
        """Choose for all sizes, then recover and judge each; finished rows are passed over."""
        keys = {size: self._key(contestant, size) for size in self.settings.drop_layers}
        rows = {size: self.store.rows.get(key) for size, key in keys.items()}
        todo = [size for size, row in rows.items() if row is None or self._lacks(row)]
        if not todo:
            return
        self.judge.see_dense()
        progress.stage(f"{contestant.name}: choose layers")
        try:
            protect = self._protected(contestant)
        except CANNOT as error:
            chosen: dict[int, Chosen | str] = dict.fromkeys(todo, str(error))
        else:
            chosen = self.chooser.choose(contestant.choice, todo, protect=protect)
        for size in todo:
            row = rows[size] or started(contestant, size)
            plan, repair = chosen[size], None
            if isinstance(plan, str):
                done: dict[str, Any] = {"reason": plan}
            else:
                done, repair = self._judged(contestant, plan, row)
            known = rows[size]
            if done["reason"] is not None and known is not None and known["reason"] is None:
                told = f"{contestant.name}, {size} layers, stays as it was: {done['reason']}"
                warnings.warn(told, stacklevel=2)
                continue
            row = self.store.rows.add(keys[size], row | done)
            if isinstance(plan, Chosen) and isinstance(repair, WeightPatch):
                self._heal(contestant, plan.plan, repair, row)

    def _heal(
        self, contestant: Contestant, plan: PruningPlan, patch: WeightPatch, row: dict[str, Any]
    ) -> None:
        """The same model healed, and the dense one with it, each a row of its own."""
        if self.healer is None or contestant.pair not in self.healed_pairs:
            return
        for old, cut in ((self.dense(), None), (row, (plan, patch))):
            key = digest(old["key"], self.healer.digest)
            if not self._finished(key):
                progress.stage(f"{old['method']}: heal and measure, {old['layers']} layers dropped")
                self.store.rows.add(key, self.healer.row(old, cut, self.judge))
                remove_claimed(self.healer.work_dir)

    def layer_losses(self) -> None:
        """The calibration loss without each layer: what every score tries to foretell."""
        progress.stage("measure the loss without each layer")
        choice = CHOICES["perplexity"]
        if not self.view.layout.unscorable:
            options = self.chooser.options(choice)
            try:
                self.chooser.scorings(self.view, self.batches, method=choice.scoring, **options)
            except CANNOT as error:
                warnings.warn(f"the loss without each layer is not known: {error}", stacklevel=2)

    def _judged(
        self, contestant: Contestant, chosen: Chosen, row: dict[str, Any]
    ) -> tuple[dict[str, Any], Repair | None]:
        plan = chosen.plan
        progress.stage(f"{contestant.name}: recover and measure {len(plan.dropped)} layers")
        chosen_part = {"dropped": list(plan.dropped), "cuts": [list(cut) for cut in plan.cuts]}
        try:
            evidence = self._evidence(contestant)
            begun = time.perf_counter() + self._saved()
            repair = self._fitted(contestant, plan, evidence)
            seconds = {**chosen.seconds, "recover": time.perf_counter() + self._saved() - begun}
            with self._worn(plan, repair):
                measured = self.judge.measure(row)
        except CANNOT as error:
            return {**chosen_part, "reason": str(error)}, None
        n_matrices = 0 if isinstance(repair, WeightPatch) else len(repair)
        extra = n_matrices * self.view.hidden_size**2
        if measured["flops_per_token"] is not None:
            measured["flops_per_token"] += 2 * extra
        done = {
            **chosen_part,
            "reason": None,
            "notes": dict(repair.notes) if isinstance(repair, WeightPatch) else {},
            "n_parameters": self.judge.n_parameters(plan.dropped) + extra,
            "seconds": row.get("seconds", seconds),
            **measured,
        }
        return done, repair

    def _evidence(self, contestant: Contestant) -> Evidence:
        wanted = contestant.recovery == "sign-merge"
        evidence = self.chooser.evidence(contestant.choice, gradients=wanted)
        fits = history_bytes(self.view, self.batches) <= SHARED_BYTES
        walks = contestant.recovery != "none" and not self.view.layout.unscorable
        if self.stream is None and walks and fits:
            self.stream = ResidualStream(self.view, self.batches, remember=True)
        return replace(evidence, dense=self.stream)

    def _saved(self) -> float:
        """Seconds that contestants did not spend because others had."""
        return 0.0 if self.stream is None else self.stream.saved_seconds

    def _fitted(self, contestant: Contestant, plan: PruningPlan, evidence: Evidence) -> Repair:
        name = contestant.recovery
        if name in UNFOLDABLE:
            kind = cast(Unfoldable, name)
            return fit_unfoldable(self.view, plan, self.batches, kind, evidence=evidence)
        options = seeded("recovery", name, {}, self.settings.seed)
        return fit(self.view, plan, evidence, self.batches, method=name, **options)

    @contextmanager
    def _worn(self, plan: PruningPlan, repair: Repair) -> Iterator[None]:
        """The contestant's model in the place of the dense one."""
        if isinstance(repair, WeightPatch):
            swapped: AbstractContextManager[None] = self.view.patched(repair.tensors)
        else:
            swapped = unfolded(self.view, plan, repair)
        with self.view.skipping(plan.dropped), swapped:
            yield

    def _protected(self, contestant: Contestant) -> tuple[int, ...]:
        """What the recovery cannot do without; refuses one that cannot work here at all."""
        name = contestant.recovery
        if name in UNFOLDABLE:
            return (0,)
        registry.check_model("recovery", name, self.view)
        options = seeded("recovery", name, {}, self.settings.seed)
        parsed = registry.parse_options("recovery", name, options)
        parsed.check(self.view, self.batches, max(self.settings.drop_layers))
        needs = getattr(registry.load_method("recovery", name), "NEEDS_PRECEDING", False)
        return (0,) if needs else ()

    def _lacks(self, row: Mapping[str, Any]) -> bool:
        """What could not run is tried again: that it cannot shows early, and versions change."""
        unhealed = (
            self.healer is not None
            and row["pair"] in self.healed_pairs
            and not row["pair"].endswith(UNFOLDABLE)
            and not self._finished(digest(row["key"], self.healer.digest))
        )
        return row["reason"] is not None or unhealed or self.judge.missing(row)

    def _finished(self, key: str) -> bool:
        """Whether there is a healed row that is more than the reason why there is none."""
        row = self.store.rows.get(key)
        return row is not None and row["reason"] is None

    def _key(self, contestant: Contestant, size: int) -> str:
        """Everything of a row that the folder's identity leaves open."""
        revision = []
        if contestant.recovery not in UNFOLDABLE:
            module = registry.load_method("recovery", contestant.recovery)
            revision = [number for number in [getattr(module, "REVISION", 1)] if number > 1]
        return digest(contestant.choice.to_json(), contestant.recovery, size, *revision)

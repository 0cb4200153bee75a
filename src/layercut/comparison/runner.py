"""One dense model in which every entry chooses layers, is repaired and measured."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from layercut import progress, registry
from layercut.comparison.config import ComparisonConfig
from layercut.comparison.entries import Entry, LayerChoice, parse_methods
from layercut.comparison.heal_rows import Healer
from layercut.comparison.measure import EMPTY, Judge, forward_seconds
from layercut.comparison.plans import NOT_APPLICABLE, CachedPlan, PlanCache
from layercut.comparison.result import DENSE
from layercut.comparison.store import HEALING, Store, digest
from layercut.engine.residual_stream import ResidualStream, history_bytes
from layercut.models.check_method import check_method
from layercut.models.view import DecoderView
from layercut.recovery.fit import fit_repair
from layercut.recovery.runtime_maps import applied_maps
from layercut.registry import MethodCall
from layercut.training.resume import remove_claimed
from layercut.types import CalibrationBatches, PruningPlan, RuntimeMaps, WeightPatch

SHARED_BYTES = 4 * 1024**3
"""The dense activations of all layers are kept for all recoveries up to this; beyond it, each
recovery walks through the dense model anew."""


def start_row(entry: Entry, size: int) -> dict[str, Any]:
    """A row before anything is known but what it is about."""
    return {
        "method": entry.name,
        "pair": entry.pair,
        "source": entry.source,
        "reading": entry.reading,
        "layers": size,
        "dropped": [],
        **EMPTY,
    }


class ComparisonRunner:
    """One dense model and its text, in which every entry runs."""

    def __init__(
        self,
        view: DecoderView,
        batches: CalibrationBatches,
        store: Store,
        judge: Judge,
        settings: ComparisonConfig,
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
        self.healed_pairs = {entry.pair for entry in named}
        self.plans = PlanCache(view, batches, store, seed=settings.seed)

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

    def run(self, entry: Entry) -> None:
        """Choose for all sizes, then recover and judge each; finished rows are passed over."""
        keys = {size: self._key(entry, size) for size in self.settings.drop_layers}
        rows = {size: self.store.rows.get(key) for size, key in keys.items()}
        todo = [size for size, row in rows.items() if row is None or self._is_incomplete(row)]
        if not todo:
            return
        self.judge.see_dense()
        progress.stage(f"{entry.name}: choose layers")
        recovery = registry.resolve("recovery", entry.recovery, seed=self.settings.seed)
        try:
            check_method(recovery, self.view, self.batches, max(self.settings.drop_layers))
        except NOT_APPLICABLE as error:
            plans: dict[int, CachedPlan | str] = dict.fromkeys(todo, str(error))
        else:
            plans = self.plans.choose(entry.choice, todo, recovery)
        for size in todo:
            row = rows[size] or start_row(entry, size)
            plan, repair = plans[size], None
            if isinstance(plan, str):
                done: dict[str, Any] = {"reason": plan}
            else:
                done, repair = self._recover_and_measure(entry, recovery, plan, row)
            known = rows[size]
            if done["reason"] is not None and known is not None and known["reason"] is None:
                warnings.warn(
                    f"{entry.name}, {size} layers, stays as it was: {done['reason']}", stacklevel=2
                )
                continue
            row = self.store.rows.add(keys[size], row | done)
            if isinstance(plan, CachedPlan) and isinstance(repair, WeightPatch):
                self._heal(entry, plan.plan, repair, row)

    def _heal(
        self, entry: Entry, plan: PruningPlan, patch: WeightPatch, row: dict[str, Any]
    ) -> None:
        """The same model healed, and the dense one with it, each a row of its own."""
        if self.healer is None or entry.pair not in self.healed_pairs:
            return
        for old, cut in ((self.dense(), None), (row, (plan, patch))):
            key = digest(old["key"], self.healer.digest)
            if not self._is_finished(key):
                progress.stage(f"{old['method']}: heal and measure, {old['layers']} layers dropped")
                self.store.rows.add(key, self.healer.row(old, cut, self.judge))
                remove_claimed(self.healer.work_dir)

    def layer_losses(self) -> None:
        """The calibration loss without each layer: what every score estimates."""
        progress.stage("measure the loss without each layer")
        choice = LayerChoice(scoring="perplexity")
        if not self.view.layout.unscorable:
            try:
                self.plans.scores(self.view, self.batches, self.plans.resolve(choice))
            except NOT_APPLICABLE as error:
                warnings.warn(f"the loss without each layer is not known: {error}", stacklevel=2)

    def _recover_and_measure(
        self, entry: Entry, recovery: MethodCall, cached: CachedPlan, row: dict[str, Any]
    ) -> tuple[dict[str, Any], WeightPatch | RuntimeMaps | None]:
        plan = cached.plan
        progress.stage(f"{entry.name}: recover and measure {len(plan.dropped)} layers")
        layers = {"dropped": list(plan.dropped), "cuts": [list(cut) for cut in plan.cuts]}
        try:
            wanted = recovery.method.needs_gradient_log
            evidence = self.plans.evidence(entry.choice, gradients=wanted)
            dense = self._shared_stream(recovery)
            start = time.perf_counter() + self._saved_seconds()
            repair = fit_repair(self.view, plan, evidence, self.batches, recovery, dense=dense)
            seconds = {
                **cached.seconds,
                "recover": time.perf_counter() + self._saved_seconds() - start,
            }
            with pruned_in_memory(self.view, plan, repair):
                measured = self.judge.measure(row)
        except NOT_APPLICABLE as error:
            return {**layers, "reason": str(error)}, None
        n_maps = len(repair.maps) if isinstance(repair, RuntimeMaps) else 0
        extra = n_maps * self.view.hidden_size**2
        if measured["flops_per_token"] is not None:
            measured["flops_per_token"] += 2 * extra
        done = {
            **layers,
            "reason": None,
            "notes": dict(repair.notes),
            "n_parameters": self.judge.n_parameters(plan.dropped) + extra,
            "seconds": row.get("seconds", seconds),
            **measured,
        }
        return done, repair

    def _shared_stream(self, recovery: MethodCall) -> ResidualStream | None:
        """The dense model's stream with its history, for recoveries that share it, if it fits."""
        fits = history_bytes(self.view, self.batches) <= SHARED_BYTES
        if self.stream is None and recovery.method.shares_dense_stream and fits:
            self.stream = ResidualStream(self.view, self.batches, remember=True)
        return self.stream

    def _saved_seconds(self) -> float:
        """Seconds that entries did not spend because others had."""
        return 0.0 if self.stream is None else self.stream.saved_seconds

    def _is_incomplete(self, row: Mapping[str, Any]) -> bool:
        """What could not run is tried again: that it cannot shows early, and versions change."""
        unhealed = (
            self.healer is not None
            and row["pair"] in self.healed_pairs
            and registry.describe("recovery", row["pair"].rpartition("+")[2]).stores
            and not self._is_finished(digest(row["key"], self.healer.digest))
        )
        return row["reason"] is not None or unhealed or self.judge.missing(row)

    def _is_finished(self, key: str) -> bool:
        """Whether there is a healed row that is more than the reason why there is none."""
        row = self.store.rows.get(key)
        return row is not None and row["reason"] is None

    def _key(self, entry: Entry, size: int) -> str:
        """Everything of a row that the folder's identity leaves open."""
        revision = registry.describe("recovery", entry.recovery).revision
        extra = [revision] if revision > 1 else []
        return digest(entry.choice.to_json(), entry.recovery, size, *extra)


@contextmanager
def pruned_in_memory(
    view: DecoderView, plan: PruningPlan, repair: WeightPatch | RuntimeMaps
) -> Iterator[None]:
    """Inside the block ``view`` is the pruned and repaired model; nothing is cut."""
    if isinstance(repair, RuntimeMaps):
        repaired = applied_maps(view, plan, repair)
    else:
        repaired = view.patched(repair.tensors)
    with view.skipping(plan.dropped), repaired:
        yield

"""One dense model in which every entry chooses layers, is repaired and measured."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace

from layercut import progress, registry
from layercut.checkpoints.claimed_folder import remove_claimed
from layercut.comparison.config import ComparisonConfig
from layercut.comparison.entries import Entry, LayerChoice, parse_methods
from layercut.comparison.heal_rows import RowHealer
from layercut.comparison.intact import IntactModel
from layercut.comparison.measure import RowEvaluator, forward_seconds
from layercut.comparison.plans import NOT_APPLICABLE, CachedPlan, PlanCache
from layercut.comparison.row import DENSE, Row
from layercut.comparison.store import HEALING, Store, digest
from layercut.engine.residual_stream import ResidualStream, history_bytes
from layercut.models.check_method import check_method
from layercut.models.view import DecoderView
from layercut.recovery.fit import fit_repair
from layercut.recovery.runtime_maps import applied_maps
from layercut.registry import MethodCall
from layercut.types import CalibrationBatches, PruningPlan, RuntimeMaps, WeightPatch

SHARED_BYTES = 4 * 1024**3
"""The dense activations of all layers are kept for all recoveries up to this; beyond it, each
recovery walks through the dense model anew."""


def start_row(entry: Entry, size: int, key: str) -> Row:
    """A row before anything is known but what it is about."""
    return Row(
        key=key,
        method=entry.name,
        pair=entry.pair,
        source=entry.source,
        reading=entry.reading,
        layers=size,
    )


AS_PUBLISHED = {"sign-merge": {"strength": 1.0}}
"""Options of recoveries whose defaults look at a tuning, which no comparison makes."""


class ComparisonRunner:
    """One dense model and its text, in which every entry runs."""

    def __init__(
        self,
        view: DecoderView,
        batches: CalibrationBatches,
        store: Store,
        evaluator: RowEvaluator,
        settings: ComparisonConfig,
    ) -> None:
        self.view = view
        self.batches = batches
        self.store = store
        self.evaluator = evaluator
        self.settings = settings
        self.intact = IntactModel(view)
        self.stream: ResidualStream | None = None
        self.healer = None
        if settings.heal is not None:
            self.healer = RowHealer(view, batches, settings, store.folder / HEALING)
        healed = parse_methods(settings.heal_methods or settings.methods)
        self.healed_pairs = {entry.pair for entry in healed}
        self.plans = PlanCache(view, batches, store, seed=settings.seed)

    def measure_dense(self) -> Row:
        """The row of the intact model, and the unit that costs are told in."""
        key = digest(DENSE)
        row = self.store.find_row(key)
        if row is not None and self.evaluator.is_complete(row):
            return row
        progress.stage("measure the dense model")
        self.evaluator.record_dense()
        if row is None:
            seconds = forward_seconds(self.view, self.batches)
            row = Row(
                key=key, method=DENSE, layers=0, model=self.view.name, forward_seconds=seconds
            )
        return self.store.add_row(self.evaluator.measure_speed(self.evaluator.measure(row)))

    def run_entry(self, entry: Entry) -> None:
        """Choose for all sizes, then recover and measure each; finished rows are passed over."""
        keys = {size: self._key(entry, size) for size in self.settings.drop_layers}
        known = {size: self.store.find_row(key) for size, key in keys.items()}
        todo = [size for size, row in known.items() if row is None or self._is_unfinished(row)]
        if not todo:
            return
        self.evaluator.record_dense()
        progress.stage(f"{entry.name}: choose layers")
        recovery = registry.resolve(
            "recovery",
            entry.recovery,
            AS_PUBLISHED.get(entry.recovery),
            seed=self.settings.seed,
        )
        try:
            check_method(recovery, self.view, self.batches, max(self.settings.drop_layers))
        except NOT_APPLICABLE as error:
            plans: dict[int, CachedPlan | str] = dict.fromkeys(todo, str(error))
        else:
            plans = self.plans.choose(entry.choice, todo, recovery)
            self._check_intact(entry.pair)
        for size in todo:
            old, plan = known[size], plans[size]
            row, repair = old or start_row(entry, size, keys[size]), None
            if isinstance(plan, str):
                row = replace(row, reason=plan)
            else:
                row, repair = self._recover_and_measure(entry, recovery, plan, row)
            if row.reason is not None and old is not None and old.reason is None:
                warnings.warn(
                    f"{entry.name}, {size} layers, stays as it was: {row.reason}", stacklevel=2
                )
                continue
            row = self.store.add_row(row)
            if isinstance(plan, CachedPlan) and isinstance(repair, WeightPatch):
                self._heal(entry, plan.plan, repair, row)

    def _heal(self, entry: Entry, plan: PruningPlan, patch: WeightPatch, row: Row) -> None:
        """The same model healed, and the dense one with it, each a row of its own."""
        if self.healer is None or entry.pair not in self.healed_pairs:
            return
        for old, cut in ((self.measure_dense(), None), (row, (plan, patch))):
            if not self._has_run(self.healer.key_of(old)):
                progress.stage(f"{old.method}: heal and measure, {old.layers} layers dropped")
                self.store.add_row(self.healer.heal_row(old, cut, self.evaluator))
                remove_claimed(self.healer.work_dir)

    def measure_layer_losses(self) -> None:
        """The calibration loss without each layer: what every score estimates."""
        progress.stage("measure the loss without each layer")
        choice = LayerChoice(scoring="perplexity")
        if not self.view.layout.unscorable:
            try:
                self.plans.scores(self.view, self.batches, self.plans.resolve(choice))
            except NOT_APPLICABLE as error:
                warnings.warn(f"the loss without each layer is not known: {error}", stacklevel=2)

    def _recover_and_measure(
        self, entry: Entry, recovery: MethodCall, cached: CachedPlan, row: Row
    ) -> tuple[Row, WeightPatch | RuntimeMaps | None]:
        plan = cached.plan
        progress.stage(f"{entry.name}: recover and measure {len(plan.dropped)} layers")
        row = replace(row, dropped=plan.dropped, cuts=plan.cuts)
        try:
            needs_gradients = recovery.method.needs_gradient_log
            evidence = self.plans.evidence(entry.choice, gradients=needs_gradients)
            dense = self._shared_stream(recovery)
            start = time.perf_counter() + self._saved_seconds()
            repair = fit_repair(self.view, plan, evidence, self.batches, recovery, dense=dense)
            recover_seconds = time.perf_counter() + self._saved_seconds() - start
            self._check_intact(entry.pair)
            with pruned_in_memory(self.view, plan, repair) as pruned:
                row = self.evaluator.measure(row, pruned)
            row = self.evaluator.measure_speed(
                row, lambda: pruned_in_memory(self.view, plan, repair)
            )
        except NOT_APPLICABLE as error:
            return replace(row, reason=str(error)), None
        n_maps = len(repair.maps) if isinstance(repair, RuntimeMaps) else 0
        n_extra = n_maps * self.view.hidden_size**2
        flops = row.evaluation.flops_per_token
        evaluation = replace(
            row.evaluation,
            n_parameters=self.evaluator.count_parameters(plan.dropped) + n_extra,
            flops_per_token=None if flops is None else flops + 2 * n_extra,
        )
        row = replace(
            row,
            reason=None,
            notes=dict(repair.notes),
            seconds=row.seconds or {**cached.seconds, "recover": recover_seconds},
            evaluation=evaluation,
        )
        return row, repair

    def check_rows(self) -> None:
        """Stop if a method changed the model where the check before each row did not see it."""
        if not self.intact.is_same_throughout():
            raise RuntimeError(
                "a method changed single numbers of the model's weights, which it must only read. "
                f"Rows that this call wrote may be wrong. Remove {self.store.folder}, correct the "
                "method's file, and run again."
            )

    def _check_intact(self, pair: str) -> None:
        """Stop before a row is written of a model that a method has changed."""
        if not self.intact.is_same():
            raise RuntimeError(
                f"{pair} changed the model's weights, which a score or recovery must only read. "
                "Rows that are written so far are right. Correct its method file."
            )

    def _shared_stream(self, recovery: MethodCall) -> ResidualStream | None:
        """The dense model's stream with its history, for recoveries that share it, if it fits."""
        fits = history_bytes(self.view, self.batches) <= SHARED_BYTES
        if self.stream is None and recovery.method.shares_dense_stream and fits:
            self.stream = ResidualStream(self.view, self.batches, remember=True)
        return self.stream

    def _saved_seconds(self) -> float:
        """Seconds that entries did not spend because others had."""
        return 0.0 if self.stream is None else self.stream.saved_seconds

    def _is_unfinished(self, row: Row) -> bool:
        """What could not run is tried again: that it cannot shows early, and versions change."""
        unhealed = (
            self.healer is not None
            and row.pair in self.healed_pairs
            and registry.describe("recovery", row.pair.rpartition("+")[2]).stores
            and not self._has_run(self.healer.key_of(row))
        )
        return row.reason is not None or unhealed or not self.evaluator.is_complete(row)

    def _has_run(self, key: str) -> bool:
        """Whether there is a healed row that is more than the reason why there is none."""
        row = self.store.find_row(key)
        return row is not None and row.reason is None

    def _key(self, entry: Entry, size: int) -> str:
        """Everything of a row that the folder's identity leaves open."""
        revision = registry.describe("recovery", entry.recovery).revision
        extra = [revision] if revision > 1 else []
        return digest(asdict(entry.choice), entry.recovery, size, *extra)


@contextmanager
def pruned_in_memory(
    view: DecoderView, plan: PruningPlan, repair: WeightPatch | RuntimeMaps
) -> Iterator[DecoderView]:
    """Inside the block ``view`` is the pruned and repaired model; nothing is cut."""
    if isinstance(repair, RuntimeMaps):
        repaired = applied_maps(view, plan, repair)
    else:
        repaired = view.patched(repair.tensors)
    with view.skipping(plan.dropped), repaired:
        yield view

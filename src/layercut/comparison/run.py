"""The whole comparison: choose, recover and judge every contestant at every size."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from layercut import methods, progress
from layercut.comparison.choosing import CANNOT, Chooser, Chosen, seeded
from layercut.comparison.contestants import CHOICES, UNFOLDABLE, Contestant, parse_methods
from layercut.comparison.judging import Judge, forward_seconds
from layercut.comparison.page import write_files
from layercut.comparison.result import Comparison, gathered
from layercut.comparison.settings import ComparisonSettings
from layercut.comparison.store import Store, check_folder, digest, opened
from layercut.data.calibration import calibration_batches
from layercut.errors import RecipeError
from layercut.evaluation.perplexity import check_vocabulary
from layercut.evaluation.unfoldable import Unfoldable, fit_unfoldable, unfolded
from layercut.models.load import load
from layercut.models.view import DecoderView
from layercut.recovery import fit
from layercut.report.machine import provenance
from layercut.resume import model_hash
from layercut.selection import check_request
from layercut.types import CalibrationBatches, Evidence, PruningPlan
from layercut.validation import validated

DENSE = "dense"
EMPTY: dict[str, Any] = {"perplexity": {}, "accuracy": {}}


def compare(
    settings: ComparisonSettings | Mapping[str, Any],
    output_dir: str | Path,
    *,
    batches: CalibrationBatches | None = None,
    overwrite: bool = False,
    command: str = "layercut.compare(…)",
) -> Comparison:
    """Prune one model by many methods and measure each, in memory; no checkpoint is written.

    The model is loaded once and stays dense; scorings and plans are shared and recorded. A method
    that cannot run on the model is a row that says why.

    Args:
        settings: what is compared, or a mapping with its keys.
        output_dir: the comparison's folder; the same call goes on in it after an interruption,
            and a later one can add methods, sizes, texts and tasks.
        batches: calibration text instead of what ``settings.calibration`` draws.
        overwrite: discard the folder's earlier comparison.
        command: what the report says produced it.

    Returns:
        All rows of the folder, as in ``compare.json``.

    Raises:
        OutputError: the folder holds something else, or a comparison with other settings.
        LayercutError: see errors.py; finished rows stay.
    """
    if not isinstance(settings, ComparisonSettings):
        settings = validated(ComparisonSettings, dict(settings), "comparison")
    output_dir = Path(output_dir)
    contestants = parse_methods(settings.methods)
    check_folder(output_dir, overwrite=overwrite)
    progress.stage("load")
    view = load(
        settings.model, revision=settings.revision, dtype=settings.dtype, device=settings.device
    )
    check_lengths(view, settings)
    for size in settings.drop_layers:
        check_request(view.n_layers, drop_layers=size)
    judge = Judge(view, settings.evaluation, speed=settings.speed)
    if batches is None:
        batches = calibration_batches(settings.calibration, view.tokenizer, seed=settings.seed)
    check_vocabulary(view, batches.input_ids)
    with opened(output_dir, overwrite=overwrite) as store:
        store.claim(identity(view, batches, judge, settings))
        before = model_hash(view)
        arena = Arena(view, batches, store, judge, settings)
        dense = arena.dense()
        for contestant in contestants:
            arena.run(contestant)
        if settings.layer_losses:
            arena.layer_losses()
        assert model_hash(view) == before, "the model is no longer dense"
        shown = settings.model_dump(mode="json", exclude={"layer_losses"})
        result = gathered(store, shown, provenance(command), dense)
        write_files(result, output_dir)
    return result


def check_lengths(view: DecoderView, settings: ComparisonSettings) -> None:
    """Refuse windows that are longer than the model's context.

    Raises:
        RecipeError: names the key.
    """
    for key in ("calibration", "evaluation"):
        if (length := getattr(settings, key).seq_len) > view.context:
            raise RecipeError(
                f"{key}.seq_len is {length}, but the model's context is {view.context} tokens. "
                "Lower it."
            )


def identity(
    view: DecoderView, batches: CalibrationBatches, judge: Judge, settings: ComparisonSettings
) -> dict[str, Any]:
    """What every record of a folder depends on, texts and tasks by their content."""
    return {
        "schema": 1,
        "model": view.name,
        "weights": view.fingerprint,
        "dtype": str(view.model.dtype),
        "device": view.device.type,
        "seed": settings.seed,
        "calibration": {
            "text": batches.fingerprint,
            "gradient_batch": batches.gradient_batch,
            "shape": list(batches.input_ids.shape),
        },
        "evaluation": {
            "seq_len": settings.evaluation.seq_len,
            "max_tokens": settings.evaluation.max_tokens,
            **judge.contents,
        },
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
            row = rows[size] or {
                "method": contestant.name,
                "pair": contestant.pair,
                "source": contestant.source,
                "reading": contestant.reading,
                "layers": size,
                "dropped": [],
                **EMPTY,
            }
            plan = chosen[size]
            done = (
                {"reason": plan} if isinstance(plan, str) else self._judged(contestant, plan, row)
            )
            self.store.rows.add(keys[size], row | done)

    def layer_losses(self) -> None:
        """The calibration loss without each layer: what every score tries to foretell."""
        progress.stage("measure the loss without each layer")
        choice = CHOICES["perplexity"]
        if not self.view.layout.rules.unscorable:
            options = self.chooser.options(choice)
            self.chooser.scorings(self.view, self.batches, method=choice.scoring, **options)

    def _judged(
        self, contestant: Contestant, chosen: Chosen, row: dict[str, Any]
    ) -> dict[str, Any]:
        plan = chosen.plan
        progress.stage(f"{contestant.name}: recover and measure {len(plan.dropped)} layers")
        chosen_part = {"dropped": list(plan.dropped), "cuts": [list(cut) for cut in plan.cuts]}
        try:
            evidence = self.chooser.evidence(
                contestant.choice, gradients=contestant.recovery == "sign-merge"
            )
            start = time.perf_counter()
            with self._recovered(contestant, plan, evidence) as notes:
                seconds = {**chosen.seconds, "recover": time.perf_counter() - start}
                measured = self.judge.measure(row)
        except CANNOT as error:
            return {**chosen_part, "reason": str(error)}
        extra = notes.get("extra_matrices", 0) * self.view.hidden_size**2
        if measured["flops_per_token"] is not None:
            measured["flops_per_token"] += 2 * extra
        return {
            **chosen_part,
            "reason": None,
            "notes": dict(notes),
            "n_parameters": self.judge.n_parameters(plan.dropped) + extra,
            "seconds": row.get("seconds", seconds),
            **measured,
        }

    @contextmanager
    def _recovered(
        self, contestant: Contestant, plan: PruningPlan, evidence: Evidence
    ) -> Iterator[dict[str, Any]]:
        """The contestant's model in the place of the dense one; yields the recovery's notes."""
        view, name = self.view, contestant.recovery
        if name in UNFOLDABLE:
            operations = fit_unfoldable(view, plan, self.batches, cast(Unfoldable, name))
            with view.skipping(plan.dropped), unfolded(view, plan, operations):
                yield {"extra_matrices": len(operations)}
            return
        options = seeded("recovery", name, {}, self.settings.seed)
        patch = fit(view, plan, evidence, self.batches, method=name, **options)
        with view.skipping(plan.dropped), view.patched(patch.tensors):
            yield dict(patch.notes)

    def _protected(self, contestant: Contestant) -> tuple[int, ...]:
        """What the recovery cannot do without; refuses one that cannot work here at all."""
        name = contestant.recovery
        if name in UNFOLDABLE:
            return (0,)
        methods.check_model("recovery", name, self.view)
        options = seeded("recovery", name, {}, self.settings.seed)
        parsed = methods.parse_options("recovery", name, options)
        parsed.check(self.view, self.batches, max(self.settings.drop_layers))
        needs = getattr(methods.load_method("recovery", name), "NEEDS_PRECEDING", False)
        return (0,) if needs else ()

    def _lacks(self, row: Mapping[str, Any]) -> bool:
        """What could not run is tried again: that it cannot shows early, and versions change."""
        return row["reason"] is not None or self.judge.missing(row)

    def _key(self, contestant: Contestant, size: int) -> str:
        """Everything of a row that the folder's identity leaves open."""
        return digest(contestant.choice.to_json(), contestant.recovery, size)

"""The whole flow, from a recipe to a pruned checkpoint: read this file first."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from layercut import registry
from layercut.checkpoints.output_dir import staged_folder
from layercut.checkpoints.plan_file import lineage_of
from layercut.checkpoints.writer import write_checkpoint
from layercut.data.calibration import calibration_batches
from layercut.data.sources import read_texts
from layercut.engine.loss import check_vocabulary
from layercut.errors import PlanError, RecipeError
from layercut.evaluation.evaluate import check_tasks, compared, evaluate
from layercut.evaluation.harness import check_harness
from layercut.machine import peak_rss_bytes, provenance
from layercut.models.droppable import check_dropped, fixed_layers
from layercut.models.surgery import apply
from layercut.models.view import DecoderView
from layercut.output.verify import verify_checkpoint
from layercut.pipeline.finetune_run import TuningStage, training_data
from layercut.pipeline.heal_stage import HealStage
from layercut.pipeline.prepare import open_model
from layercut.pipeline.size_search import Pruned, prune_within, split
from layercut.recipe.recipe import Recipe, RecoverySection, ScoringSection, load_recipe
from layercut.recovery.fit import fit
from layercut.report.write import write_model_card, write_report
from layercut.results import RunResult
from layercut.selection.pattern import pattern_to_keep
from layercut.selection.select import Request, check_request, check_scoring, most_droppable, select
from layercut.types import CalibrationBatches


def run(
    recipe: Recipe | str | Path | Mapping[str, Any],
    output_dir: str | Path,
    *,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
    command: str = "layercut.run(…)",
) -> RunResult:
    """Prune a model as ``recipe`` says and write it to ``output_dir``.

    Args:
        recipe: a recipe, the path of one, or its content.
        output_dir: the new checkpoint's folder; it appears complete and verified, or not at all.
        overrides: ``a.b=c`` changes to the recipe.
        overwrite: replace an earlier output.
        command: what the report says produced it.

    Returns:
        Every figure that was measured, as in ``result.json``.

    Raises:
        LayercutError: see errors.py; nothing is left behind but the checkpoints of a training
            that began (``OUTPUT_DIR.training``), from which the same call goes on.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    options = _check_options(recipe)
    output_dir = Path(output_dir)
    measured = recipe.evaluation.model_dump()
    result = RunResult(recipe.model, recipe.model_dump(mode="json"), provenance(command))
    start = time.perf_counter()
    with result.collecting_warnings():
        with result.timed("load"):
            view, batches, request = _prepare(recipe, output_dir, overwrite=overwrite)
            settings, rows = training_data(view, recipe)
            healing = HealStage(recipe, view, batches, result, measured, output_dir)
        tuning = TuningStage(settings, rows, result, measured, output_dir)
        with result.timed("evaluate", "evaluate the dense model"):
            result.stages["dense"] = evaluate(view, **measured)
        view = tuning.dense(view)
        plan, evidence, patch = _prune(result, recipe, view, batches, request, options)
        result.plan, result.lineage = plan, lineage_of(view.path)
        result.recovery = {"method": patch.method, **patch.notes}
        apply(view, plan, patch)
        with result.timed("evaluate", "evaluate the pruned model"):
            pruned = evaluate(view, **measured)
            result.stages["pruned"] = compared(pruned, result.stages["dense"])
        patch = healing.pruned(view, plan, patch)
        patch = tuning.pruned(view, plan, patch)
        result.recovery = {**result.recovery, "tensors_changed": len(patch.tensors)}
        with staged_folder(output_dir, overwrite=overwrite) as folder:
            with result.timed("save", "write and verify the checkpoint"):
                write_checkpoint(view.path, view.layout, plan, patch, folder)
                verify_checkpoint(folder, view, plan, patch)
            result.seconds["total"] = time.perf_counter() - start
            result.peak_rss_bytes = max(result.peak_rss_bytes, peak_rss_bytes())
            report = folder / "layercut"
            write_report(result, report, scores=evidence.scores, recipe_yaml=recipe.to_yaml())
            write_model_card(result, folder / "README.md", source=view.path)
            tuning.move_kept(report)
        healing.remove_checkpoints()
        tuning.remove_checkpoints()
    return result


def _prune(
    result: RunResult,
    recipe: Recipe,
    view: DecoderView,
    batches: CalibrationBatches,
    request: dict[str, Any],
    options: dict[str, dict[str, Any]],
) -> Pruned:
    """Plan, evidence and patch, of the size asked for or as large as the budget allows."""
    scoring, recovery = recipe.scoring.method, recipe.recovery.method
    budget = recipe.selection.max_perplexity_ratio
    if budget is not None:
        with result.timed("score", f"drop layers until perplexity is × {budget:g}"):
            plan, evidence, patch = prune_within(
                view,
                batches,
                max_perplexity_ratio=budget,
                strategy=request["strategy"],
                request=Request(
                    protect=frozenset(request["protect"]),
                    scoring=scoring,
                    scoring_options=options["scoring"],
                    rounds=request["rounds"],
                ),
                recovery=recovery,
                recovery_options=options["recovery"],
            )
    else:
        with result.timed("score", f"score the layers by {scoring}"):
            plan, evidence = select(view, batches, **request, scoring_options=options["scoring"])
        with result.timed("recover", f"recover by {recovery}"):
            patch = fit(view, plan, evidence, batches, method=recovery, **options["recovery"])
    # The record has served, and would count towards the memory of the tuning to come.
    return plan, replace(evidence, gradient_log=None), patch


def _prepare(
    recipe: Recipe, output_dir: Path, *, overwrite: bool
) -> tuple[DecoderView, CalibrationBatches, dict[str, Any]]:
    """Load the model and its data, and refuse what cannot work, before any compute."""
    view = open_model(recipe, output_dir, overwrite=overwrite)
    section = recipe.selection
    registry.check_model("recovery", recipe.recovery.method, view)
    if section.drop is None:
        registry.check_model("scoring", recipe.scoring.method, view)
    amount = section.model_dump(include={"drop_layers", "drop_fraction", "drop", "protect"})
    if getattr(registry.load_method("recovery", recipe.recovery.method), "NEEDS_PRECEDING", False):
        if 0 in (amount["drop"] or ()):
            raise PlanError(
                f"recovery {recipe.recovery.method} needs a kept layer before every cut, but "
                "selection.drop names layer 0. Keep it, or set recovery.method: none."
            )
        amount["protect"] = sorted({0, *amount["protect"]})
    if section.drop is None:
        amount["protect"] = sorted({*fixed_layers(view), *amount["protect"]})
    if section.max_perplexity_ratio is None:
        n_drop = check_request(view.n_layers, **amount)
    else:
        check_request(view.n_layers, drop_layers=1, protect=amount["protect"])
        n_drop = most_droppable(view.n_layers, len(amount["protect"]))
    if section.drop is not None:
        check_dropped(view, section.drop)
    if section.preserve_pattern:
        pattern_to_keep(
            view,
            n_drop if section.max_perplexity_ratio is None else None,
            drop=amount["drop"],
            protect=amount["protect"],
            rounds=section.rounds,
        )
    for source in recipe.evaluation.text.values():
        next(iter(read_texts(source)))
    check_tasks(view, recipe.evaluation.tasks)
    check_harness(recipe.evaluation.harness)
    context = view.context
    for key in ("calibration", "evaluation"):
        if (length := getattr(recipe, key).seq_len) > context:
            raise RecipeError(
                f"{key}.seq_len is {length}, but the model's context is {context} tokens. Lower it."
            )
    batches = calibration_batches(recipe.calibration, view.tokenizer, seed=recipe.seed)
    check_vocabulary(view, batches.input_ids)
    if section.max_perplexity_ratio is not None:
        split(batches)
    for method_options in _parsed_options(recipe).values():
        method_options.check(view, batches, n_drop)
    request = {"strategy": section.strategy, "rounds": section.rounds, **amount}
    request["preserve_pattern"] = section.preserve_pattern
    return view, batches, request | {"scoring": recipe.scoring.method}


def _check_options(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Both methods' options, completed; refuses bad ones before anything is loaded."""
    check_scoring(recipe.selection.strategy, recipe.scoring.method)
    return {room: options.model_dump() for room, options in _parsed_options(recipe).items()}


def _parsed_options(recipe: Recipe) -> dict[registry.Room, registry.MethodOptions]:
    sections: dict[registry.Room, ScoringSection | RecoverySection] = {
        "scoring": recipe.scoring,
        "recovery": recipe.recovery,
    }
    parsed: dict[registry.Room, registry.MethodOptions] = {}
    for room, section in sections.items():
        given = dict(section.options)
        module = registry.load_method(room, section.method)
        if "seed" in module.Options.model_fields:
            given.setdefault("seed", recipe.seed % 2**32)  # what trainers take
        parsed[room] = registry.parse_options(room, section.method, given)
    return parsed

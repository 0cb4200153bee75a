"""The whole flow, from a recipe to a pruned checkpoint: read this file first."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from layercut import methods, progress
from layercut.budget import Pruned, prune_within, split
from layercut.data.calibration import calibration_batches
from layercut.data.sources import read_texts
from layercut.errors import PlanError, RecipeError
from layercut.evaluation import evaluate
from layercut.evaluation.perplexity import check_vocabulary
from layercut.models.checkpoint import (
    check_disk_space,
    check_output_dir,
    staged_folder,
    verify_checkpoint,
    write_checkpoint,
)
from layercut.models.load import load
from layercut.models.view import DecoderView
from layercut.recipe import Recipe, RecoverySection, ScoringSection, load_recipe
from layercut.recovery import fit
from layercut.report.machine import peak_rss_bytes, provenance
from layercut.report.write import write_model_card, write_report
from layercut.selection import Request, check_request, check_scoring, select
from layercut.surgery import apply
from layercut.types import CalibrationBatches, RunResult


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
        LayercutError: see errors.py; nothing is left behind.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    options = _check_options(recipe)
    output_dir = Path(output_dir)
    measured = recipe.evaluation.model_dump(include={"text", "seq_len", "max_tokens", "detokenize"})
    result = RunResult(recipe.model, recipe.model_dump(mode="json"), provenance(command))
    start = time.perf_counter()
    with _collecting_warnings(result):
        with _timed(result, "load"):
            view, batches, request = _prepare(recipe, output_dir, overwrite=overwrite)
        with _timed(result, "evaluate", "evaluate the dense model"):
            result.stages["dense"] = evaluate(view, **measured)
        plan, evidence, patch = _prune(result, recipe, view, batches, request, options)
        result.plan = plan
        result.recovery = {"method": patch.method, **patch.notes}
        apply(view, plan, patch)
        with _timed(result, "evaluate", "evaluate the pruned model"):
            result.stages["pruned"] = evaluate(view, **measured)
        with staged_folder(output_dir, overwrite=overwrite) as folder:
            with _timed(result, "save", "write and verify the checkpoint"):
                write_checkpoint(view.path, view.rules, plan, patch, folder)
                verify_checkpoint(folder, view)
            result.seconds["total"] = time.perf_counter() - start
            result.peak_rss_bytes = peak_rss_bytes()
            report = folder / "layercut"
            write_report(result, report, scores=evidence.scores, recipe_yaml=recipe.to_yaml())
            write_model_card(result, folder / "README.md", source=view.path)
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
        with _timed(result, "score", f"drop layers until perplexity is × {budget:g}"):
            return prune_within(
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
    with _timed(result, "score", f"score the layers by {scoring}"):
        plan, evidence = select(view, batches, **request, scoring_options=options["scoring"])
    with _timed(result, "recover", f"recover by {recovery}"):
        patch = fit(view, plan, evidence, batches, method=recovery, **options["recovery"])
    return plan, evidence, patch


def _prepare(
    recipe: Recipe, output_dir: Path, *, overwrite: bool
) -> tuple[DecoderView, CalibrationBatches, dict[str, Any]]:
    """Load the model and its calibration text, and refuse what cannot work, before any compute."""
    check_output_dir(output_dir, Path(recipe.model), overwrite=overwrite)
    view = load(recipe.model, revision=recipe.revision, dtype=recipe.dtype, device=recipe.device)
    check_output_dir(output_dir, view.path, overwrite=overwrite)
    check_disk_space(view.path, output_dir)
    section = recipe.selection
    amount = section.model_dump(include={"drop_layers", "drop_fraction", "drop", "protect"})
    if getattr(methods.load_method("recovery", recipe.recovery.method), "NEEDS_PRECEDING", False):
        if 0 in (amount["drop"] or ()):
            raise PlanError(
                f"recovery {recipe.recovery.method} needs a kept layer before every cut, but "
                "selection.drop names layer 0. Keep it, or set recovery.method: none."
            )
        amount["protect"] = sorted({0, *amount["protect"]})
    if section.max_perplexity_ratio is None:
        check_request(view.n_layers, **amount)
    else:
        check_request(view.n_layers, drop_layers=1, protect=amount["protect"])
    for source in recipe.evaluation.text.values():
        next(iter(read_texts(source)))
    context = int(view.model.config.max_position_embeddings)
    for key in ("calibration", "evaluation"):
        if (length := getattr(recipe, key).seq_len) > context:
            raise RecipeError(
                f"{key}.seq_len is {length}, but the model's context is {context} tokens. Lower it."
            )
    batches = calibration_batches(recipe.calibration, view.tokenizer, seed=recipe.seed)
    check_vocabulary(view, batches.input_ids)
    if section.max_perplexity_ratio is not None:
        split(batches)
    request = {"strategy": section.strategy, "rounds": section.rounds, **amount}
    return view, batches, request | {"scoring": recipe.scoring.method}


def _check_options(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """Both methods' options, completed; refuses bad ones before anything is loaded."""
    sections: dict[methods.Room, ScoringSection | RecoverySection] = {
        "scoring": recipe.scoring,
        "recovery": recipe.recovery,
    }
    check_scoring(recipe.selection.strategy, recipe.scoring.method)
    checked: dict[str, dict[str, Any]] = {}
    for room, section in sections.items():
        given = dict(section.options)
        module = methods.load_method(room, section.method)
        if "seed" in module.Options.model_fields:
            given.setdefault("seed", recipe.seed)
        parsed = methods.parse_options(room, section.method, given)
        checked[room] = parsed.model_dump()
    return checked


@contextmanager
def _timed(result: RunResult, key: str, stage: str | None = None) -> Iterator[None]:
    """Add the block's wall-clock seconds to ``result.seconds[key]``."""
    progress.stage(stage or key)
    start = time.perf_counter()
    yield
    result.seconds[key] = result.seconds.get(key, 0.0) + time.perf_counter() - start


@contextmanager
def _collecting_warnings(result: RunResult) -> Iterator[None]:
    """Turn what the stages warn about into sentences of the result."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    result.warnings += dict.fromkeys(
        str(w.message) for w in caught if issubclass(w.category, UserWarning)
    )

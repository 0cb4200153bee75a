"""The whole comparison: choose, recover and measure every entry at every size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from layercut import progress
from layercut.comparison.config import ComparisonConfig
from layercut.comparison.entries import parse_methods
from layercut.comparison.measure import RowEvaluator
from layercut.comparison.report import write_files
from layercut.comparison.result import Comparison, gather_results
from layercut.comparison.runner import ComparisonRunner
from layercut.comparison.store import check_folder, open_store
from layercut.data.calibration import calibration_batches
from layercut.engine.loss import check_vocabulary
from layercut.evaluation.harness import harness_rows
from layercut.machine import provenance
from layercut.models.check_method import check_lengths
from layercut.models.load import load
from layercut.models.special_tokens import text_frame
from layercut.recipe.validation import validate
from layercut.results import Provenance, warnings_into
from layercut.selection.bounds import check_request
from layercut.types import CalibrationBatches


def compare(
    settings: ComparisonConfig | Mapping[str, Any],
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
    if not isinstance(settings, ComparisonConfig):
        settings = validate(ComparisonConfig, dict(settings), "comparison")
    output_dir = Path(output_dir)
    sentences: list[str] = []
    with warnings_into(sentences):
        result = _run_entries(settings, output_dir, batches, overwrite, provenance(command))
    result = replace(result, warnings=tuple(sentences))
    write_files(result, output_dir)
    return result


def _run_entries(
    settings: ComparisonConfig,
    folder: Path,
    batches: CalibrationBatches | None,
    overwrite: bool,
    origin: Provenance,
) -> Comparison:
    """Everything but the files that are made from the rows."""
    entries = parse_methods(settings.methods)
    check_folder(folder, overwrite=overwrite)
    harness = harness_rows(settings.evaluation.harness, settings.evaluation.harness_limit)
    progress.stage("load")
    view = load(
        settings.model,
        revision=settings.revision,
        dtype=settings.dtype,
        device=settings.device,
        residency="resident",  # rows are measured on text and tasks in any order
    )
    lengths = {} if batches is not None else {"calibration": settings.calibration.seq_len}
    check_lengths(view, **lengths, evaluation=settings.evaluation.seq_len)
    for size in settings.drop_layers:
        check_request(view.n_layers, drop_layers=size)
    evaluator = RowEvaluator(view, settings.evaluation, harness, speed=settings.speed)
    if batches is None:
        batches = calibration_batches(settings.calibration, view.tokenizer, seed=settings.seed)
    check_vocabulary(view, batches.input_ids)
    with open_store(folder, overwrite=overwrite) as store:
        store.claim(describe_identity(evaluator, batches, settings))
        runner = ComparisonRunner(view, batches, store, evaluator, settings)
        dense = runner.measure_dense()
        for entry in entries:
            runner.run_entry(entry)
        if settings.layer_losses:
            runner.measure_layer_losses()
        runner.check_rows()
        content = settings.model_dump(mode="json", exclude={"layer_losses"})
        content["calibration"] = {
            "data": batches.source,
            "n_sequences": batches.n_sequences,
            "seq_len": batches.seq_len,
            "gradient_batch": batches.gradient_batch,
            **text_frame(view.tokenizer).to_json(),
        }
        return gather_results(store, content, origin, dense)


def describe_identity(
    evaluator: RowEvaluator, batches: CalibrationBatches, settings: ComparisonConfig
) -> dict[str, Any]:
    """What every record of a folder depends on, texts and tasks by their content."""
    view = evaluator.view
    return {
        "schema": 1,
        "model": view.name,
        "weights": view.fingerprint,
        "dtype": str(view.model.dtype),
        "mixed_precision": view.mixed_precision,
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
            **evaluator.contents,
        },
    }

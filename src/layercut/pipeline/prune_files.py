"""Apply a plan to a checkpoint by copying files: nothing is loaded, so it may be quantised.

A plan that was scored on the original drops the same layers of its GPTQ, AWQ, FP8 or bitsandbytes
sibling, and a checkpoint larger than memory is no different from a small one.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layercut.checkpoints.config_check import prune_config
from layercut.checkpoints.folder import read_json_object
from layercut.checkpoints.layout import Layout
from layercut.checkpoints.output_dir import check_disk_space, check_output_dir, staged_folder
from layercut.checkpoints.own_code import warn_of_own_code
from layercut.checkpoints.plan_file import read_lineage, read_plan
from layercut.checkpoints.preflight import check_folder
from layercut.checkpoints.quantization import is_quantised
from layercut.checkpoints.resolve import find_folder
from layercut.checkpoints.writer import check_named_layers, write_checkpoint
from layercut.errors import ModelError, PlanError
from layercut.machine import peak_rss_bytes, provenance
from layercut.output.verify import verify_files, verify_streamed
from layercut.recipe import strict_yaml
from layercut.report.write import write_model_card, write_report
from layercut.results import RunResult
from layercut.selection.bounds import check_request
from layercut.types import PruningPlan, WeightPatch

NOTHING = WeightPatch({}, "none")


def prune(
    model: str,
    output_dir: str | Path,
    *,
    plan: str | Path | None = None,
    drop: Sequence[int] | None = None,
    revision: str | None = None,
    overwrite: bool = False,
    command: str = "layercut.pipeline.prune_files.prune(…)",
) -> RunResult:
    """Drop layers of a checkpoint, one tensor at a time and without loading the model.

    Args:
        model: ``embedded:smollm2-135m``, a local checkpoint folder, or a Hub name.
        output_dir: the new checkpoint's folder; it appears complete and verified, or not at all.
        plan: a ``plan.json``, perhaps of another checkpoint of the same model; or
        drop: the layers that go.
        revision: branch, tag or commit of a Hub model.
        overwrite: replace an earlier output.
        command: what the report says produced it.

    Returns:
        The plan and what was checked, as in ``result.json``.

    Raises:
        LayercutError: see errors.py; nothing is left behind.
    """
    output_dir = Path(output_dir)
    if (plan is None) == (drop is None):
        raise PlanError("give either a plan or the layers to drop, and not both.")
    file_plan = None if plan is None else read_plan(Path(plan))
    start = time.perf_counter()
    result = RunResult(model, {}, provenance(command))
    with result.collecting_warnings():
        with result.timed("load", "check the checkpoint"):
            check_output_dir(output_dir, Path(model), overwrite=overwrite)
            source = find_folder(model, revision)
            check_output_dir(output_dir, source, overwrite=overwrite)
            layout, stored = check_folder(source, as_files=True)
            warn_of_own_code(source)
            chosen = fit_plan(model, layout.n_layers, file_plan, drop or ())
            prune_config(source, layout, chosen.kept)
            check_named_layers(source, layout, chosen)
            check_disk_space(source, output_dir)
        result.plan, result.lineage = chosen, read_lineage(source)
        result.recovery = {"method": NOTHING.method, "tensors_changed": 0}
        result.recipe = _recipe(model, revision, chosen)
        quantised = is_quantised(read_json_object(source / "config.json"), stored)
        with staged_folder(output_dir, overwrite=overwrite) as folder:
            with result.timed("save", "write the checkpoint"):
                write_checkpoint(source, layout, chosen, NOTHING, folder)
            with result.timed("verify", "compare it with the source"):
                result.checks = _verify(source, folder, layout, chosen, quantised=quantised)
            result.seconds["total"] = time.perf_counter() - start
            result.peak_rss_bytes = peak_rss_bytes()
            recipe_yaml = strict_yaml.dump(dict(result.recipe))
            write_report(result, folder / "layercut", recipe_yaml=recipe_yaml)
            write_model_card(result, folder / "README.md", source=source)
    return result


def _recipe(model: str, revision: str | None, plan: PruningPlan) -> dict[str, Any]:
    """The recipe by which `layercut run` would make the same checkpoint."""
    return {
        "model": model,
        "revision": revision,
        "selection": {"drop": list(plan.dropped)},
        "recovery": {"method": NOTHING.method},
    }


def fit_plan(
    model: str, n_layers: int, file_plan: PruningPlan | None, drop: Sequence[int]
) -> PruningPlan:
    """The plan for this checkpoint, if it fits.

    Raises:
        PlanError: it is of another model, or the layers cannot be dropped.
    """
    if file_plan is not None and file_plan.n_layers != n_layers:
        raise PlanError(
            f"the plan is for {file_plan.n_layers} layers, but {model} has {n_layers}. "
            "Use a plan of the same model."
        )
    layers = file_plan.dropped if file_plan else tuple(drop)
    check_request(n_layers, drop=layers)
    return PruningPlan(
        model=model,
        n_layers=n_layers,
        dropped=tuple(sorted(layers)),
        method=file_plan.method if file_plan else "given",
        fingerprint=file_plan.fingerprint if file_plan else "",
    )


def _verify(
    source: Path, folder: Path, layout: Layout, plan: PruningPlan, *, quantised: bool
) -> list[str]:
    """Compare as much as can be; returns what was, in full sentences."""
    n_tensors = verify_files(source, folder, layout, plan, NOTHING)
    check_folder(folder, as_files=True)
    checks = [f"{n_tensors:,} tensors have the names, shapes and sha256 that they should."]
    if quantised:
        return [
            *checks,
            "Logits were not compared: the weights are quantised.",
            "Whether it decodes with a cache and generates was not tried, for the same reason.",
        ]
    try:
        decodes = verify_streamed(source, folder, layout, plan)
    except ModelError as error:
        return [*checks, f"Logits were not compared, and no text was generated: {error}"]
    return [
        *checks,
        "Cached logits equal uncached ones, and tokens are generated."
        if decodes
        else "It does not decode with a cache as without, and neither does the source.",
        "Logits are those of the source with the dropped layers left out.",
    ]

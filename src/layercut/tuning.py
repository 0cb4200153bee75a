"""Fine-tuning as a stage of a run, dense and pruned alike, and of a checkpoint on its own."""

from __future__ import annotations

import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercut import strict_yaml
from layercut.data.tasks import TaskRow, read_rows
from layercut.errors import RecipeError
from layercut.evaluation import check_tasks, compared, evaluate
from layercut.finetune_settings import FinetuneSettings
from layercut.models.checkpoint import (
    staged_folder,
    tuned_patch,
    verify_checkpoint,
    write_checkpoint,
)
from layercut.models.load import reload
from layercut.models.open import open_model
from layercut.recipe import Recipe, load_recipe
from layercut.report.machine import peak_rss_bytes, provenance, reset_peak_rss
from layercut.report.write import write_model_card, write_report
from layercut.results import RunResult
from layercut.types import PruningPlan, WeightPatch

if TYPE_CHECKING:
    from layercut.models.view import DecoderView


USED_ALONE = {"model", "revision", "seed", "dtype", "device", "finetune", "evaluation"}
"""Parts of the recipe that fine-tuning on its own depends on."""


def training_data(
    view: DecoderView, recipe: Recipe
) -> tuple[FinetuneSettings | None, list[TaskRow]]:
    """The section ``finetune`` with its seed, and its rows, checked; nothing without one.

    Raises:
        DataError: the rows cannot be read or learnt from.
        NetworkError: the rows are on the Hub, which cannot be reached.
        RecipeError: settings that do not suit the model.
    """
    if recipe.finetune is None:
        return None, []
    from layercut.finetune import check_rows

    settings = recipe.finetune
    if settings.seed is None:
        settings = settings.model_copy(update={"seed": recipe.seed % 2**32})
    rows = read_rows(settings.data)
    check_rows(view, rows, settings)
    return settings, rows


class TuningStage:
    """The recipe's section ``finetune``, as the pipeline meets it; without one, nothing happens.

    Attributes:
        settings: the section.
        rows: its training rows, which every model is tuned on.
        result: receives the stages ``dense_tuned`` and ``pruned_tuned``.
        measured: what is measured of each.
        work_dir: where checkpoints stay until the run is complete, beside the output.
        teacher: the model that the pruned one is distilled from, if there is one.
    """

    def __init__(
        self,
        settings: FinetuneSettings | None,
        rows: Sequence[TaskRow],
        result: RunResult,
        measured: Mapping[str, Any],
        output_dir: Path,
    ) -> None:
        self.settings = settings
        self.rows = rows
        self.result = result
        self.measured = measured
        self.work_dir = output_dir.resolve().with_name(f"{output_dir.resolve().name}.training")
        self.teacher: DecoderView | None = None

    def dense(self, view: DecoderView) -> DecoderView:
        """Tune the dense model if asked for; returns one with the checkpoint's own weights.

        The model is tuned in place and loaded again, so that memory holds one at a time and its
        peaks can be compared; a teacher is the exception.
        """
        if self.settings is None:
            return view
        if self.settings.compare_dense:
            alone = self.settings.model_copy(update={"distill": None})
            self.tune(view, alone, "dense")
        elif self.settings.distill is None:
            return view
        self.teacher = view if self.settings.distill else None
        return reload(view)

    def pruned(
        self, view: DecoderView, plan: PruningPlan, patch: WeightPatch, folder: Path
    ) -> WeightPatch:
        """Tune the pruned model in place; returns the patch with its new weights.

        Args:
            view: the model after ``apply``.
            plan: which layers went.
            patch: what else changed.
            folder: gets ``base`` and ``adapter`` with ``keep_adapter``.
        """
        if self.settings is None:
            return patch
        from layercut.finetune import trained_names

        adapter = {}
        if self.settings.keep_adapter:
            base = folder / "base"
            base.mkdir(parents=True)
            write_checkpoint(view.path, view.rules, plan, patch, base)
            verify_checkpoint(base, view)
            home = self.work_dir.with_name(self.work_dir.name.removesuffix(".training"))
            adapter = {
                "adapter_dir": folder / "adapter",
                "adapter_base": home / folder.name / "base",
            }
        self.tune(view, self.settings, "pruned", teacher=self.teacher, **adapter)
        return tuned_patch(view, plan, patch, trained_names(view, self.settings))

    def remove_checkpoints(self) -> None:
        """Clear away what only a resumption would need."""
        shutil.rmtree(self.work_dir, ignore_errors=True)

    def tune(self, view: DecoderView, settings: FinetuneSettings, name: str, **how: Any) -> None:
        """Tune ``view.model`` in place and measure it as the stage ``{name}_tuned``.

        Args:
            view: the model.
            settings: for this model.
            name: ``dense`` or ``pruned``.
            **how: teacher and adapter folders, as for `layercut.finetune.tune`.
        """
        # Imported here: PEFT and TRL take seconds, and most runs do not tune.
        from layercut.finetune import tune

        self.result.peak_rss_bytes = max(self.result.peak_rss_bytes, peak_rss_bytes())
        reset_peak_rss()
        work_dir = None if settings.save_steps is None else self.work_dir / name
        with self.result.timed("finetune", f"fine-tune the {name} model"):
            tuning = tune(view, self.rows, settings, work_dir=work_dir, **how)
        if tuning.resumed_at:
            warnings.warn(
                f"the fine-tuning of the {name} model went on from step {tuning.resumed_at} of "
                f"{tuning.n_steps}; its seconds are those of the rest.",
                stacklevel=2,
            )
        with self.result.timed("evaluate", f"evaluate the tuned {name} model"):
            measured = evaluate(view, **self.measured)
        stages = self.result.stages
        measured = compared(measured, stages.get("dense_tuned", stages["dense"]))
        stages[f"{name}_tuned"] = replace(measured, train_seconds=tuning.train_seconds)


def tune_checkpoint(
    recipe: Recipe | str | Path | Mapping[str, Any],
    output_dir: str | Path,
    *,
    overrides: Sequence[str] = (),
    overwrite: bool = False,
    command: str = "layercut.tune_checkpoint(…)",
) -> RunResult:
    """Fine-tune a model without pruning it, and write it to ``output_dir``.

    Args:
        recipe: a recipe, the path of one, or its content; its sections on pruning are not used.
        output_dir: the new checkpoint's folder; it appears complete and verified, or not at all.
        overrides: ``a.b=c`` changes to the recipe.
        overwrite: replace an earlier output.
        command: what the report says produced it.

    Returns:
        Every figure that was measured: the stages ``dense`` and ``dense_tuned``.

    Raises:
        LayercutError: see errors.py.
    """
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    output_dir = Path(output_dir)
    used = recipe.model_dump(mode="json", include=USED_ALONE)
    result = RunResult(recipe.model, used, provenance(command))
    measured = recipe.evaluation.model_dump(exclude={"harness"})
    start = time.perf_counter()
    with result.collecting_warnings():
        with result.timed("load"):
            view = open_model(recipe, output_dir, overwrite=overwrite)
            settings, rows = training_data(view, recipe)
            if settings is None:
                raise RecipeError("the recipe has no section finetune. Add one, with its data.")
            check_tasks(view, recipe.evaluation.tasks)
        with result.timed("evaluate", "evaluate the model"):
            result.stages["dense"] = evaluate(view, **measured)
        stage = TuningStage(settings, rows, result, measured, output_dir)
        stage.tune(view, settings.model_copy(update={"distill": None}), "dense")
        from layercut.finetune import trained_names

        whole = PruningPlan(recipe.model, view.n_layers, (), "none")
        patch = tuned_patch(view, whole, WeightPatch({}, "none"), trained_names(view, settings))
        with staged_folder(output_dir, overwrite=overwrite) as folder:
            with result.timed("save", "write and verify the checkpoint"):
                write_checkpoint(view.path, view.rules, whole, patch, folder)
                verify_checkpoint(folder, view)
            result.seconds["total"] = time.perf_counter() - start
            result.peak_rss_bytes = max(result.peak_rss_bytes, peak_rss_bytes())
            write_report(result, folder / "layercut", recipe_yaml=strict_yaml.dump(used))
            write_model_card(result, folder / "README.md", source=view.path)
        stage.remove_checkpoints()
    return result

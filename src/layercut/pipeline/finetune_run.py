"""Fine-tuning as a stage of a run, dense and pruned alike, and of a checkpoint on its own."""

from __future__ import annotations

import gc
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercut.checkpoints.output_dir import staged_folder
from layercut.checkpoints.patch import tuned_patch
from layercut.checkpoints.writer import write_checkpoint
from layercut.data.tasks import TaskRow, read_rows
from layercut.errors import RecipeError
from layercut.evaluation.evaluate import check_tasks, compared, evaluate
from layercut.evaluation.harness import check_harness
from layercut.machine import peak_rss_bytes, provenance, reset_peak_rss
from layercut.models.load import reload
from layercut.output.verify import verify_checkpoint
from layercut.pipeline.prepare import open_model
from layercut.recipe import strict_yaml
from layercut.recipe.finetune import FinetuneSettings
from layercut.recipe.recipe import Recipe, load_recipe
from layercut.report.write import write_model_card, write_report
from layercut.results import Evaluation, RunResult
from layercut.training.resume import check_work_dir, claim, remove_claimed, training_folder
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
        ModelError: the tokenizer has no token to pad with.
        RecipeError: settings that do not suit the model.
    """
    if recipe.finetune is None:
        return None, []
    from layercut.training.finetune_checks import check_rows

    settings = recipe.finetune
    if settings.seed is None:
        settings = settings.model_copy(update={"seed": recipe.seed % 2**32})
    rows = read_rows(settings.data)
    check_rows(view, rows, settings)
    return settings, rows


class TuningStage:
    """The recipe's section ``finetune``, as the pipeline meets it; without one, nothing happens.

    Raises:
        OutputError: something else stands where the checkpoints would be.

    Attributes:
        settings: the section.
        rows: its training rows, which every model is tuned on.
        result: receives the stages ``dense_tuned`` and ``pruned_tuned``.
        measured: what is measured of each.
        home: the output folder.
        work_dir: where checkpoints stay until the run is complete, beside the output.
        kept_dir: within it, what moves into ``OUT/layercut`` at the end.
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
        self.home = output_dir.resolve()
        self.work_dir = training_folder(output_dir)
        self.kept_dir = self.work_dir / "kept"
        self._uses_work_dir = settings is not None and (
            settings.save_steps is not None or bool(self._kept_names())
        )
        if self._uses_work_dir:
            check_work_dir(self.work_dir)
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

    def pruned(self, view: DecoderView, plan: PruningPlan, patch: WeightPatch) -> WeightPatch:
        """Tune the pruned model in place; returns the patch with its new weights.

        Args:
            view: the model after ``apply``.
            plan: which layers went.
            patch: what else changed.
        """
        if self.settings is None:
            return patch
        from layercut.training.finetune import trained_names

        if self.settings.keep_adapter:
            claim(self.work_dir)
            base = self.kept_dir / "base"
            shutil.rmtree(base, ignore_errors=True)
            base.mkdir(parents=True)
            write_checkpoint(view.path, view.layout, plan, patch, base)
            verify_checkpoint(base, view, plan, patch)
        base = self.home / "layercut" / "base"
        self.tune(view, self.settings, "pruned", teacher=self.teacher, adapter_base=base)
        return tuned_patch(
            view.path,
            view.layout,
            plan,
            patch,
            view.model.state_dict(),
            trained_names(view, self.settings),
        )

    def move_kept(self, folder: Path) -> None:
        """Move adapter, base and records, where there are any, into ``folder``."""
        for name in self._kept_names():
            if (self.kept_dir / name).is_dir():
                folder.mkdir(parents=True, exist_ok=True)
                (self.kept_dir / name).rename(folder / name)

    def _kept_names(self) -> list[str]:
        """What the settings ask for beside the tuned model."""
        if self.settings is None:
            return []
        logs = ["logs"] if self.settings.report_to == "tensorboard" else []
        return logs + (["base", "adapter"] if self.settings.keep_adapter else [])

    def remove_checkpoints(self) -> None:
        """Clear away what only a resumption would need."""
        if self.settings is not None:
            remove_claimed(self.work_dir)

    def tune(self, view: DecoderView, settings: FinetuneSettings, name: str, **how: Any) -> None:
        """Tune ``view.model`` in place and measure it as the stage ``{name}_tuned``.

        Args:
            view: the model.
            settings: for this model.
            name: ``dense`` or ``pruned``.
            **how: teacher and the adapter's base, as for `layercut.training.finetune.tune`.
        """
        # Imported here: PEFT and TRL take seconds, and most runs do not tune.
        from layercut.training.finetune import tune

        log_dir = self.kept_dir / "logs" / name if settings.report_to == "tensorboard" else None
        # Only the adapter of the model that is written is of use.
        kept = settings.keep_adapter and "adapter_base" in how
        adapter_dir = self.kept_dir / "adapter" if kept else None
        work_dir = None if settings.save_steps is None else self.work_dir / name
        if self._uses_work_dir:
            claim(self.work_dir)
        self.result.peak_rss_bytes = max(self.result.peak_rss_bytes, peak_rss_bytes())
        gc.collect()  # what earlier stages left in cycles is not this one's
        reset_peak_rss()
        places: dict[str, Any] = {
            "work_dir": work_dir,
            "log_dir": log_dir,
            "adapter_dir": adapter_dir,
        }
        with self.result.timed("finetune", f"fine-tune the {name} model"):
            tuning = tune(view, self.rows, settings, **places, **how)
        if tuning.resumed_at:
            warnings.warn(
                f"the fine-tuning of the {name} model went on from step {tuning.resumed_at} of "
                f"{tuning.n_steps}; its seconds are those of both parts.",
                stacklevel=2,
            )
        with self.result.timed("evaluate", f"evaluate the tuned {name} model"):
            measured = evaluate(view, **self.measured)
        stages = self.result.stages
        warn_if_worse(stages[name], measured, name)
        measured = compared(measured, stages.get("dense_tuned", stages["dense"]))
        stages[f"{name}_tuned"] = replace(measured, train_seconds=tuning.train_seconds)


def warn_if_worse(before: Evaluation, after: Evaluation, name: str) -> None:
    """Say which tasks a fine-tuning has made worse, by more than two standard errors.

    Args:
        before: the same model's figures before it was tuned.
        after: those afterwards.
        name: ``dense`` or ``pruned``.
    """
    changes = compared(after, before).accuracy_change
    worse = {task: c for task, c in changes.items() if c.value < -2 * c.stderr}
    if worse:
        told = ", ".join(
            f"{task} by {-100 * c.value:.1f} ± {100 * c.stderr:.1f} points"
            for task, c in worse.items()
        )
        warnings.warn(
            f"fine-tuning lowered the {name} model's accuracy on {told}. Lower "
            "finetune.learning_rate, or see what recovery.method: none leaves.",
            stacklevel=2,
        )


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
    if recipe.finetune is not None and recipe.finetune.distill is not None:
        raise RecipeError(
            "finetune.distill needs a pruned model and its dense one, but nothing is pruned here. "
            "Set it to null, or use `layercut run`."
        )
    output_dir = Path(output_dir)
    used = recipe.model_dump(mode="json", include=USED_ALONE)
    result = RunResult(recipe.model, used, provenance(command))
    measured = recipe.evaluation.model_dump()
    start = time.perf_counter()
    with result.collecting_warnings():
        with result.timed("load"):
            view = open_model(recipe, output_dir, overwrite=overwrite)
            settings, rows = training_data(view, recipe)
            if settings is None:
                raise RecipeError("the recipe has no section finetune. Add one, with its data.")
            check_tasks(view, recipe.evaluation.tasks)
            check_harness(recipe.evaluation.harness)
        stage = TuningStage(settings, rows, result, measured, output_dir)
        with result.timed("evaluate", "evaluate the model"):
            result.stages["dense"] = evaluate(view, **measured)
        stage.tune(view, settings, "dense", adapter_base=view.path)
        from layercut.training.finetune import trained_names

        whole = PruningPlan(recipe.model, view.n_layers, (), "none")
        patch = tuned_patch(
            view.path,
            view.layout,
            whole,
            WeightPatch({}, "none"),
            view.model.state_dict(),
            trained_names(view, settings),
        )
        with staged_folder(output_dir, overwrite=overwrite) as folder:
            with result.timed("save", "write and verify the checkpoint"):
                write_checkpoint(view.path, view.layout, whole, patch, folder)
                verify_checkpoint(folder, view, whole, patch)
            result.seconds["total"] = time.perf_counter() - start
            result.peak_rss_bytes = max(result.peak_rss_bytes, peak_rss_bytes())
            write_report(result, folder / "layercut", recipe_yaml=strict_yaml.dump(used))
            write_model_card(result, folder / "README.md", source=view.path)
            stage.move_kept(folder / "layercut")
        stage.remove_checkpoints()
    return result

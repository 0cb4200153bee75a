"""Fine-tuning as a stage of a run: the dense and the pruned model on the same rows."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercut.checkpoints.patch import patch_trained
from layercut.checkpoints.writer import write_checkpoint
from layercut.data.tasks import TaskRow, read_rows
from layercut.evaluation.evaluate import add_changes, evaluate
from layercut.machine import restart_peak_rss
from layercut.models.load import reload
from layercut.output.verify import verify_checkpoint
from layercut.recipe.finetune import FinetuneConfig
from layercut.recipe.recipe import Recipe
from layercut.results import Evaluation, RunResult
from layercut.training.resume import check_work_dir, claim, training_folder
from layercut.types import PruningPlan, WeightPatch

if TYPE_CHECKING:
    from layercut.models.view import DecoderView


@dataclass(frozen=True, slots=True)
class FinetuneJob:
    """A fine-tuning that can be done.

    Attributes:
        config: the recipe's section ``finetune``, with its seed.
        rows: training rows, which every model is trained on.
        evaluation: what is measured of each model, as `layercut.evaluate` takes it.
        output_dir: the output folder, resolved.
    """

    config: FinetuneConfig
    rows: tuple[TaskRow, ...]
    evaluation: Mapping[str, Any]
    output_dir: Path

    @property
    def work_dir(self) -> Path:
        """Where checkpoints stay until the run is complete, beside the output."""
        return training_folder(self.output_dir)

    @property
    def kept_dir(self) -> Path:
        """Within it, what moves into ``OUT/layercut`` at the end."""
        return self.work_dir / "kept"

    @property
    def kept_names(self) -> list[str]:
        """What the configuration asks for beside the trained model."""
        logs = ["logs"] if self.config.report_to == "tensorboard" else []
        return logs + (["base", "adapter"] if self.config.keep_adapter else [])

    @property
    def uses_work_dir(self) -> bool:
        """Whether anything is written there."""
        return self.config.save_steps is not None or bool(self.kept_names)


def prepare_finetune(recipe: Recipe, view: DecoderView, output_dir: Path) -> FinetuneJob | None:
    """Read and check what the section ``finetune`` needs; ``None`` without one.

    Raises:
        DataError: the rows cannot be read or learnt from.
        NetworkError: the rows are on the Hub, which cannot be reached.
        ModelError: the tokenizer has no token to pad with.
        OutputError: something else stands where the checkpoints would be.
        RecipeError: settings that do not suit the model.
    """
    if recipe.finetune is None:
        return None
    from layercut.training.finetune_checks import check_rows

    config = recipe.finetune
    if config.seed is None:
        config = config.model_copy(update={"seed": recipe.seed % 2**32})
    rows = tuple(read_rows(config.data))
    check_rows(view, rows, config)
    job = FinetuneJob(config, rows, recipe.evaluation.model_dump(), output_dir.resolve())
    if job.uses_work_dir:
        check_work_dir(job.work_dir)
    return job


def finetune_dense(
    view: DecoderView, job: FinetuneJob | None, result: RunResult
) -> DecoderView | None:
    """Fine-tune the dense model if asked for, and give ``view`` the checkpoint's weights again.

    The model is trained in place and loaded anew, so that memory holds one at a time and its
    peaks can be compared; a teacher is the exception.

    Returns:
        The model that the pruned one is distilled from, if there is one.
    """
    if job is None or not (job.config.compare_dense or job.config.distill):
        return None
    if job.config.compare_dense:
        train_and_measure(
            view, job, "dense", result, job.config.model_copy(update={"distill": None})
        )
    teacher = copy.copy(view) if job.config.distill else None
    view.model = reload(view).model
    return teacher


def finetune_pruned(
    view: DecoderView,
    job: FinetuneJob | None,
    plan: PruningPlan,
    patch: WeightPatch,
    teacher: DecoderView | None,
    result: RunResult,
) -> WeightPatch:
    """Fine-tune the pruned model in place; returns the patch with its new weights.

    Args:
        view: the model after ``apply``.
        job: the fine-tuning; ``None`` does nothing.
        plan: which layers went.
        patch: what else changed.
        teacher: what it is distilled from, if anything.
        result: receives the stage ``pruned_tuned``.
    """
    if job is None:
        return patch
    from layercut.training.finetune import trained_names

    if job.config.keep_adapter:
        claim(job.work_dir)
        base = job.kept_dir / "base"
        shutil.rmtree(base, ignore_errors=True)
        base.mkdir(parents=True)
        write_checkpoint(view.path, view.layout, plan, patch, base)
        verify_checkpoint(base, view, plan, patch)
    base = job.output_dir / "layercut" / "base"
    train_and_measure(view, job, "pruned", result, teacher=teacher, adapter_base=base)
    names = trained_names(view, job.config)
    return patch_trained(view.path, view.layout, plan, patch, view.model.state_dict(), names)


def train_and_measure(
    view: DecoderView,
    job: FinetuneJob,
    name: str,
    result: RunResult,
    config: FinetuneConfig | None = None,
    *,
    teacher: DecoderView | None = None,
    adapter_base: Path | None = None,
) -> None:
    """Fine-tune ``view.model`` in place and measure it as the stage ``{name}_tuned``.

    Args:
        view: the model.
        job: rows, configuration and folders.
        name: ``dense`` or ``pruned``.
        result: receives the stage.
        config: instead of the job's.
        teacher: what the model is distilled from, if anything.
        adapter_base: the checkpoint that a kept adapter names; only that of a model that is
            written is of use.
    """
    # Imported here: PEFT and TRL take seconds, and most runs do not train.
    from layercut.training.finetune import finetune

    config = config or job.config
    if job.uses_work_dir:
        claim(job.work_dir)
    result.peak_rss_bytes = restart_peak_rss(result.peak_rss_bytes)
    keeps_adapter = config.keep_adapter and adapter_base is not None
    with result.timed("finetune", f"fine-tune the {name} model"):
        finetuned = finetune(
            view,
            job.rows,
            config,
            work_dir=None if config.save_steps is None else job.work_dir / name,
            log_dir=job.kept_dir / "logs" / name if config.report_to == "tensorboard" else None,
            adapter_dir=job.kept_dir / "adapter" if keeps_adapter else None,
            teacher=teacher,
            adapter_base=adapter_base,
        )
    if finetuned.resumed_at:
        warnings.warn(
            f"the fine-tuning of the {name} model went on from step {finetuned.resumed_at} of "
            f"{finetuned.n_steps}; its seconds are those of both parts.",
            stacklevel=2,
        )
    with result.timed("evaluate", f"evaluate the tuned {name} model"):
        measured = evaluate(view, **job.evaluation, speed=False)
    stages = result.stages
    warn_if_worse(stages[name], measured, name)
    measured = add_changes(measured, stages.get("dense_tuned", stages["dense"]))
    stages[f"{name}_tuned"] = replace(measured, train_seconds=finetuned.train_seconds)


def move_kept(job: FinetuneJob | None, folder: Path) -> None:
    """Move adapter, base and records, where there are any, into ``folder``."""
    for name in job.kept_names if job else ():
        if job is not None and (job.kept_dir / name).is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            (job.kept_dir / name).rename(folder / name)


def warn_if_worse(before: Evaluation, after: Evaluation, name: str) -> None:
    """Say which tasks a fine-tuning has made worse, by more than two standard errors.

    Args:
        before: the same model before it was trained.
        after: and afterwards.
        name: ``dense`` or ``pruned``.
    """
    changes = add_changes(after, before).accuracy_change
    worse = {task: c for task, c in changes.items() if c.value < -2 * c.stderr}
    if worse:
        listed = ", ".join(
            f"{task} by {-100 * c.value:.1f} ± {100 * c.stderr:.1f} points"
            for task, c in worse.items()
        )
        warnings.warn(
            f"fine-tuning lowered the {name} model's accuracy on {listed}. Lower "
            "finetune.learning_rate, or see what recovery.method: none leaves.",
            stacklevel=2,
        )

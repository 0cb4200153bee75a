"""Fine-tuning within a run: the dense model for comparison, then the pruned one, alike."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercut.data.tasks import TaskRow
from layercut.evaluation import compared, evaluate
from layercut.finetune_settings import FinetuneSettings
from layercut.models.checkpoint import tuned_patch, verify_checkpoint, write_checkpoint
from layercut.models.load import reload
from layercut.report.machine import peak_rss_bytes, reset_peak_rss
from layercut.results import RunResult
from layercut.types import PruningPlan, WeightPatch

if TYPE_CHECKING:
    from layercut.models.view import DecoderView


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
            self._tune(view, alone, "dense")
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
        self._tune(view, self.settings, "pruned", teacher=self.teacher, **adapter)
        return tuned_patch(view, plan, patch, trained_names(view, self.settings))

    def remove_checkpoints(self) -> None:
        """Clear away what only a resumption would need."""
        shutil.rmtree(self.work_dir, ignore_errors=True)

    def _tune(self, view: DecoderView, settings: FinetuneSettings, name: str, **how: Any) -> None:
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
        if name == "pruned":
            measured = compared(measured, stages.get("dense_tuned", stages["dense"]))
        stages[f"{name}_tuned"] = replace(measured, train_seconds=tuning.train_seconds)

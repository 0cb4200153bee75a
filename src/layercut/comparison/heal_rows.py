"""Entries that are healed after their recovery, and the dense model in the same way.

A heal changes weights, so it has a copy of its own, which is really cut; the dense model teaches.
What healing the dense model brings is adaptation to the text, not recovery: it stands beside them.
Without a share of the text's own next token in the loss it brings nothing, and is not computed: a
model's divergence from itself is 0, and so is its gradient.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from layercut.comparison.config import ComparisonConfig
from layercut.comparison.measure import RowEvaluator
from layercut.comparison.plans import NOT_APPLICABLE
from layercut.comparison.row import Row
from layercut.comparison.store import digest
from layercut.models.load import reload
from layercut.models.surgery import apply
from layercut.training.heal_windows import check_windows, heal_windows
from layercut.training.resume import check_work_dir
from layercut.types import CalibrationBatches, PruningPlan, WeightPatch

if TYPE_CHECKING:
    from layercut.models.view import DecoderView

COPIED_KEYS = ("pair", "source", "reading", "layers", "dropped", "cuts")
DENSE_UNCHANGED = "the dense model as it is: distilled from itself alone, it would not change"


class RowHealer:
    """The text and budget of every heal.

    Attributes:
        digest: hash of the settings and of the text.
    """

    def __init__(
        self,
        view: DecoderView,
        batches: CalibrationBatches,
        settings: ComparisonConfig,
        work_dir: Path,
    ) -> None:
        """Draw the windows, without those of the calibration.

        Args:
            view: the dense model.
            batches: the calibration.
            settings: of the comparison, with a heal.
            work_dir: where the running heal keeps its checkpoints, to go on after a kill.

        Raises:
            DataError: the text cannot be read or is too short.
            RecipeError: windows longer than the model's context.
            OutputError: ``work_dir`` holds something else than layercut's checkpoints.
        """
        check_work_dir(work_dir)
        assert settings.heal is not None
        seed = settings.seed % 2**32
        self.view = view
        self.work_dir = work_dir
        heal_seed = seed if settings.heal.seed is None else settings.heal.seed
        self.settings = settings.heal.model_copy(update={"seed": heal_seed})
        self.windows = heal_windows(
            self.settings, settings.calibration, batches, view.tokenizer, seed=seed
        )
        check_windows(view, self.windows, self.settings)
        content = self.settings.model_dump(mode="json", exclude={"data", "text_column"})
        self.digest = digest(content, self.windows.tolist())

    @property
    def length(self) -> str:
        """Behind the name of what it healed: other heals are other rows."""
        length = f"{self.settings.steps} steps"
        if self.settings.minutes is not None:
            length = f"{self.settings.minutes:g} min"
        share = self.settings.label_weight
        return f"{length}, {100 * share:g} % labels" if share else length

    def key_of(self, row: Row) -> str:
        """The key of the row that this heal makes of ``row``."""
        return digest(row.key, self.digest)

    def heal_row(
        self, row: Row, cut: tuple[PruningPlan, WeightPatch] | None, evaluator: RowEvaluator
    ) -> Row:
        """The healed model's row: its estimates, or the reason why there are none.

        Args:
            row: of the same model before.
            cut: what makes the model from the dense one; ``None`` for that one itself.
            evaluator: of all rows.
        """
        from layercut.training.heal import heal

        key, method = self.key_of(row), f"{row.method}, healed {self.length}"
        if cut is None and self.settings.label_weight == 0:
            return replace(
                row, key=key, method=method, seconds={"heal": 0.0}, reading=DENSE_UNCHANGED
            )
        copy = reload(self.view)
        if cut is not None:
            apply(copy, *cut)
        start = Row(key=key, method=method, **{name: getattr(row, name) for name in COPIED_KEYS})
        try:
            result = heal(copy, self.view, self.windows, self.settings, work_dir=self.work_dir)
            measured = evaluator.measure(start, copy)
            measured = evaluator.measure_speed(measured, lambda: nullcontext(copy))
        except NOT_APPLICABLE as error:
            return replace(start, reason=str(error))
        return replace(
            measured,
            seconds={**(row.seconds or {}), "heal": result.train_seconds},
            heal={**result.to_json(), "settings": self.settings.model_dump(mode="json")},
        )

"""Contestants that are healed after their recovery, and the dense model in the same way.

A heal changes weights, so it has a copy of its own, which is really cut; the dense model teaches.
What healing the dense model brings is adaptation to the text, not recovery: it stands beside them.
Without a share of the text's own next token in the loss it brings nothing, and is not computed: a
model's divergence from itself is 0, and so is its gradient.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from layercut.comparison.config import ComparisonConfig
from layercut.comparison.measure import EMPTY, Judge
from layercut.comparison.plans import NOT_APPLICABLE
from layercut.comparison.store import digest
from layercut.models.load import reload
from layercut.models.surgery import apply
from layercut.training.heal_windows import check_windows, heal_windows
from layercut.training.resume import check_work_dir
from layercut.types import CalibrationBatches, PruningPlan, WeightPatch

if TYPE_CHECKING:
    from layercut.models.view import DecoderView

COPIED_KEYS = ("pair", "source", "reading", "layers", "dropped", "cuts", "reason")


DENSE_UNCHANGED = {
    "pair": "",
    "source": "",
    "reading": "the dense model as it is: distilled from itself alone, it would not change",
}


class Healer:
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
        own = settings.heal.seed
        self.settings = settings.heal.model_copy(update={"seed": seed if own is None else own})
        self.windows = heal_windows(
            self.settings, settings.calibration, batches, view.tokenizer, seed=seed
        )
        check_windows(view, self.windows, self.settings)
        shown = self.settings.model_dump(mode="json", exclude={"data", "text_column"})
        self.digest = digest(shown, self.windows.tolist())

    @property
    def budget(self) -> str:
        """Behind the name of what it healed: other heals are other rows."""
        spent = f"{self.settings.steps} steps"
        if self.settings.minutes is not None:
            spent = f"{self.settings.minutes:g} min"
        share = self.settings.label_weight
        return f"{spent}, {100 * share:g} % labels" if share else spent

    def row(
        self, old: dict[str, Any], cut: tuple[PruningPlan, WeightPatch] | None, judge: Judge
    ) -> dict[str, Any]:
        """The healed model's row.

        Args:
            old: the row of the same model before.
            cut: what makes it from the dense one; ``None`` for that one itself.
            judge: of all rows.

        Returns:
            The figures, or the reason why there are none.
        """
        from layercut.training.heal import heal

        method = f"{old['method']}, healed {self.budget}"
        if cut is None and self.settings.label_weight == 0:
            return old | {"method": method, "seconds": {"heal": 0.0}} | DENSE_UNCHANGED
        copy = reload(self.view)
        if cut is not None:
            apply(copy, *cut)
        begun = {"pair": "", "source": "", "reading": "", **EMPTY}
        begun |= {key: old[key] for key in COPIED_KEYS if key in old}
        begun["method"] = method
        try:
            healing = heal(copy, self.view, self.windows, self.settings, work_dir=self.work_dir)
            measured = judge.measure(EMPTY, copy)
        except NOT_APPLICABLE as error:
            return begun | {"reason": str(error)}
        return {
            **begun,
            "n_parameters": copy.n_parameters,
            "seconds": {**old.get("seconds", {}), "heal": healing.train_seconds},
            "heal": {**healing.to_json(), "settings": self.settings.model_dump(mode="json")},
            **measured,
        }

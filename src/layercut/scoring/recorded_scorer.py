"""Scores that are computed once: every round is in the journal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from layercut.engine.journal import Entry, Journal
from layercut.gradients.log import GradientLog
from layercut.gradients.log_record import pack_log, unpack_log
from layercut.registry import MethodCall
from layercut.scoring.score import score_layers
from layercut.types import CalibrationBatches, LayerScores

if TYPE_CHECKING:
    from layercut.models.view import DecoderView


@dataclass(frozen=True, slots=True)
class RecordedScorer:
    """`layercut.scoring.score.score_layers` with a memory that outlives the process.

    Attributes:
        journal: knows the scores by the layers that were skipped.
        keeps_gradients: whether a recovery will read the gradients behind the first round.
    """

    journal: Journal
    keeps_gradients: bool = False

    def __call__(
        self, view: DecoderView, batches: CalibrationBatches, scoring: MethodCall
    ) -> LayerScores:
        """As `layercut.scoring.score.score_layers`."""
        keeps_gradients = self.keeps_gradients and not view.skipped
        fresh: list[LayerScores] = []

        def compute() -> Entry:
            scores = score_layers(view, batches, scoring)
            fresh.append(scores)
            values = {
                "scores": list(scores.values),
                "options": dict(scores.options),
                "n_targets": scores.n_targets,
                "seconds": scores.seconds,
                "fingerprint": scores.fingerprint,
            }
            log = scores.gradient_log if keeps_gradients else None
            if not isinstance(log, GradientLog):
                return Entry(values)
            values["log"], rows = pack_log(log)
            return Entry(values, {"rows": rows})

        skipped = " ".join(map(str, sorted(view.skipped))) or "none"
        entry = self.journal.recall("scores without layers", skipped, compute)
        if fresh:
            return fresh[0]
        known = dict(entry.values)
        log = known.pop("log", None)
        if keeps_gradients and log is None:  # a record of gradients that no file holds
            return score_layers(view, batches, scoring)
        return LayerScores(
            values=tuple(known.pop("scores")),
            method=scoring.name,
            gradient_log=None if log is None else unpack_log(log, entry.tensors["rows"]),
            **known,
        )

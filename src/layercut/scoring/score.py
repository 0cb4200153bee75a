"""Layer importance: one number per layer, higher = keep, read-only on the model."""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from layercut import registry
from layercut.errors import NumericsError, RecipeError
from layercut.models.check_method import check_model
from layercut.registry import MethodCall
from layercut.types import CalibrationBatches, LayerScores

if TYPE_CHECKING:
    from layercut.models.view import DecoderView


def score(
    view: DecoderView,
    batches: CalibrationBatches,
    *,
    method: str = "residual-sensitivity",
    **options: Any,
) -> LayerScores:
    """Score every layer that ``view`` does not currently skip.

    Args:
        view: the model; unchanged afterwards.
        batches: calibration text.
        method: a file of ``layercut/scoring/methods``, with ``-`` for ``_``.
        **options: that method's own options.

    Returns:
        One score per layer of the model; ``None`` for skipped layers.

    Raises:
        RecipeError: unknown method or option.
        ModelError: the model's layers cannot be scored.
        NumericsError: a score is NaN or infinite.
    """
    return score_layers(view, batches, registry.resolve("scoring", method, options))


def score_layers(
    view: DecoderView, batches: CalibrationBatches, scoring: MethodCall
) -> LayerScores:
    """As `score`, by a method that is resolved already.

    Raises:
        ModelError: the model's layers cannot be scored.
        NumericsError: a score is NaN or infinite.
    """
    check_model(scoring, view)
    start = time.perf_counter()
    scores: LayerScores = scoring.function(view, batches, scoring.options)
    return with_provenance(view, batches, scores, scoring, time.perf_counter() - start)


def with_provenance(
    view: DecoderView,
    batches: CalibrationBatches,
    scores: LayerScores,
    scoring: MethodCall,
    seconds: float,
) -> LayerScores:
    """A method's bare scores, checked, with where they come from.

    Raises:
        RecipeError: there is not one score per layer.
        NumericsError: a score is NaN or infinite.
    """
    if len(scores.values) != view.n_layers:
        raise RecipeError(
            f"scoring '{scoring.name}' gave {len(scores.values)} scores for {view.n_layers} "
            "layers. Its method file must return one number per layer."
        )
    values = tuple(None if i in view.skipped else v for i, v in enumerate(scores.values))
    for layer, value in enumerate(values):
        if value is not None and not math.isfinite(value):
            raise NumericsError(
                f"the {scoring.name} score of layer {layer} is {value}. "
                "Check the weights and the calibration text."
            )
    options = scoring.options.model_dump(mode="json")
    return replace(
        scores,
        values=values,
        method=scoring.name,
        options=options,
        seconds=seconds,
        fingerprint=_fingerprint(view, batches, scoring.name, options),
    )


def _fingerprint(
    view: DecoderView, batches: CalibrationBatches, method: str, options: dict[str, Any]
) -> str:
    """Hash of all that a score depends on, the seed included (it chose the windows)."""
    parts = [view.fingerprint, batches.fingerprint, batches.gradient_batch, method, options]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

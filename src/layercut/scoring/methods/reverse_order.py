"""Drop from the end: the control that every score must beat.

Source   arXiv:2411.15558 (Reassessing Layer Pruning), reverse-order pruning
Formula  s_l = −l; with keep_last the last layer scores highest [a reading of the paper]
Meaning  higher = keep
Cost     none
"""

from __future__ import annotations

from pydantic import Field

from layercut.models.view import DecoderView
from layercut.registry import Method, MethodOptions
from layercut.types import CalibrationBatches, LayerScores


class Options(MethodOptions):
    """Whether the last layer, which feeds the final norm, stays."""

    keep_last: bool = Field(default=False, description="whether the last layer scores highest")


METHOD = Method(reads_model=False)


def score(view: DecoderView, batches: CalibrationBatches, options: Options) -> LayerScores:
    """No pass over ``batches``."""
    values = [-float(layer) for layer in range(view.n_layers)]
    if options.keep_last:
        values[-1] = 1.0
    return LayerScores(tuple(values))

"""Scores drawn at random: the control that shows what chance reaches.

Formula  s_l uniform in [0, 1)
Meaning  higher = keep
Cost     none
"""

from __future__ import annotations

import torch
from pydantic import Field

from layercut.models.view import DecoderView
from layercut.registry import Method, MethodOptions
from layercut.types import CalibrationBatches, LayerScores


class Options(MethodOptions):
    """The draw's seed."""

    seed: int = Field(default=0, description="of the draw")


METHOD = Method(reads_model=False)


def score(view: DecoderView, batches: CalibrationBatches, options: Options) -> LayerScores:
    """No pass over ``batches``; the same seed gives the same scores on every machine."""
    generator = torch.Generator().manual_seed(options.seed)
    draws = torch.rand(view.n_layers, generator=generator, dtype=torch.float64)
    return LayerScores(tuple(draws.tolist()))

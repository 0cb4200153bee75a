"""Speeds of a run's stages: the dense and the pruned model timed in turns, once."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from layercut.evaluation.speed import add_speeds, measure_speeds
from layercut.results import RunResult

if TYPE_CHECKING:
    from layercut.models.view import DecoderView

SAME_SHAPES = {"dense_tuned": "dense", "healed": "pruned", "pruned_tuned": "pruned"}
"""Trained stage → the stage whose weights have its shapes, and which is therefore as fast."""
SPEEDS = (
    "prefill_tokens_per_second",
    "prefill_spread",
    "decode_tokens_per_second",
    "decode_spread",
    "speed_change",
)


def time_dense_and_pruned(dense: DecoderView, pruned: DecoderView, result: RunResult) -> None:
    """Time both models in turns and add their speeds to the stages ``dense`` and ``pruned``.

    Args:
        dense: the model before the cut; it shares the kept weights with ``pruned``.
        pruned: the model after it.
        result: has both stages.
    """
    models = {"dense": lambda: nullcontext(dense), "pruned": lambda: nullcontext(pruned)}
    speeds = measure_speeds(models)
    stages = result.stages
    stages["dense"] = add_speeds(stages["dense"], speeds["dense"])
    stages["pruned"] = add_speeds(stages["pruned"], speeds["pruned"], speeds["dense"])


def carry_speeds(result: RunResult) -> None:
    """Give trained stages the speed of the model they were trained from: no shape has changed."""
    for trained, before in SAME_SHAPES.items():
        if trained in result.stages:
            speeds = {name: getattr(result.stages[before], name) for name in SPEEDS}
            result.stages[trained] = replace(result.stages[trained], **speeds)

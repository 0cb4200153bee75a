"""A toy model's sizes on a toy machine, whose estimates can be worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from layercut.machine import Rates
from layercut.pipeline.estimate import estimate_run
from layercut.pipeline.model_shape import LayerShape, ModelShape
from layercut.recipe.recipe import Recipe

GB = 10**9
RATES = Rates(
    product=1e9, sum_product=1e9, factor=1e9, elements=1e9, memory=1e9, read=1e9, hash=1e9
)
LAYER = LayerShape(
    n_parameters=1000, active=900.0, attention=20, written=50.0, matrices=((10, 30),), down=30
)
SHAPE = ModelShape(
    layers=(LAYER,) * 8,
    width=10,
    vocabulary=100,
    heads=2,
    n_outside=1000,
    item_bytes=4,
    stored_bytes=36_000,
    largest_file=Path("model.safetensors"),
    n_files=1,
    product_dtype=torch.float32,
    device=torch.device("cpu"),
)


def recipe_of(**sections: Any) -> Recipe:
    return Recipe.model_validate({"model": "toy", **sections})


def seconds_of(shape: ModelShape, recipe: Recipe, *, ranks: int = 1) -> dict[str, float]:
    estimate = estimate_run(shape, recipe, RATES, GB, ranks=ranks)
    return {stage.name: stage.seconds or 0.0 for stage in estimate.resident}

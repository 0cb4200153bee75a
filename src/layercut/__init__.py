"""Gradient-guided layer pruning for causal language models.

view = load("embedded:smollm2-135m")
batches = calibration_batches({"data": "embedded:docs", "n_sequences": 32}, view.tokenizer)
plan, evidence = select(view, batches, drop_layers=6)
patch = fit(view, plan, evidence, batches)
apply(view, plan, patch)
save(view, plan, patch, "out")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from layercut.version import __version__

if TYPE_CHECKING:
    from layercut.comparison.run import compare
    from layercut.data.calibration import calibration_batches
    from layercut.data.tasks import read_rows
    from layercut.evaluation.evaluate import evaluate
    from layercut.gradients.log import GradientLog
    from layercut.models.load import load
    from layercut.models.surgery import apply
    from layercut.models.view import DecoderView
    from layercut.output.save import save
    from layercut.pipeline.finetune_run import finetune_checkpoint
    from layercut.pipeline.run import run
    from layercut.recipe.finetune import FinetuneConfig
    from layercut.recipe.heal import HealConfig
    from layercut.recipe.recipe import Recipe, load_recipe
    from layercut.recovery.fit import fit
    from layercut.scoring.score import score
    from layercut.selection.select import select
    from layercut.training.finetune import finetune
    from layercut.training.heal import heal

    FinetuneSettings, HealSettings = FinetuneConfig, HealConfig
    tune, tune_checkpoint = finetune, finetune_checkpoint

# Public name → its module; imported on first use, so that `layercut --help` needs no torch.
_HOMES = {
    "DecoderView": "layercut.models.view",
    "FinetuneConfig": "layercut.recipe.finetune",
    "GradientLog": "layercut.gradients.log",
    "HealConfig": "layercut.recipe.heal",
    "Recipe": "layercut.recipe.recipe",
    "apply": "layercut.models.surgery",
    "calibration_batches": "layercut.data.calibration",
    "compare": "layercut.comparison.run",
    "evaluate": "layercut.evaluation.evaluate",
    "finetune": "layercut.training.finetune",
    "finetune_checkpoint": "layercut.pipeline.finetune_run",
    "fit": "layercut.recovery.fit",
    "heal": "layercut.training.heal",
    "load": "layercut.models.load",
    "load_recipe": "layercut.recipe.recipe",
    "read_rows": "layercut.data.tasks",
    "run": "layercut.pipeline.run",
    "save": "layercut.output.save",
    "score": "layercut.scoring.score",
    "select": "layercut.selection.select",
}
# Names of version 0.1, kept for one release.
_OLD_NAMES = {
    "FinetuneSettings": "FinetuneConfig",
    "HealSettings": "HealConfig",
    "tune": "finetune",
    "tune_checkpoint": "finetune_checkpoint",
}

__all__ = [
    "DecoderView",
    "FinetuneConfig",
    "FinetuneSettings",
    "GradientLog",
    "HealConfig",
    "HealSettings",
    "Recipe",
    "__version__",
    "apply",
    "calibration_batches",
    "compare",
    "evaluate",
    "finetune",
    "finetune_checkpoint",
    "fit",
    "heal",
    "load",
    "load_recipe",
    "read_rows",
    "run",
    "save",
    "score",
    "select",
    "tune",
    "tune_checkpoint",
]


def __getattr__(name: str) -> Any:
    own_name = _OLD_NAMES.get(name, name)
    if own_name not in _HOMES:
        raise AttributeError(f"module 'layercut' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[own_name]), own_name)


def __dir__() -> list[str]:
    return __all__

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

__version__ = "0.1.0"

if TYPE_CHECKING:
    from layercut.comparison.run import compare
    from layercut.data.calibration import calibration_batches
    from layercut.data.tasks import read_rows
    from layercut.evaluation import evaluate
    from layercut.finetune import tune
    from layercut.finetune_settings import FinetuneSettings
    from layercut.gradient_log import GradientLog
    from layercut.heal_settings import HealSettings
    from layercut.models.checkpoint import save
    from layercut.models.load import load
    from layercut.models.view import DecoderView
    from layercut.pipeline import run
    from layercut.recipe import Recipe, load_recipe
    from layercut.recovery import fit
    from layercut.scoring import score
    from layercut.selection import select
    from layercut.surgery import apply
    from layercut.tuning import tune_checkpoint

# Public name → its module; imported on first use, so that `layercut --help` needs no torch.
_HOMES = {
    "DecoderView": "layercut.models.view",
    "FinetuneSettings": "layercut.finetune_settings",
    "GradientLog": "layercut.gradient_log",
    "HealSettings": "layercut.heal_settings",
    "Recipe": "layercut.recipe",
    "apply": "layercut.surgery",
    "calibration_batches": "layercut.data.calibration",
    "compare": "layercut.comparison.run",
    "evaluate": "layercut.evaluation",
    "fit": "layercut.recovery",
    "load": "layercut.models.load",
    "load_recipe": "layercut.recipe",
    "read_rows": "layercut.data.tasks",
    "run": "layercut.pipeline",
    "save": "layercut.models.checkpoint",
    "score": "layercut.scoring",
    "select": "layercut.selection",
    "tune": "layercut.finetune",
    "tune_checkpoint": "layercut.tuning",
}

__all__ = [
    "DecoderView",
    "FinetuneSettings",
    "GradientLog",
    "HealSettings",
    "Recipe",
    "__version__",
    "apply",
    "calibration_batches",
    "compare",
    "evaluate",
    "fit",
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
    if name not in _HOMES:
        raise AttributeError(f"module 'layercut' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__

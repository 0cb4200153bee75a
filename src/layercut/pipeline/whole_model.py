"""What needs all weights at once, in one process: heals, fine-tuning, harness tasks."""

from __future__ import annotations

import warnings

from layercut.errors import RecipeError
from layercut.models.check_method import require_one_rank, require_resident
from layercut.models.ranks import Ranks
from layercut.models.view import DecoderView
from layercut.pipeline.estimate import Residency
from layercut.pipeline.resources import RESIDENCIES
from layercut.recipe.recipe import Recipe
from layercut.registry import MethodCall


def list_residencies(
    recipe: Recipe, scoring: MethodCall, recovery: MethodCall
) -> tuple[Residency, ...]:
    """Where the weights may be for all that is asked for."""
    methods = [recovery] if recipe.selection.drop is not None else [scoring, recovery]
    if list_whole_sections(recipe) or not all(call.method.streams for call in methods):
        return ("resident",)
    return RESIDENCIES


def list_whole_sections(recipe: Recipe) -> list[str]:
    """The keys that are asked for of those that need all weights, in one process."""
    sections = {
        "heal": recipe.heal,
        "finetune": recipe.finetune,
        "evaluation.harness": recipe.evaluation.harness,
    }
    return [key for key, section in sections.items() if section]


def check_ranks(recipe: Recipe, ranks: Ranks) -> None:
    """Refuse what runs in one process where several share the run, and other recipes elsewhere.

    Raises:
        RecipeError: names the recipe's key.
    """
    for key in list_whole_sections(recipe):
        require_one_rank(ranks, key)
    ranks.check_same("recipe", recipe.to_yaml(), RecipeError)


def check_residency(recipe: Recipe, view: DecoderView) -> None:
    """Refuse what needs all weights at once where layers are read from their files.

    Raises:
        RecipeError: names the recipe's key.
    """
    if view.source is None:
        return
    for key in list_whole_sections(recipe):
        require_resident(view, key)
    warnings.warn(
        "layers are read from their files one at a time: speed is not measured", stacklevel=2
    )
